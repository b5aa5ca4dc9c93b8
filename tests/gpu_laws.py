"""What must hold for the GPU's operations, on whichever device `DEVICE` says.

On the CPU the kernels run in Triton's interpreter; `tests/gpu` runs the same on a GPU.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_store import graphs
from model_store.artifact import Overlay
from model_store.backbone import Activation, Backbone
from model_store.encoder import Encoder
from model_store.ops import Ffn, Linear, LowRank, Norm, Ops, TorchOps, Work
from model_store.ops_cuda import CudaOps, filled_attention, tile_rows_for, tiles_of
from model_store.packing import Item, pack
from model_store.plan import LinearHead, Plan
from model_store.tokenization import InputEncoder
from tests.overlays import fp32_encoder, random_overlay, small_backbone

# Rows that fill up a batch hold whatever they hold, and NumPy, in the interpreter, warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXTS = ["the cat is good", "a", "what is the new red film on my big bank card ?", "lost money"]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
KINDS: dict[str, dict[str, Any]] = {
    "neurons": {},
    "prompt": {"prompt_tokens": 4},
    "scales": {"scales": True},
    "heads": {"heads": (2, 0, 3)},
    "norms": {"norms": True},
    "deltas": {"delta_rank": 3},
    "all": {"heads": (3, 2, 1), "scales": True, "norms": True, "delta_rank": 2},
}

dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return small_backbone(tmp_path_factory.mktemp("gpu"))[1]


def _overlay(backbone: Backbone, kind: str, seed: int) -> Overlay:
    given: dict[str, Any] = {"prompt_tokens": 0, "seed": seed, **KINDS[kind]}
    return random_overlay(backbone, f"task-{kind}", **given)


def _logits(encoder: Encoder, backbone: Backbone, plans: Sequence[Plan]) -> list[Tensor]:
    """Every text through every plan in one batch, in the batch's order."""
    encodings = InputEncoder(backbone.tokenizer, backbone.config, ["{text}"], 40).encode(TEXTS)
    items = [Item(one, number) for number in range(len(plans)) for one in encodings]
    with torch.inference_mode():
        return encoder.forward(pack(items, [plan.layout for plan in plans]), plans)


def _expected(backbone: Backbone, overlays: Sequence[Overlay]) -> list[Tensor]:
    """Each overlay merged, in a batch of its own, in fp32 on the CPU."""
    encoder = fp32_encoder(backbone)
    return [_logits(encoder, backbone, [overlay.plan(encoder)])[0] for overlay in overlays]


def _assert_close(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (ours.cpu().float() - expected.float()).norm() / expected.float().norm()
    assert error < TOLERANCE[dtype], float(error)


# -- One batch of all kinds of tasks --------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sliced", [False, True], ids=["gathered", "sliced"])
def test_a_task_beside_shared_layers_answers_as_merged(
    backbone: Backbone, kind: str, sliced: bool
) -> None:
    overlay = _overlay(backbone, kind, 1)
    for ops in (
        TorchOps(device=DEVICE, shares_layers=True),
        CudaOps(torch.float32, DEVICE, graphs=False),
    ):
        encoder = Encoder(backbone.config, backbone.tensors, ops)
        (ours,) = _logits(encoder, backbone, [overlay.plan(encoder, sliced=sliced)])
        _assert_close(ours, _expected(backbone, [overlay])[0], torch.float32)


@dtypes
def test_one_batch_of_all_kinds_answers_as_each_alone(
    backbone: Backbone, dtype: torch.dtype
) -> None:
    overlays = [_overlay(backbone, kind, seed) for seed, kind in enumerate(KINDS)]
    encoder = Encoder(backbone.config, backbone.tensors, CudaOps(dtype, DEVICE, graphs=False))
    plans = [overlay.plan(encoder, sliced=bool(i % 2)) for i, overlay in enumerate(overlays)]
    mixed = _logits(encoder, backbone, plans)
    for ours, expected in zip(mixed, _expected(backbone, overlays), strict=True):
        _assert_close(ours, expected, dtype)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra"])
def test_every_family(tmp_path: Path, family: str) -> None:
    _, other = small_backbone(tmp_path, family)
    overlays = [_overlay(other, "prompt", 3), _overlay(other, "all", 4)]
    encoder = Encoder(other.config, other.tensors, CudaOps(torch.float32, DEVICE, graphs=False))
    plans = [overlay.plan(encoder, sliced=False) for overlay in overlays]
    for ours, expected in zip(
        _logits(encoder, other, plans), _expected(other, overlays), strict=True
    ):
        _assert_close(ours, expected, torch.float32)


def test_one_layer_and_the_untrimmed_forward(tmp_path: Path) -> None:
    """Where the last layer is the first, and where it is run at all rows."""
    for layers in (1, 2):
        _, other = small_backbone(tmp_path / str(layers), num_hidden_layers=layers)
        overlay = random_overlay(other, "task", seed=2, heads=0.5, norms=True, delta_rank=2)
        ops = CudaOps(torch.float32, DEVICE, graphs=False)
        encoder, plain = Encoder(other.config, other.tensors, ops), fp32_encoder(other)
        plans = [overlay.plan(encoder, sliced=False)], [overlay.plan(plain)]
        (ours,) = _logits(encoder, other, plans[0])
        _assert_close(ours, _logits(plain, other, plans[1])[0], torch.float32)
        encodings = InputEncoder(other.tokenizer, other.config, ["{text}"], 40).encode(TEXTS)
        batch = pack([Item(one, 0) for one in encodings], [plans[0][0].layout])
        with torch.inference_mode():
            states = [
                one.hidden_states(batch, given)
                for one, given in zip((encoder, plain), plans, strict=True)
            ]
        _assert_close(states[0], states[1], torch.float32)


def test_linear_heads_and_verbalizers_in_one_batch(backbone: Backbone) -> None:
    encoder = Encoder(
        backbone.config, backbone.tensors, CudaOps(torch.float32, DEVICE, graphs=False)
    )
    plain = fp32_encoder(backbone)
    tokens = torch.tensor([7, 30, 9])
    overlays = [_overlay(backbone, "neurons", seed) for seed in range(3)]

    def plans(encoder: Encoder) -> list[Plan]:
        made = [overlay.plan(encoder) for overlay in overlays]
        made[1] = dataclasses.replace(made[1], head=encoder.verbalizer(tokens))
        return made

    mixed = _logits(encoder, backbone, plans(encoder))
    for ours, plan in zip(mixed, plans(plain), strict=True):
        _assert_close(ours, _logits(plain, backbone, [plan])[0], torch.float32)


def test_a_cold_plan_copies_no_weight(backbone: Backbone) -> None:
    ops = CudaOps(torch.float32, DEVICE, graphs=False)
    encoder = Encoder(backbone.config, backbone.tensors, ops)
    plan = _overlay(backbone, "neurons", 0).plan(encoder, sliced=False)
    for layer, ffn in enumerate(plan.ffn):
        weights = encoder.tensors[f"layers.{layer}.ffn_in.weight"]
        assert ffn.inner.weight.data_ptr() == weights.data_ptr()
        assert ffn.neurons is not None
        assert ffn.neurons.dtype == torch.int16


# -- Filled-up batches ----------------------------------------------------------------------------


@dtypes
def test_filling_up_changes_no_answer(
    backbone: Backbone, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that fill up hold NaN here: one that got into an answer would show."""
    overlays = [_overlay(backbone, kind, 5) for kind in ("prompt", "scales")]
    more = graphs._more

    def poisoned(x: Tensor, rows: int) -> Tensor:
        result = more(x, rows)
        if x.is_floating_point():
            result[len(x) :] = math.nan
        return result

    sizes: list[graphs.Size] = []
    monkeypatch.setattr(graphs, "_more", poisoned)
    whole = graphs.filled

    def noted(x: Tensor, work: Work, size: graphs.Size) -> tuple[Tensor, Work]:
        assert size.rows > len(x)
        sizes.append(size)
        return whole(x, work, size)

    monkeypatch.setattr(graphs, "filled", noted)
    answers = []
    for filled in (False, True):
        encoder = Encoder(backbone.config, backbone.tensors, CudaOps(dtype, DEVICE, graphs=filled))
        plans = [overlay.plan(encoder, sliced=False) for overlay in overlays]
        answers.append(torch.cat(_logits(encoder, backbone, plans)))
    if DEVICE == "cpu" or dtype != torch.float32:
        assert len(sizes) == 1
    torch.testing.assert_close(*answers, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_recording_serves_every_batch_of_its_size(backbone: Backbone) -> None:
    """The same encoder, other tasks and other lengths, twice in turn."""
    dtype = torch.float32 if DEVICE == "cpu" else torch.float16
    encoder = Encoder(backbone.config, backbone.tensors, CudaOps(dtype, DEVICE))
    overlays = [_overlay(backbone, "neurons", seed) for seed in (1, 2, 3)]
    for _ in range(2):
        for overlay, expected in zip(overlays, _expected(backbone, overlays), strict=True):
            (ours,) = _logits(encoder, backbone, [overlay.plan(encoder, sliced=False)])
            _assert_close(ours, expected, dtype)


# -- Single operations ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Task:
    """A network of one layer."""

    ffn: tuple[Ffn, ...]
    adapters: None = None
    table: None = None


def _random_ffns(
    ops: Ops, tasks: Sequence[tuple[int, bool, bool, int]], activation: Activation, wide: int
) -> list[_Task]:
    """`tasks`: kept neurons, whether sliced, whether scaled, the deltas' rank."""
    generator = torch.Generator().manual_seed(len(tasks))
    hidden, width = 40, 70

    def some(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])
        return drawn.to(device=ops.device, dtype=ops.dtype)

    w_in, b_in, w_out, b_out = some(width, hidden), some(width), some(width, hidden), some(hidden)
    made = []
    for kept, sliced, scaled, rank in tasks:
        neurons = torch.randperm(width, generator=generator)[:kept].sort().values.to(ops.device)
        changes: dict[str, Any] = {
            "scale": some(kept) + 1 if scaled else None,
            "inner_delta": LowRank(some(rank, hidden), some(kept, rank)) if rank else None,
            "outer_delta": LowRank(some(rank, kept), some(hidden, rank)) if rank else None,
        }
        if sliced:
            rows = w_in[neurons], b_in[neurons], w_out[neurons]
            ffn = ops.pack_ffn(*rows, b_out, activation)
        else:
            whole = ops.pack_ffn(w_in, b_in, w_out, b_out, activation)
            narrow = torch.int32 if wide else torch.int16
            ffn = dataclasses.replace(whole, neurons=neurons.to(narrow))
        made.append(_Task((dataclasses.replace(ffn, **changes),)))
    return made


@settings(deadline=None, max_examples=12, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    segments=st.lists(
        st.tuples(
            st.integers(1, 50),
            st.integers(0, 70),
            st.booleans(),
            st.booleans(),
            st.sampled_from([0, 1, 5, 17]),
        ),
        min_size=1,
        max_size=5,
    ),
    activation=st.sampled_from(["gelu", "gelu_tanh", "relu"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    wide=st.booleans(),
)
def test_grouped_ffn_equals_torch(
    segments: list[tuple[int, int, bool, bool, int]],
    activation: Activation,
    dtype: torch.dtype,
    wide: bool,
) -> None:
    ops = CudaOps(dtype, DEVICE)
    networks = _random_ffns(ops, [task for _, *task in segments], activation, wide)  # type: ignore[misc]
    ends = np.cumsum([rows for rows, *_ in segments]).tolist()
    ranges = [slice(end - rows, end) for end, (rows, *_) in zip(ends, segments, strict=True)]
    x = torch.randn(ends[-1], 40).to(device=DEVICE, dtype=dtype)
    ours = ops.ffn(0, x, ops.group(ranges, networks))
    plain = TorchOps()
    exact = [_Task((_exact(network.ffn[0]),)) for network in networks]
    expected = plain.ffn(0, x.cpu().float(), plain.group(ranges, exact))
    assert ours.dtype == dtype
    _assert_close(ours, expected, dtype)


def _exact(value: Any) -> Any:
    """The same record in fp32 on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu().float() if value.is_floating_point() else value.cpu()
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changes = {one.name: _exact(getattr(value, one.name)) for one in dataclasses.fields(value)}
    return dataclasses.replace(value, **changes)


@dtypes
def test_add_norm_equals_torch(dtype: torch.dtype) -> None:
    x, residual, affine = (torch.randn(7, 40).to(device=DEVICE, dtype=dtype) for _ in range(3))
    norm = Norm(affine[0], affine[1], 1e-5)
    ours = CudaOps(dtype, DEVICE).add_norm(x, residual, norm)
    _assert_close(
        ours, TorchOps().add_norm(x.cpu().float(), residual.cpu().float(), _exact(norm)), dtype
    )


def test_attention_by_starts_equals_attention_by_runs(backbone: Backbone) -> None:
    encodings = InputEncoder(backbone.tokenizer, backbone.config, ["{text}"], 40).encode(TEXTS)
    batch = pack([Item(one, 0) for one in encodings], [_layout()])
    rows = int(batch.spans.key_starts[-1])
    q, k, v = (torch.randn(rows, 32) for _ in range(3))
    for spans, queries in ((batch.spans, q), (batch.read_spans, q[batch.read_rows])):
        expected = TorchOps().attention(queries, k, v, spans, 4)
        torch.testing.assert_close(filled_attention(queries, k, v, spans, 4), expected)


def _layout() -> Any:
    return Plan("cls", LinearHead(torch.zeros(2, 32), torch.zeros(2)), ()).layout


@given(st.lists(st.integers(1, 400), min_size=1, max_size=70), st.sampled_from([16, 32, 64, 128]))
def test_tiles_hold_every_row_once_and_no_two_segments(sizes: list[int], tile_rows: int) -> None:
    tiles = tiles_of(np.array(sizes), tile_rows)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    seen = np.concatenate([np.arange(first, end) for _, first, end in tiles])
    assert np.array_equal(seen, np.arange(sum(sizes)))
    for segment, first, end in tiles:
        assert 0 < end - first <= tile_rows
        assert set(owner[first:end]) == {segment}


@pytest.mark.parametrize(("sizes", "rows"), [([4096], 128), ([64] * 64, 64), ([9] * 300, 16)])
def test_tiles_suit_the_segments(sizes: list[int], rows: Literal[128, 64, 16]) -> None:
    assert tile_rows_for(np.array(sizes)) == rows


def test_a_slice_and_a_list_of_all_neurons_are_the_same() -> None:
    ops = CudaOps(torch.float32, DEVICE, graphs=False)
    network = _random_ffns(ops, [(70, False, False, 0)], "gelu", 0)[0]
    ffn = network.ffn[0]
    whole = _Task((Ffn(Linear(ffn.inner.weight, ffn.inner.bias, "gelu"), ffn.outer),))
    x = torch.randn(20, 40).to(DEVICE)
    listed, plain = (ops.ffn(0, x, ops.group([slice(0, 20)], [one])) for one in (network, whole))
    assert torch.equal(listed, plain)
