"""Scores against their definition: gate gradients, finite differences, and plain loops."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import pytest
import torch

from localization.attribution import row_scores, score_units
from localization.config import AttributionConfig
from localization.network import Examples, Network, Tuned, start
from model_store.backbone import Backbone
from model_store.encoder import Encoder
from model_store.ops import TorchOps
from model_store.packing import Item, Read, pack
from model_store.plan import Part
from model_store.store import Store
from model_store.tokenization import Encoding, InputEncoder
from tests.reference import neuron_gate


def score_neurons(
    network: Network, tuned: Tuned, examples: Examples, config: AttributionConfig, seed: int = 0
) -> torch.Tensor:
    found = score_units(network, tuned, examples, config, ["ffn_in"], seed, lambda *_: None)
    return found["ffn_in"]


TEXTS = ["the film was good", "a", "what is the new bank card ?"]


@pytest.fixture(params=["cls", "mean"])
def setup(
    request: pytest.FixtureRequest, tiny: tuple[Store, Backbone]
) -> tuple[Network, Tuned, Examples]:
    read: Read = request.param
    backbone = tiny[1]
    network = Network(Encoder(backbone.config, backbone.tensors, TorchOps()), read, None)
    begun = start(network, 2, 3, seed=0)
    weight = torch.randn(2, backbone.config.hidden, generator=torch.Generator().manual_seed(1))
    tuned = Tuned({**begun.tensors, "head.weight": weight})
    encodings = InputEncoder(backbone.tokenizer, backbone.config, ["{text}"], 32).encode(TEXTS)
    return network, tuned, Examples(encodings, torch.tensor([0, 1, 1]))


def _gate_gradients(network: Network, tuned: Tuned, examples: Examples) -> torch.Tensor:
    """dP(y|x)/dg per row, layer and neuron, one row at a time: `[B, L, F]`."""
    config = network.encoder.config
    result = []
    for encoding, label in zip(examples.encodings, examples.classes, strict=True):
        gates = tuple(torch.ones(config.ffn, requires_grad=True) for _ in range(config.layers))
        plan = dataclasses.replace(network.plan(tuned), gate=neuron_gate(gates))
        logits = network.encoder.forward(pack([Item(encoding, 0)], [plan.layout]), [plan])[0]
        probability = logits.softmax(dim=1)[0, label]
        result.append(torch.stack(torch.autograd.grad(probability, gates)))
    return torch.stack(result)


def test_signed_sums_over_tokens_are_the_gate_gradients(
    setup: tuple[Network, Tuned, Examples],
) -> None:
    network, tuned, examples = setup
    config = AttributionConfig(tokens="sum", signed=True, rows=3)
    scores = score_neurons(network, tuned, examples, config)
    expected = _gate_gradients(network, tuned, examples).sum(dim=0)
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-4)


def test_reductions_over_tokens_agree_with_one_another(
    setup: tuple[Network, Tuned, Examples],
) -> None:
    network, tuned, examples = setup
    parts = {
        kind: row_scores(network, tuned, examples, range(3), AttributionConfig(tokens=kind))[
            "ffn_in"
        ]
        for kind in ("sum", "mean", "max")
    }
    for total, mean, largest in zip(parts["sum"], parts["mean"], parts["max"], strict=True):
        assert bool((largest <= total + 1e-9).all())
        assert bool((mean <= largest + 1e-9).all())
        assert bool((total >= 0).all())


@pytest.mark.parametrize("setup", ["cls"], indirect=True)
def test_attribution_is_activation_times_gradient(setup: tuple[Network, Tuned, Examples]) -> None:
    """With one token read and one row, the last layer has one row: nothing is reduced."""
    network, tuned, examples = setup
    scores = {
        kind: row_scores(network, tuned, examples, [0], AttributionConfig(score=kind, signed=True))[
            "ffn_in"
        ][-1]
        for kind in ("attribution", "activation", "gradient")
    }
    torch.testing.assert_close(scores["attribution"], scores["activation"] * scores["gradient"])
    assert float(scores["attribution"].abs().sum()) > 0


def test_only_the_wanted_number_of_rows_counts(setup: tuple[Network, Tuned, Examples]) -> None:
    network, tuned, examples = setup
    two = Examples(examples.encodings[:2], examples.classes[:2])
    few = AttributionConfig(rows=2)
    torch.testing.assert_close(
        score_neurons(network, tuned, examples, few),
        score_neurons(network, tuned, two, AttributionConfig()),
    )


def test_random_scores_depend_on_the_seed_alone(setup: tuple[Network, Tuned, Examples]) -> None:
    network, tuned, examples = setup
    config = AttributionConfig(score="random")
    first, second, other = (
        score_neurons(network, tuned, examples, config, seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def _head_gradients(network: Network, tuned: Tuned, examples: Examples, loss: bool) -> torch.Tensor:
    """d/dg of P(y|x), or of the loss, summed over rows, for a gate g on each head: `[L, A]`."""
    config = network.encoder.config
    gates = torch.ones(config.layers, config.heads, requires_grad=True)

    def gate(layer: int, part: Part, x: torch.Tensor) -> torch.Tensor:
        if part != "heads":
            return x
        return (x.view(len(x), config.heads, -1) * gates[layer][:, None]).flatten(1)

    plan = dataclasses.replace(network.plan(tuned), gate=gate)
    total = torch.zeros(())
    for encoding, label in zip(examples.encodings, examples.classes, strict=True):
        logits = network.encoder.forward(pack([Item(encoding, 0)], [plan.layout]), [plan])[0]
        share = logits.softmax(dim=1)[0, label]
        total = total - share.log() if loss else total + share
    return torch.autograd.grad(total, gates)[0]


@pytest.mark.parametrize(("score", "loss"), [("attribution", False), ("taylor", True)])
def test_signed_sums_of_heads_are_their_gate_gradients(
    setup: tuple[Network, Tuned, Examples], score: Literal["attribution", "taylor"], loss: bool
) -> None:
    network, tuned, examples = setup
    config = AttributionConfig(score=score, signed=True, rows=3)
    found = score_units(network, tuned, examples, config, ["heads"], 0, lambda *_: None)["heads"]
    expected = _head_gradients(network, tuned, examples, loss)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_fisher_is_the_square_of_each_rows_gate_gradient(
    setup: tuple[Network, Tuned, Examples],
) -> None:
    network, tuned, examples = setup
    config = AttributionConfig(score="fisher", rows=3)
    found = score_units(network, tuned, examples, config, ["heads"], 0, lambda *_: None)["heads"]
    rows = [Examples([one], cls[None]) for one, cls in zip(*_columns(examples), strict=True)]
    expected = sum(_head_gradients(network, tuned, row, True).square() for row in rows)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-3)


def _columns(examples: Examples) -> tuple[Sequence[Encoding], torch.Tensor]:
    return examples.encodings, examples.classes


def test_magnitude_needs_no_rows_and_every_part_has_its_width(
    setup: tuple[Network, Tuned, Examples],
) -> None:
    network, tuned, examples = setup
    parts: list[Part] = ["ffn_in", "heads", "q", "k", "v", "o", "ffn_out"]
    config = network.encoder.config
    widths = [config.ffn, config.heads, *[config.hidden] * 5]
    for score in ("magnitude", "attribution", "random"):
        settings = AttributionConfig(score=score, rows=3)
        found = score_units(network, tuned, examples, settings, parts, 0, lambda *_: None)
        for part, width in zip(parts, widths, strict=True):
            assert found[part].shape == (config.layers, width)
            assert bool((found[part] >= 0).all())
    name = "layers.1.ffn_in.weight"
    by_hand = network.encoder.tensors[name][5].norm()
    by_hand = by_hand * network.encoder.tensors["layers.1.ffn_out.weight"][5].norm()
    magnitudes = score_units(
        network, tuned, examples, AttributionConfig(score="magnitude"), parts, 0, lambda *_: None
    )
    torch.testing.assert_close(magnitudes["ffn_in"][1, 5], by_hand)
