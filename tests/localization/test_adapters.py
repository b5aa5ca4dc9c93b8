"""Deltas, scales and norms: how they start, are cut, joined and lose rank."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localization.adapters import (
    cut,
    joined,
    layer_importance,
    new_deltas,
    new_norms,
    new_scales,
    with_ranks,
)
from localization.network import Network, Tuned, start
from localization.selection import Kept
from model_store.backbone import Backbone
from model_store.packing import Item, pack
from model_store.store import Store
from model_store.tokenization import InputEncoder
from tests.overlays import fp32_encoder

TEXTS = ["the film was good", "a", "what is the new bank card ?"]


def _logits(backbone: Backbone, tuned: Tuned, kept: Kept | None = None) -> torch.Tensor:
    network = Network(fp32_encoder(backbone), "mean", None)
    plan = network.plan(tuned, kept)
    encodings = InputEncoder(backbone.tokenizer, backbone.config, ["{text}"], 32).encode(TEXTS)
    batch = pack([Item(encoding, 0) for encoding in encodings], [plan.layout])
    with torch.no_grad():
        return network.encoder.forward(batch, [plan])[0]


def _begun(backbone: Backbone) -> Tuned:
    network = Network(fp32_encoder(backbone), "mean", None)
    weight = torch.randn(3, backbone.config.hidden, generator=torch.Generator().manual_seed(0))
    return Tuned({**start(network, 3, 2, 0).tensors, "head.weight": weight})


def _all_new(backbone: Backbone) -> dict[str, torch.Tensor]:
    config = backbone.config
    deltas = new_deltas(config, 2, attention=True, seed=1)
    return {**deltas, **new_scales(config), **new_norms(config, backbone.tensors)}


def _random(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
    }


def test_new_changes_change_nothing(tiny: tuple[Store, Backbone]) -> None:
    begun = _begun(tiny[1])
    changed = Tuned({**begun.tensors, **_all_new(tiny[1])})
    torch.testing.assert_close(_logits(tiny[1], begun), _logits(tiny[1], changed))
    moved = Tuned({**begun.tensors, **_random(_all_new(tiny[1]))})
    assert not torch.allclose(_logits(tiny[1], begun), _logits(tiny[1], moved), atol=1e-3)


def test_cut_changes_act_as_a_gate_does(tiny: tuple[Store, Backbone]) -> None:
    """The changed network with scales of 0 on what goes is the cut one with cut changes."""
    backbone = tiny[1]
    config = backbone.config
    changes = _random(_all_new(backbone))
    neurons = tuple(torch.arange(layer, config.ffn, 3).int() for layer in range(config.layers))
    masked = dict(changes)
    for layer, rows in enumerate(neurons):
        mask = torch.zeros(config.ffn)
        mask[rows.long()] = 1
        masked[f"ffn.{layer}.scale"] = changes[f"ffn.{layer}.scale"] * mask
    begun = _begun(backbone).tensors
    kept = Kept(neurons)
    torch.testing.assert_close(
        _logits(backbone, Tuned({**begun, **masked})),
        _logits(backbone, Tuned({**begun, **cut(changes, kept, config)}), kept),
        atol=1e-4,
        rtol=1e-4,
    )


def test_layers_with_nothing_left_lose_their_deltas(tiny: tuple[Store, Backbone]) -> None:
    backbone = tiny[1]
    config = backbone.config
    none = torch.zeros(0, dtype=torch.int32)
    kept = Kept((none,) * config.layers, (none,) * config.layers)
    left = cut(_random(_all_new(backbone)), kept, config)
    assert not [name for name in left if name.startswith("delta.")]
    begun = _begun(backbone).tensors
    assert bool(_logits(backbone, Tuned({**begun, **left}), kept).isfinite().all())


def test_joined_changes_add_up(tiny: tuple[Store, Backbone]) -> None:
    backbone = tiny[1]
    config = backbone.config
    first = _random({**new_deltas(config, 2, attention=False, seed=1), **new_scales(config)})
    second = _random(new_deltas(config, 3, attention=False, seed=2))
    both = joined(first, second)
    for layer in range(config.layers):
        for part in ("ffn_in", "ffn_out"):
            name = f"delta.{layer}.{part}"
            expected = sum(one[f"{name}.up"] @ one[f"{name}.down"] for one in (first, second))
            torch.testing.assert_close(both[f"{name}.up"] @ both[f"{name}.down"], expected)
            assert len(both[f"{name}.down"]) == 5
    with pytest.raises(ValueError, match=r"two changes of 'ffn\.0\.scale'"):
        joined(first, {"ffn.0.scale": torch.ones(config.ffn)})


@settings(deadline=None, max_examples=20)
@given(rank=st.integers(1, 6), seed=st.integers(0, 100))
def test_a_smaller_rank_is_the_closest_one(rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(6, 9, generator=generator)
    up = torch.randn(7, 6, generator=generator)
    tensors = {"delta.0.o.down": down, "delta.0.o.up": up}
    less = with_ranks(tensors, [rank])
    assert len(less["delta.0.o.down"]) == rank
    error = (less["delta.0.o.up"] @ less["delta.0.o.down"] - up @ down).norm()
    # Eckart and Young: the error is what the singular values beyond the rank hold.
    beyond = torch.linalg.svdvals(up @ down)[rank:6].norm()
    torch.testing.assert_close(error, beyond, atol=1e-4, rtol=1e-3)


def test_importance_ranks_layers_by_their_heads() -> None:
    scores = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [5.0, 5.0, 4.0]])
    importance = layer_importance(scores)
    assert importance.argsort(descending=True).tolist()[0] in (1, 2)
    assert int(importance.argmin()) == 0
    assert bool(((importance >= 0) & (importance <= 1)).all())
    assert bool(layer_importance(torch.zeros(2, 3)).isfinite().all())
