"""Fits after removal against plain least squares, and the closed-form head."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localization.adapters import cut, joined
from localization.closed_form import read_vectors, ridge, with_closed_form_head
from localization.network import Examples, Network, Tuned, start
from localization.refit import RIDGE, reduced_rank, refit
from localization.selection import Kept
from model_store.backbone import Backbone
from model_store.packing import Item, pack
from model_store.store import Store
from model_store.tokenization import Encoding, InputEncoder
from tests.overlays import fp32_encoder
from tests.reference import unpacked

WORDS = "the film was good a bank card new old red dog in my game news cat lost money".split()


def _encodings(backbone: Backbone, count: int = 60) -> list[Encoding]:
    texts = [" ".join(WORDS[at % 18 :: 1 + at % 3]) for at in range(count)]
    return InputEncoder(backbone.tokenizer, backbone.config, ["{text}"], 32).encode(texts)


@settings(deadline=None, max_examples=25)
@given(rank=st.integers(1, 8), seed=st.integers(0, 1000))
def test_a_fit_of_less_rank_is_never_better_and_full_rank_is_least_squares(
    rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 6, generator=generator)
    y = x @ torch.randn(6, 8, generator=generator) + torch.randn(50, 8, generator=generator)

    def error(of_rank: int) -> float:
        found = reduced_rank(x, y, of_rank)
        assert found is not None
        down, up = found
        assert len(down) == min(of_rank, 6)
        return float((y - x @ down.t() @ up.t()).square().sum())

    assert error(rank + 1) <= error(rank) * (1 + 1e-4)
    covariance = x.double().t() @ x.double()
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(6)
    plain = torch.linalg.solve(covariance, x.double().t() @ y.double())
    down, up = reduced_rank(x, y, 8) or (x, x)
    torch.testing.assert_close((up @ down).t().double(), plain, atol=1e-4, rtol=1e-3)


def test_nothing_can_be_fitted_to_nothing() -> None:
    assert reduced_rank(torch.zeros(5, 0), torch.ones(5, 3), 4) is None
    assert reduced_rank(torch.ones(5, 2), torch.ones(5, 3), 0) is None


def test_a_refitted_network_is_closer_to_the_whole_one(tiny: tuple[Store, Backbone]) -> None:
    backbone = tiny[1]
    config = backbone.config
    network = Network(fp32_encoder(backbone), "mean", None)
    tuned = start(network, 3, 2, 0)
    kept = Kept(
        tuple(torch.arange(0, config.ffn, 2).int() for _ in range(config.layers)),
        tuple(torch.arange(config.heads // 2).int() for _ in range(config.layers)),
    )
    encodings = _encodings(backbone)
    changes = refit(network, tuned, kept, encodings, rank=16)
    whole = read_vectors(network, tuned, None, _examples(encodings))
    plain = Tuned(cut(tuned.tensors, kept, config))
    fitted = Tuned(joined(plain.tensors, changes))

    def distance(one: Tuned) -> float:
        return float((read_vectors(network, one, kept, _examples(encodings)) - whole).norm())

    assert distance(fitted) < 0.7 * distance(plain)
    # The first layer's FFN by plain least squares of the same inputs and outputs.
    assert changes["delta.0.ffn_out.up"].shape == (config.hidden, 16)
    assert changes["delta.0.o.down"].shape == (16, config.hidden // 2)


def _examples(encodings: list[Encoding]) -> Examples:
    return Examples(encodings, torch.zeros(len(encodings), dtype=torch.long))


def test_keeping_everything_refits_nothing(tiny: tuple[Store, Backbone]) -> None:
    backbone = tiny[1]
    network = Network(fp32_encoder(backbone), "mean", None)
    every = torch.arange(backbone.config.ffn).int()
    kept = Kept((every,) * backbone.config.layers)
    changes = refit(network, start(network, 3, 2, 0), kept, _encodings(backbone), rank=4)
    for layer in range(backbone.config.layers):
        product = changes[f"delta.{layer}.ffn_out.up"] @ changes[f"delta.{layer}.ffn_out.down"]
        torch.testing.assert_close(product, torch.zeros_like(product), atol=1e-4, rtol=0)


def test_read_vectors_are_the_mean_hidden_states(tiny: tuple[Store, Backbone]) -> None:
    backbone = tiny[1]
    network = Network(fp32_encoder(backbone), "mean", None)
    tuned = start(network, 2, 0, 0)
    encodings = _encodings(backbone, 7)
    found = read_vectors(network, tuned, None, _examples(encodings))
    plan = network.plan(tuned)
    batch = pack([Item(encoding, 0) for encoding in encodings], [plan.layout])
    with torch.no_grad():
        states = unpacked(network.encoder.hidden_states(batch, [plan]), batch)
    for row, state in zip(found, states, strict=True):
        torch.testing.assert_close(row, state.mean(dim=0), atol=1e-5, rtol=1e-5)


def test_ridge_separates_what_can_be_separated(tiny: tuple[Store, Backbone]) -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(3, (200,), generator=generator)
    features = torch.randn(200, 10, generator=generator)
    features[torch.arange(200), classes] += 6
    weight, bias = ridge(features, classes, 3)
    assert float(((features @ weight.t() + bias).argmax(dim=1) == classes).float().mean()) > 0.95
    # And on a network: the head is better than one of zeros, whose loss is log 2.
    backbone = tiny[1]
    network = Network(fp32_encoder(backbone), "mean", None)
    encodings = _encodings(backbone)
    rows = Examples(encodings, torch.tensor([len(one.token_ids) > 9 for one in encodings]).long())
    tuned = with_closed_form_head(network, start(network, 2, 0, 0), None, rows, 2)
    vectors = read_vectors(network, tuned, None, rows)
    logits = vectors @ tuned.tensors["head.weight"].t() + tuned.tensors["head.bias"]
    assert float(torch.nn.functional.cross_entropy(logits, rows.classes)) < 0.5
