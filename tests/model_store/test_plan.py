"""What a task changes in its layers: merged, beside frozen weights and by hand, all alike."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_store.backbone import Backbone, EncoderConfig
from model_store.encoder import Encoder
from model_store.ops import TorchOps
from model_store.packing import Item, Read, pack
from model_store.plan import Gate, LinearHead, Part, Plan, beside, owns_layers
from model_store.tokenization import Encoding, InputEncoder
from tests.overlays import PARTS, fp32_encoder, random_changes, small_backbone

TEXTS = ["the cat is good", "a", "what is the new red film on my big bank card ?", "lost money"]
FAMILIES = ("bert", "roberta", "distilbert")
ATTENTION = ("q", "k", "v")

KINDS: dict[str, dict[str, object]] = {
    "heads": {"heads": (2, 1, 3)},
    "scales": {"scales": True},
    "norms": {"norms": True},
    "qkv": {"parts": ATTENTION},
    "o": {"parts": ("o",)},
    "ffn_in": {"parts": ("ffn_in",)},
    "ffn_out": {"parts": ("ffn_out",)},
    "all": {"heads": (3, 2, 1), "scales": True, "norms": True, "parts": PARTS},
}


@dataclasses.dataclass(frozen=True)
class Task:
    """What a plan is made of, before it is made."""

    read: Read
    head: LinearHead
    neurons: tuple[Tensor, ...]
    heads: tuple[Tensor, ...] | None
    changes: Mapping[str, Tensor]
    prompt: Tensor | None

    @property
    def owns_layers(self) -> bool:
        return self.heads is not None or owns_layers(self.changes)


def _task(
    config: EncoderConfig,
    *,
    seed: int = 0,
    read: Read = "cls",
    prompt: int = 0,
    neurons: Sequence[int] = (20, 31, 24),
    heads: Sequence[int] | None = None,
    rank: int = 2,
    scales: bool = False,
    norms: bool = False,
    parts: Sequence[str] = (),
) -> Task:
    """Random; `neurons` and `heads` are how many each layer keeps."""
    generator = torch.Generator().manual_seed(seed)

    def some(width: int, counts: Sequence[int]) -> tuple[Tensor, ...]:
        return tuple(
            torch.randperm(width, generator=generator)[:count].sort().values.int()
            for count in counts[: config.layers]
        )

    kept = some(config.ffn, neurons)
    kept_heads = None if heads is None else some(config.heads, heads)
    vectors = torch.randn(prompt, config.embedding, generator=generator) if prompt else None
    weight = torch.randn(3, config.hidden, generator=generator) / config.hidden**0.5
    changes = random_changes(
        config,
        kept,
        kept_heads,
        generator,
        scales=scales,
        norms=norms,
        delta_rank=rank if parts else 0,
        parts=parts,
    )
    return Task(read, LinearHead(weight, torch.zeros(3)), kept, kept_heads, changes, vectors)


def _cut(encoder: Encoder, task: Task, changes: Mapping[str, Tensor]) -> Plan:
    """The task's plan with `changes` merged in; its prompt is not cached."""
    layers = None
    if task.owns_layers:
        layers = tuple(
            encoder.layer(number, None if task.heads is None else task.heads[number], changes)
            for number in range(encoder.config.layers)
        )
    ffn = tuple(encoder.ffn(number, rows, changes) for number, rows in enumerate(task.neurons))
    return Plan(task.read, task.head, ffn, task.prompt, layers=layers)


def _merged(encoder: Encoder, task: Task, *, cached: bool = False) -> Plan:
    plan = _cut(encoder, task, task.changes)
    if not cached or plan.prompt is None:
        return plan
    first = None if plan.layers is None else plan.layers[0]
    return dataclasses.replace(plan, prompt_cache=encoder.prompt_cache(plan.prompt, first))


def _beside(encoder: Encoder, task: Task) -> Plan:
    return beside(_cut(encoder, task, {}), _held(task.changes))


def _held(changes: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """As tuning holds them: in fp32, also what an artifact has in bf16."""
    return {name: tensor.float() for name, tensor in changes.items()}


def _by_hand(
    config: EncoderConfig, tensors: Mapping[str, Tensor], task: Task
) -> Mapping[str, Tensor]:
    """A whole backbone with the task's changes written into its weights, and zeros where it cuts.

    A neuron without its row of `ffn_out`, and a head without its columns of `attention_out`, add
    nothing to the layer.
    """
    result = {name: tensor.clone() for name, tensor in tensors.items()}
    width = config.hidden // config.heads
    for number in range(config.layers):
        layer = f"layers.{number}"
        heads = range(config.heads) if task.heads is None else task.heads[number].tolist()
        attended = [head * width + place for head in heads for place in range(width)]
        neurons = task.neurons[number].tolist()
        for side, part in enumerate(ATTENTION):
            rows = [side * config.hidden + place for place in attended]
            result[f"{layer}.qkv.weight"][rows] += _delta(task, f"{number}.{part}")
        out = torch.zeros(config.hidden, config.hidden)
        out[:, attended] = tensors[f"{layer}.attention_out.weight"][:, attended]
        out[:, attended] += _delta(task, f"{number}.o")
        result[f"{layer}.attention_out.weight"] = out
        result[f"{layer}.ffn_in.weight"][neurons] += _delta(task, f"{number}.ffn_in")
        result[f"{layer}.ffn_out.weight"][neurons] += _delta(task, f"{number}.ffn_out").t()
        scales = task.changes.get(f"ffn.{number}.scale", torch.ones(len(neurons)))
        for neuron, scale in zip(neurons, scales, strict=True):
            result[f"{layer}.ffn_out.weight"][neuron] *= scale
        removed = sorted(set(range(config.ffn)) - set(neurons))
        result[f"{layer}.ffn_out.weight"][removed] = 0
        result[f"{layer}.ffn_out.bias"] += task.changes.get(f"ffn.{number}.bias", torch.zeros(1))
        for norm in ("attention", "ffn"):
            for part in ("weight", "bias"):
                own = task.changes.get(f"norm.{number}.{norm}.{part}")
                if own is not None:
                    result[f"{layer}.{norm}_norm.{part}"] = own
    return result


def _delta(task: Task, name: str) -> Tensor:
    down = task.changes.get(f"delta.{name}.down")
    if down is None:
        return torch.zeros(1, 1)
    return task.changes[f"delta.{name}.up"].float() @ down.float()


def _encode(backbone: Backbone, texts: Sequence[str] = TEXTS) -> list[Encoding]:
    return InputEncoder(backbone.tokenizer, backbone.config, ["{text}"], 32).encode(texts)


def _logits(encoder: Encoder, plan: Plan, encodings: Sequence[Encoding]) -> Tensor:
    batch = pack([Item(item, 0) for item in encodings], [plan.layout])
    return encoder.forward(batch, [plan])[0]


def _expected(backbone: Backbone, task: Task) -> Tensor:
    """The plain encoder on the backbone made by hand: shared layers, all neurons, no cache."""
    changed = _by_hand(backbone.config, backbone.tensors, task)
    encoder = Encoder(backbone.config, changed, TorchOps())
    ffn = tuple(encoder.ffn(number) for number in range(backbone.config.layers))
    plan = Plan(task.read, task.head, ffn, task.prompt)
    return _logits(encoder, plan, _encode(backbone))


def _assert_alike(backbone: Backbone, task: Task) -> None:
    """Merged, merged with the prompt cached, and beside: all as by hand."""
    encoder = fp32_encoder(backbone)
    expected = _expected(backbone, task)
    plans = {
        "merged": _merged(encoder, task),
        "cached": _merged(encoder, task, cached=True),
        "beside": _beside(encoder, task),
    }
    for name, plan in plans.items():
        difference = (_logits(encoder, plan, _encode(backbone)) - expected).abs().max()
        assert difference < 1e-5, f"{name} differs by {float(difference):.1e}"


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return small_backbone(tmp_path_factory.mktemp(request.param), request.param)[1]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return small_backbone(tmp_path_factory.mktemp("bert"))[1]


@pytest.mark.parametrize("prompt", [0, 3])
@pytest.mark.parametrize("read", ["cls", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_change_is_the_one_made_by_hand(
    backbone: Backbone, kind: str, read: Read, prompt: int
) -> None:
    task = _task(backbone.config, read=read, prompt=prompt, **KINDS[kind])  # type: ignore[arg-type]
    _assert_alike(backbone, task)
    without = dataclasses.replace(task, changes={}, heads=None)
    difference = _expected(backbone, task) - _expected(backbone, without)
    assert difference.abs().max() > 1e-2, "the change must show in the answers"


@pytest.mark.parametrize("prompt", [0, 3])
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_layer_may_keep_no_head_and_no_neuron(
    backbone: Backbone, empty: int, prompt: int
) -> None:
    neurons, heads = [20, 31, 24], [2, 3, 1]
    neurons[empty] = heads[empty] = 0
    shape = {"neurons": neurons, "heads": heads, "prompt": prompt}
    _assert_alike(backbone, _task(backbone.config, **shape))  # type: ignore[arg-type]
    changed = _task(backbone.config, **shape, scales=True, norms=True, parts=PARTS)  # type: ignore[arg-type]
    _assert_alike(backbone, changed)
    # As recovery leaves them: the maps without inputs or outputs have no delta.
    there = {
        name: tensor
        for name, tensor in changed.changes.items()
        if not (name.startswith(f"delta.{empty}.") and name.split(".")[2] in PARTS)
    }
    _assert_alike(backbone, dataclasses.replace(changed, changes=there))


def test_a_network_without_any_head_or_neuron_still_answers(bert: Backbone) -> None:
    _assert_alike(bert, _task(bert.config, neurons=(0, 0, 0), heads=(0, 0, 0), prompt=2))


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("prompt", [0, 3])
def test_a_one_layer_encoder(tmp_path: Path, prompt: int, heads: int) -> None:
    backbone = small_backbone(tmp_path, num_hidden_layers=1)[1]
    for read in ("cls", "mean"):
        task = _task(
            backbone.config,
            read=read,
            prompt=prompt,
            heads=(heads,),
            scales=True,
            norms=True,
            parts=PARTS,
        )
        _assert_alike(backbone, task)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    read=st.sampled_from(["cls", "mean"]),
    prompt=st.integers(0, 3),
    neurons=st.tuples(*[st.integers(0, 48)] * 3),
    heads=st.none() | st.tuples(*[st.integers(0, 4)] * 3),
    rank=st.integers(1, 3),
    scales=st.booleans(),
    norms=st.booleans(),
    parts=st.sets(st.sampled_from([ATTENTION, ("o",), ("ffn_in",), ("ffn_out",)])),
)
def test_merged_and_beside_are_alike_whatever_is_changed(
    bert: Backbone,
    seed: int,
    read: Read,
    prompt: int,
    neurons: tuple[int, ...],
    heads: tuple[int, ...] | None,
    rank: int,
    scales: bool,
    norms: bool,
    parts: set[tuple[str, ...]],
) -> None:
    task = _task(
        bert.config,
        seed=seed,
        read=read,
        prompt=prompt,
        neurons=neurons,
        heads=heads,
        rank=rank,
        scales=scales,
        norms=norms,
        parts=[part for group in parts for part in group],
    )
    _assert_alike(bert, task)


def _mask_gate(config: EncoderConfig, task: Task) -> Gate:
    """Zeros where the task keeps nothing, ones elsewhere."""
    assert task.heads is not None
    masks: dict[tuple[int, Part], Tensor] = {}
    for number, (neurons, heads) in enumerate(zip(task.neurons, task.heads, strict=True)):
        width = config.hidden // config.heads
        masks[number, "ffn_in"] = torch.zeros(config.ffn).index_fill(0, neurons.long(), 1)
        kept = torch.zeros(config.heads).index_fill(0, heads.long(), 1)
        masks[number, "heads"] = kept.repeat_interleave(width)

    def gate(layer: int, part: Part, x: Tensor) -> Tensor:
        return x * masks[layer, part] if (layer, part) in masks else x

    return gate


@pytest.mark.parametrize("heads", [(2, 1, 3), (0, 4, 2), (3, 0, 0)])
def test_cut_away_equals_a_gate_of_zeros(backbone: Backbone, heads: tuple[int, ...]) -> None:
    task = _task(backbone.config, read="mean", prompt=3, heads=heads)
    encoder = fp32_encoder(backbone)
    cut = _logits(encoder, _merged(encoder, task, cached=True), _encode(backbone))
    ffn = tuple(encoder.ffn(number) for number in range(backbone.config.layers))
    gate = _mask_gate(backbone.config, task)
    whole = Plan(task.read, task.head, ffn, task.prompt, gate=gate)
    gated = _logits(encoder, whole, _encode(backbone))
    torch.testing.assert_close(cut, gated, atol=1e-5, rtol=1e-5)


def test_a_gate_sees_what_is_kept_alone(bert: Backbone) -> None:
    task = _task(bert.config, neurons=(20, 31, 24), heads=(2, 1, 3))
    seen: dict[tuple[int, str], int] = {}

    def gate(layer: int, part: Part, x: Tensor) -> Tensor:
        seen[layer, part] = x.shape[1]
        return x

    encoder = fp32_encoder(bert)
    plan = dataclasses.replace(_merged(encoder, task), gate=gate)
    _logits(encoder, plan, _encode(bert))
    for layer, (neurons, heads) in enumerate([(20, 2), (31, 1), (24, 3)]):
        width = heads * bert.config.hidden // bert.config.heads
        expected = dict.fromkeys(("q", "k", "v", "heads"), width)
        expected |= {"o": 32, "ffn_in": neurons, "ffn_out": 32}
        assert {part: seen[layer, part] for part in expected} == expected
    assert len(seen) == 3 * 7


def _double(task: Task) -> Task:
    """In fp64, with gradients: finite differences of it are exact enough to compare with."""
    changes = {name: tensor.double().requires_grad_() for name, tensor in task.changes.items()}
    return dataclasses.replace(task, changes=changes)


def test_gradients_are_those_of_finite_differences(backbone: Backbone) -> None:
    task = _double(
        _task(backbone.config, prompt=2, heads=(2, 3, 1), scales=True, norms=True, parts=PARTS)
    )
    encoder = Encoder(backbone.config, backbone.tensors, TorchOps(torch.float64))
    frozen = _cut(encoder, task, {})
    batch = pack([Item(item, 0) for item in _encode(backbone)], [frozen.layout])
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(1, backbone.config.hidden, generator=generator).double()

    def value(changes: Mapping[str, Tensor]) -> Tensor:
        return (encoder.hidden_states(batch, [beside(frozen, changes)]) * weights).sum()

    value(task.changes).backward()  # type: ignore[no-untyped-call]
    step = 1e-5
    for name, tensor in task.changes.items():
        assert tensor.grad is not None, name
        entry = int(tensor.grad.abs().argmax())
        found = []
        for change in (step, -step):
            moved = tensor.detach().clone()
            moved.view(-1)[entry] += change
            found.append(value({**task.changes, name: moved}).detach())
        numeric = (found[0] - found[1]) / (2 * step)
        gradient = tensor.grad.view(-1)[entry]
        torch.testing.assert_close(gradient, numeric, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("read", ["cls", "mean"])
def test_every_change_gets_a_gradient_from_the_answers(bert: Backbone, read: Read) -> None:
    task = _double(_task(bert.config, read=read, prompt=2, scales=True, norms=True, parts=PARTS))
    encoder = fp32_encoder(bert)
    logits = _logits(encoder, _beside(encoder, task), _encode(bert))
    logits.softmax(dim=1)[:, 1].sum().backward()  # type: ignore[no-untyped-call]
    for name, tensor in task.changes.items():
        assert tensor.grad is not None, name
        assert tensor.grad.abs().max() > 0, name


def test_a_delta_beside_starts_as_nothing_and_can_still_learn(bert: Backbone) -> None:
    """As LoRA begins: `up` is zero, so the answers are the old ones, and has a gradient."""
    task = _task(bert.config, parts=PARTS)
    changes = {
        name: (tensor * 0 if name.endswith(".up") else tensor).float().requires_grad_()
        for name, tensor in task.changes.items()
    }
    encoder = fp32_encoder(bert)
    frozen = _cut(encoder, task, {})
    before = _logits(encoder, frozen, _encode(bert))
    after = _logits(encoder, beside(frozen, changes), _encode(bert))
    torch.testing.assert_close(after, before)
    after.softmax(dim=1)[:, 1].sum().backward()  # type: ignore[no-untyped-call]
    ups = [tensor.grad for name, tensor in changes.items() if name.endswith(".up")]
    assert all(grad is not None and grad.abs().max() > 0 for grad in ups)


def test_merging_leaves_the_backbone_as_it_was(bert: Backbone) -> None:
    encoder = fp32_encoder(bert)
    before = {name: tensor.clone() for name, tensor in encoder.tensors.items()}
    task = _task(bert.config, prompt=2, scales=True, norms=True, parts=PARTS)
    _logits(encoder, _merged(encoder, task, cached=True), _encode(bert))
    assert all(torch.equal(encoder.tensors[name], tensor) for name, tensor in before.items())


def test_a_prompt_cached_before_the_change_is_not_used(bert: Backbone) -> None:
    encoder = fp32_encoder(bert)
    task = _task(bert.config, prompt=3, parts=PARTS)
    frozen = _cut(encoder, task, {})
    assert frozen.prompt is not None
    assert frozen.layers is not None
    cache = encoder.prompt_cache(frozen.prompt, frozen.layers[0])
    changed = beside(dataclasses.replace(frozen, prompt_cache=cache), _held(task.changes))
    torch.testing.assert_close(
        _logits(encoder, changed, _encode(bert)),
        _logits(encoder, _beside(encoder, task), _encode(bert)),
    )


def test_changes_of_attention_need_layers_of_their_own(bert: Backbone) -> None:
    encoder = fp32_encoder(bert)
    task = _task(bert.config, norms=True)
    shared = dataclasses.replace(_cut(encoder, task, {}), layers=None)
    with pytest.raises(AssertionError, match="layers"):
        beside(shared, task.changes)


def test_a_plan_with_its_own_layers_is_alone_in_its_batch(bert: Backbone) -> None:
    encoder = fp32_encoder(bert)
    plans = [_merged(encoder, _task(bert.config, heads=heads)) for heads in (None, (2, 2, 2))]
    items = [Item(item, number) for number, item in enumerate(_encode(bert, TEXTS[:2]))]
    batch = pack(items, [plan.layout for plan in plans])
    for order in (plans, plans[::-1]):
        with pytest.raises(AssertionError, match="share their layers"):
            encoder.forward(batch, order)


@pytest.mark.parametrize(
    ("name", "owns"),
    [
        ("delta.0.q.down", True),
        ("delta.11.o.up", True),
        ("norm.3.ffn.weight", True),
        ("norm.3.attention.bias", True),
        ("delta.0.ffn_in.down", False),
        ("delta.0.ffn_out.up", False),
        ("ffn.0.scale", False),
        ("ffn.0.bias", False),
    ],
)
def test_what_reaches_further_than_the_ffn_owns_layers(name: str, owns: bool) -> None:
    assert owns_layers({name: torch.zeros(1)}) is owns
    assert owns_layers({name: torch.zeros(1), "prompt": torch.zeros(1)}) is owns
