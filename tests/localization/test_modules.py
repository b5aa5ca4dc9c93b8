"""Pruned modules against weights zeroed by hand, over all modules; counts; tuning behind a gate."""

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from localization.attribution import score_units
from localization.config import AttributionConfig, TuningConfig
from localization.modules import PARTS, GatedNetwork, Module, ModuleGate, module_gate
from localization.network import Examples, Network, Tuned, predict, start
from localization.tuning import tune
from model_store.backbone import Backbone
from model_store.encoder import Encoder
from model_store.ops import TorchOps
from model_store.plan import Gate, Part
from model_store.store import Store
from model_store.tokenization import InputEncoder
from tests.overlays import fp32_encoder

TEXTS = ["the film was good", "a", "what is the new bank card ?", "the cat is lost"]
MODULES = list(PARTS)


@pytest.fixture
def network(tiny: tuple[Store, Backbone]) -> Network:
    return Network(fp32_encoder(tiny[1]), "mean", None)


@pytest.fixture
def examples(tiny: tuple[Store, Backbone]) -> Examples:
    encoder = InputEncoder(tiny[1].tokenizer, tiny[1].config, ["{text}"], 32)
    return Examples(encoder.encode(TEXTS), torch.tensor([0, 1, 1, 0]))


@pytest.fixture
def tuned(network: Network) -> Tuned:
    begin = start(network, 2, 3, seed=0)
    head = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    return Tuned({**begin.tensors, "head.weight": head})


@pytest.fixture
def scores(network: Network, tuned: Tuned, examples: Examples) -> dict[Part, Tensor]:
    return score_units(
        network, tuned, examples, AttributionConfig(), PARTS["all"], 0, lambda *_: None
    )


def _answers(network: Network, tuned: Tuned, examples: Examples, gate: Gate | None) -> Tensor:
    plan = dataclasses.replace(network.plan(tuned), gate=gate)
    return predict(network.encoder, plan, examples.encodings)


def _zeroed(backbone: Backbone, gate: ModuleGate) -> dict[str, Tensor]:
    """The backbone's tensors with every pruned neuron's weights and bias at zero."""
    tensors = {name: tensor.clone() for name, tensor in backbone.tensors.items()}
    hidden = backbone.config.hidden
    for (layer, part), mask in gate.masks.items():
        gone = (mask == 0).nonzero()[:, 0]
        if part in ("q", "k", "v"):
            rows, name = gone + hidden * "qkv".index(part), "qkv"
        else:
            rows, name = gone, {"o": "attention_out"}.get(part, part)
        weight = tensors[f"layers.{layer}.{name}.weight"]
        if part == "ffn_out":  # stored with neurons as rows, so that outputs are columns
            weight[:, rows] = 0
        else:
            weight[rows] = 0
        tensors[f"layers.{layer}.{name}.bias"][rows] = 0
    return tensors


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("module", MODULES)
def test_a_gate_is_the_network_with_zeroed_weights(
    module: Module,
    scope: str,
    network: Network,
    tuned: Tuned,
    examples: Examples,
    scores: Mapping[Part, Tensor],
    tiny: tuple[Store, Backbone],
) -> None:
    gate = module_gate(scores, module, 0.6, "global" if scope == "global" else "layer")
    backbone = tiny[1]
    by_hand = Network(Encoder(backbone.config, _zeroed(backbone, gate), TorchOps()), "mean", None)
    given = _answers(network, tuned, examples, gate)
    torch.testing.assert_close(given, _answers(by_hand, tuned, examples, None))
    assert not torch.allclose(given, _answers(network, tuned, examples, None), atol=1e-4)


@pytest.mark.parametrize("module", MODULES)
def test_keeping_everything_changes_nothing(
    module: Module,
    network: Network,
    tuned: Tuned,
    examples: Examples,
    scores: Mapping[Part, Tensor],
) -> None:
    gate = module_gate(scores, module, 1.0)
    assert gate.pruned == 0.0
    whole = _answers(network, tuned, examples, None)
    assert torch.equal(_answers(network, tuned, examples, gate), whole)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("module", MODULES)
def test_the_share_is_as_asked_and_the_best_are_kept(
    module: Module, keep: float, scores: Mapping[Part, Tensor]
) -> None:
    gate = module_gate(scores, module, keep)
    count = sum(len(mask) for mask in gate.masks.values())
    assert {part for _, part in gate.masks} == set(PARTS[module])
    assert abs((1 - gate.pruned) - keep) <= 1 / count
    kept = torch.cat([scores[p][n][mask == 1] for (n, p), mask in gate.masks.items()])
    gone = torch.cat([scores[p][n][mask == 0] for (n, p), mask in gate.masks.items()])
    if len(kept) and len(gone):
        assert kept.min() >= gone.max()


def test_scope_layer_prunes_every_layer_alike(scores: Mapping[Part, Tensor]) -> None:
    gate = module_gate(scores, "dense", 0.5, "layer")
    per_layer = [
        sum(int(mask.sum()) for (number, _), mask in gate.masks.items() if number == layer)
        for layer in range(3)
    ]
    assert per_layer == [(32 + 48 + 32) // 2] * 3


def test_queries_or_keys_pruned_alone_count_as_both(
    network: Network, tuned: Tuned, examples: Examples
) -> None:
    mask = torch.ones(32)
    mask[::3] = 0
    alone: tuple[Part, ...] = ("q", "k")
    both = ModuleGate({(layer, part): mask for layer in range(3) for part in alone})
    expected = _answers(network, tuned, examples, both)
    for part in alone:
        gate = ModuleGate({(layer, part): mask for layer in range(3)})
        torch.testing.assert_close(_answers(network, tuned, examples, gate), expected)


def test_what_cannot_be_is_refused(scores: Mapping[Part, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"keep 1\.5"):
        module_gate(scores, "ffn", 1.5)
    with pytest.raises(ValueError, match="needs scores of 'q'"):
        module_gate({"ffn_in": scores["ffn_in"]}, "attention", 0.5)


def test_tuning_goes_through_the_gate(
    network: Network, tuned: Tuned, examples: Examples, scores: Mapping[Part, Tensor]
) -> None:
    """With everything pruned but the residuals, two networks that differ inside learn the same."""
    nothing = module_gate(scores, "dense", 0.0)
    config = TuningConfig(head_learning_rate=0.1)
    found = []
    for gate in (nothing, module_gate(scores, "all", 0.0)):
        gated = GatedNetwork(network.encoder, "mean", None, gate)
        result = tune(gated, tuned, None, examples, examples, config, 3, 0, lambda *_: None)
        assert gated.plan(result).gate is gate
        found.append(result.tensors)
    plain = tune(network, tuned, None, examples, examples, config, 3, 0, lambda *_: None)
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name])
    assert not torch.allclose(found[0]["head.weight"], plain.tensors["head.weight"], atol=1e-4)
