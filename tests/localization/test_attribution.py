"""Scores against their definition: gate gradients, finite differences, and plain loops."""

import dataclasses

import pytest
import torch

from localization.attribution import row_scores, score_neurons
from localization.config import AttributionConfig
from localization.tuning import Examples, Network, Tuned, start
from model_store.backbone import Backbone
from model_store.encoder import Encoder
from model_store.ops import TorchOps
from model_store.packing import Item, Read, pack
from model_store.store import Store
from model_store.tokenization import InputEncoder

TEXTS = ["the film was good", "a", "what is the new bank card ?"]


@pytest.fixture(params=["cls", "mean"])
def setup(
    request: pytest.FixtureRequest, tiny: tuple[Store, Backbone]
) -> tuple[Network, Tuned, Examples]:
    read: Read = request.param
    backbone = tiny[1]
    network = Network(Encoder(backbone.config, backbone.tensors, TorchOps()), read, None)
    tuned = dataclasses.replace(
        start(network, 2, 3, seed=0),
        weight=torch.randn(2, backbone.config.hidden, generator=torch.Generator().manual_seed(1)),
    )
    encodings = InputEncoder(backbone.tokenizer, backbone.config, ["{text}"], 32).encode(TEXTS)
    return network, tuned, Examples(encodings, torch.tensor([0, 1, 1]))


def _gate_gradients(network: Network, tuned: Tuned, examples: Examples) -> torch.Tensor:
    """dP(y|x)/dg per row, layer and neuron, one row at a time: `[B, L, F]`."""
    config = network.encoder.config
    result = []
    for encoding, label in zip(examples.encodings, examples.classes, strict=True):
        gates = tuple(torch.ones(config.ffn, requires_grad=True) for _ in range(config.layers))
        plan = dataclasses.replace(network.plan(tuned), gates=gates)
        logits = network.encoder.forward(pack([Item(encoding, 0)], [plan.layout]), [plan])[0]
        probability = logits.softmax(dim=1)[0, label]
        result.append(torch.stack(torch.autograd.grad(probability, gates)))
    return torch.stack(result)


def test_signed_sums_over_tokens_are_the_gate_gradients(
    setup: tuple[Network, Tuned, Examples],
) -> None:
    network, tuned, examples = setup
    config = AttributionConfig(tokens="sum", signed=True, rows=3)
    scores = score_neurons(network, tuned, examples, config, 0, lambda *_: None)
    expected = _gate_gradients(network, tuned, examples).sum(dim=0)
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-4)


def test_reductions_over_tokens_agree_with_one_another(
    setup: tuple[Network, Tuned, Examples],
) -> None:
    network, tuned, examples = setup
    parts = {
        kind: row_scores(network, tuned, examples, range(3), AttributionConfig(tokens=kind))
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
            -1
        ]
        for kind in ("attribution", "activation", "gradient")
    }
    torch.testing.assert_close(scores["attribution"], scores["activation"] * scores["gradient"])
    assert float(scores["attribution"].abs().sum()) > 0


def test_only_the_wanted_number_of_rows_counts(setup: tuple[Network, Tuned, Examples]) -> None:
    network, tuned, examples = setup
    two = Examples(examples.encodings[:2], examples.classes[:2])
    few = AttributionConfig(rows=2)
    torch.testing.assert_close(
        score_neurons(network, tuned, examples, few, 0, lambda *_: None),
        score_neurons(network, tuned, two, AttributionConfig(), 0, lambda *_: None),
    )


def test_random_scores_depend_on_the_seed_alone(setup: tuple[Network, Tuned, Examples]) -> None:
    network, tuned, examples = setup
    config = AttributionConfig(score="random")
    first, second, other = (
        score_neurons(network, tuned, examples, config, seed, lambda *_: None) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
