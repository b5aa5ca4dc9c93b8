"""The forward against `transformers`, and each of its savings against the plain computation."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_store.backbone import Backbone, import_checkpoint, load_backbone
from model_store.encoder import Encoder
from model_store.ops import TorchOps
from model_store.packing import Item, Layout, Read, pack
from model_store.plan import LinearHead, Plan
from model_store.store import Store
from model_store.tokenization import Encoding, InputEncoder
from tests.reference import (
    FAMILIES,
    Checkpoint,
    neuron_gate,
    small_checkpoint,
    transformers_hidden,
    transformers_mlm,
    unpacked,
)

SINGLE = ["the cat is good", "a", "what is the new red film on my big bank card ?", "lost money"]
PAIR = [("the cat", "is it a dog ?"), ("who was in the game", "a"), ("money", "new new new news")]


@dataclasses.dataclass(frozen=True)
class Model:
    checkpoint: Checkpoint
    backbone: Backbone
    encoder: Encoder

    def encode(self, inputs: Sequence[str] | Sequence[tuple[str, str]]) -> list[Encoding]:
        template = ["{text}"] if isinstance(inputs[0], str) else ["{text1}", "{text2}"]
        config = self.backbone.config
        return InputEncoder(self.backbone.tokenizer, config, template, config.max_tokens).encode(
            inputs
        )


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return _model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return _model(tmp_path_factory.mktemp("bert"), "bert")


def _model(folder: Path, family: str) -> Model:
    checkpoint = small_checkpoint(folder / "checkpoint", family)
    store = Store(folder / "store")
    info = import_checkpoint(str(checkpoint.folder), store)
    backbone = load_backbone(store.backbone_path(info.fingerprint))
    return Model(checkpoint, backbone, Encoder(backbone.config, backbone.tensors, TorchOps()))


def _plan(
    model: Model,
    *,
    read: Read = "cls",
    prompt: int = 0,
    kept: Sequence[Tensor] | None = None,
    classes: int = 3,
    seed: int = 0,
) -> Plan:
    generator = torch.Generator().manual_seed(seed)
    config = model.backbone.config
    head = LinearHead(
        torch.randn(classes, config.hidden, generator=generator),
        torch.randn(classes, generator=generator),
    )
    ffn = tuple(
        model.encoder.ffn(layer, None if kept is None else kept[layer])
        for layer in range(config.layers)
    )
    vectors = torch.randn(prompt, config.embedding, generator=generator) if prompt else None
    return Plan(read, head, ffn, vectors)


def _random_kept(model: Model, share: float, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = model.backbone.config.ffn
    return [
        (torch.rand(width, generator=generator) < share).nonzero()[:, 0]
        for _ in range(model.backbone.config.layers)
    ]


def _forward(model: Model, groups: Sequence[tuple[Plan, Sequence[Encoding]]]) -> list[Tensor]:
    """Logits per group, each in the group's own order."""
    items = [Item(item, number) for number, (_, group) in enumerate(groups) for item in group]
    plans = [plan for plan, _ in groups]
    batch = pack(items, [plan.layout for plan in plans])
    packed = torch.cat(model.encoder.forward(batch, plans))
    ordered = torch.empty_like(packed)
    ordered[list(batch.order)] = packed
    return list(torch.split(ordered, [len(group) for _, group in groups]))


@pytest.mark.parametrize("inputs", [SINGLE, PAIR], ids=["single", "pair"])
@pytest.mark.parametrize("prompt", [0, 5])
def test_hidden_states_equal_transformers(model: Model, inputs: Sequence[str], prompt: int) -> None:
    encodings = model.encode(inputs)
    plan = _plan(model, prompt=prompt)
    batch = pack([Item(encoding, 0) for encoding in encodings], [plan.layout])
    with torch.no_grad():
        ours = unpacked(model.encoder.hidden_states(batch, [plan]), batch)
        theirs = transformers_hidden(model.checkpoint.model, encodings, plan.prompt)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)


def test_hidden_states_equal_transformers_at_the_longest_length(model: Model) -> None:
    longest = model.backbone.config.max_tokens
    encodings = model.encode(["the cat " * 200, "a dog"])
    assert len(encodings[0].token_ids) == longest
    plan = _plan(model)
    batch = pack([Item(encoding, 0) for encoding in encodings], [plan.layout])
    with torch.no_grad():
        ours = unpacked(model.encoder.hidden_states(batch, [plan]), batch)
        theirs = transformers_hidden(model.checkpoint.model, encodings)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)


def test_mlm_logits_equal_transformers(model: Model) -> None:
    hidden = torch.randn(5, model.backbone.config.hidden)
    with torch.no_grad():
        ours = model.encoder.mlm_logits(hidden)
        theirs = transformers_mlm(model.checkpoint.model, hidden)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_verbalizer_computes_its_labels_rows_of_the_mlm_logits(model: Model) -> None:
    tokens = torch.tensor([7, 30, 9])
    encoder = InputEncoder(
        model.backbone.tokenizer, model.backbone.config, ["{text} is {mask} ."], 60
    )
    encodings = encoder.encode(SINGLE)
    plan = dataclasses.replace(
        _plan(model, read="mask", prompt=4), head=model.encoder.verbalizer(tokens)
    )
    (logits,) = _forward(model, [(plan, encodings)])
    hidden = transformers_hidden(model.checkpoint.model, encodings, plan.prompt)
    rows = torch.stack(
        [state[item.mask + 4] for state, item in zip(hidden, encodings, strict=True)]
    )
    expected = transformers_mlm(model.checkpoint.model, rows)[:, tokens]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prompt", [0, 4])
@pytest.mark.parametrize("read", ["cls", "mean"])
def test_last_layer_at_the_read_rows_alone_changes_nothing(
    model: Model, read: Read, prompt: int
) -> None:
    plan = _plan(model, read=read, prompt=prompt, kept=_random_kept(model, 0.5, 1))
    encodings = model.encode(SINGLE)
    (logits,) = _forward(model, [(plan, encodings)])
    batch = pack([Item(encoding, 0) for encoding in encodings], [plan.layout])
    states = unpacked(model.encoder.hidden_states(batch, [plan]), batch)
    assert isinstance(plan.head, LinearHead)
    for row, state in enumerate(states):
        text = torch.cat([state[:1], state[1 + prompt :]])
        vector = text[0] if read == "cls" else text.mean(dim=0)
        expected = plan.head.weight @ vector + plan.head.bias
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)


def test_cached_prompt_changes_nothing(model: Model) -> None:
    plan = _plan(model, prompt=6)
    assert plan.prompt is not None
    cached = dataclasses.replace(plan, prompt_cache=model.encoder.prompt_cache(plan.prompt))
    encodings = model.encode(SINGLE)
    plain, fast = _forward(model, [(plan, encodings)]), _forward(model, [(cached, encodings)])
    assert torch.equal(plain[0], fast[0])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_sliced_equals_gated(model: Model, share: float) -> None:
    kept = _random_kept(model, share, 2)
    gates = []
    for rows in kept:
        gate = torch.zeros(model.backbone.config.ffn)
        gate[rows] = 1
        gates.append(gate)
    sliced = _plan(model, read="mean", prompt=3, kept=kept)
    gated = dataclasses.replace(_plan(model, read="mean", prompt=3), gate=neuron_gate(gates))
    encodings = model.encode(SINGLE)
    torch.testing.assert_close(
        _forward(model, [(sliced, encodings)])[0],
        _forward(model, [(gated, encodings)])[0],
        atol=1e-5,
        rtol=1e-5,
    )


def test_gate_gradient_is_the_attribution(bert: Model) -> None:
    """h * dP/dh per neuron, from finite differences of the gate."""
    encodings = bert.encode(SINGLE)
    gates = tuple(torch.ones(bert.backbone.config.ffn, requires_grad=True) for _ in range(3))
    plan = dataclasses.replace(_plan(bert, prompt=2), gate=neuron_gate(gates))
    _forward(bert, [(plan, encodings)])[0].softmax(dim=1)[:, 1].sum().backward()  # type: ignore[no-untyped-call]
    step = 1e-2
    for neuron in (0, 13, 47):
        values = []
        for change in (step, -step):
            moved = [gate.detach().clone() for gate in gates]
            moved[1][neuron] += change
            other = dataclasses.replace(plan, gate=neuron_gate(moved))
            values.append(_forward(bert, [(other, encodings)])[0].softmax(dim=1)[:, 1].sum())
        numeric = (values[0] - values[1]) / (2 * step)
        gradient = gates[1].grad
        assert gradient is not None
        torch.testing.assert_close(gradient[neuron], numeric, atol=2e-4, rtol=2e-2)


def test_gradients_equal_transformers(model: Model) -> None:
    encodings = model.encode(SINGLE)
    start = torch.randn(4, model.backbone.config.embedding)
    weights = [
        torch.randn(len(item.token_ids) + 4, model.backbone.config.hidden) for item in encodings
    ]
    ours = start.clone().requires_grad_()
    plan = dataclasses.replace(_plan(model, prompt=4), prompt=ours)
    batch = pack([Item(encoding, 0) for encoding in encodings], [plan.layout])
    states = unpacked(model.encoder.hidden_states(batch, [plan]), batch)
    sum((state * weight).sum() for state, weight in zip(states, weights, strict=True)).backward()  # type: ignore[union-attr]
    theirs = start.clone().requires_grad_()
    hidden = transformers_hidden(model.checkpoint.model, encodings, theirs)
    sum((state * weight).sum() for state, weight in zip(hidden, weights, strict=True)).backward()  # type: ignore[union-attr]
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-3, rtol=1e-4)


@settings(deadline=None, max_examples=25)
@given(
    tasks=st.lists(
        st.tuples(
            st.sampled_from(["cls", "mean"]),
            st.integers(0, 4),
            st.lists(st.integers(1, 12), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_an_answer_never_depends_on_who_shares_the_batch(
    bert: Model, tasks: list[tuple[Read, int, list[int]]]
) -> None:
    groups = []
    for number, (read, prompt, lengths) in enumerate(tasks):
        kept = _random_kept(bert, 0.5, number)
        plan = _plan(bert, read=read, prompt=prompt, kept=kept, classes=2 + number, seed=number)
        texts = [" ".join(("the cat is good",) * length) for length in lengths]
        groups.append((plan, bert.encode(texts)))
    items = [Item(item, number) for number, (_, group) in enumerate(groups) for item in group]
    batch = pack(items, [plan.layout for plan, _ in groups])
    mixed = bert.encoder.forward(batch, [plan for plan, _ in groups])
    order = iter(batch.order)
    for (plan, _), logits in zip(groups, mixed, strict=True):
        for row in logits:
            item = items[next(order)]
            alone_batch = pack([Item(item.encoding, 0)], [plan.layout])
            alone = bert.encoder.forward(alone_batch, [plan])[0][0]
            torch.testing.assert_close(row, alone, atol=1e-5, rtol=1e-5)


def test_forward_never_writes_to_its_inputs(bert: Model) -> None:
    plan = _plan(bert, prompt=3, kept=_random_kept(bert, 0.5, 0))
    encodings = bert.encode(SINGLE)
    batch = pack([Item(encoding, 0) for encoding in encodings], [plan.layout])
    first = bert.encoder.forward(batch, [plan])[0]
    second = bert.encoder.forward(batch, [plan])[0]
    assert torch.equal(first, second)


def test_one_layer_encoder_with_a_prompt(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path / "c", "bert", num_hidden_layers=1)
    store = Store(tmp_path / "s")
    info = import_checkpoint(str(checkpoint.folder), store)
    backbone = load_backbone(store.backbone_path(info.fingerprint))
    model = Model(checkpoint, backbone, Encoder(backbone.config, backbone.tensors, TorchOps()))
    plan = _plan(model, prompt=3)
    encodings = model.encode(SINGLE)
    (logits,) = _forward(model, [(plan, encodings)])
    hidden = transformers_hidden(checkpoint.model, encodings, plan.prompt)
    assert isinstance(plan.head, LinearHead)
    expected = torch.stack([state[0] for state in hidden]) @ plan.head.weight.t() + plan.head.bias
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_layout_without_prompt_needs_no_gather(bert: Model) -> None:
    encodings = bert.encode(SINGLE)
    batch = pack([Item(encoding, 0) for encoding in encodings], [Layout(0, "cls")])
    assert batch.source is None
    assert len(batch.token_ids) == sum(len(item.token_ids) for item in encodings)
