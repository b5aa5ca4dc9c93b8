"""Neurons and heads under one budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localization.budget import multiplications
from localization.costs import measure_costs, plan_of, speedup, time_in_turns
from localization.selection import MULTIPLE, Costs, Kept, select_within
from model_store.backbone import Backbone
from model_store.store import Store
from model_store.tokenization import InputEncoder
from tests.overlays import fp32_encoder

LAYERS, WIDTH, HEADS = 3, 4 * MULTIPLE, 4


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    share=st.floats(0.0, 1.0),
    head=st.floats(0.5, 100.0),
    fixed=st.floats(0.0, 500.0),
)
def test_what_is_kept_fits_the_budget_and_is_the_best_of_each_layer(
    seed: int, share: float, head: float, fixed: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    neurons = torch.rand(LAYERS, WIDTH, generator=generator)
    heads = torch.rand(LAYERS, HEADS, generator=generator)
    costs = Costs(fixed, 1.0, head)
    whole = costs.of(LAYERS * WIDTH, LAYERS * HEADS)
    budget = fixed + share * (whole - fixed)
    kept = select_within(neurons, heads, costs, budget)
    assert kept.heads is not None
    counts = [len(rows) for rows in kept.neurons]
    assert all(count % MULTIPLE == 0 for count in counts)
    spent = costs.of(sum(counts), sum(map(len, kept.heads)))
    assert spent <= budget + 1e-6
    # Greedy: whatever is left over could not pay for one more unit of either kind.
    if sum(counts) < LAYERS * WIDTH and sum(map(len, kept.heads)) < LAYERS * HEADS:
        assert budget - spent < max(MULTIPLE, head)
    for scores, rows in zip([*neurons, *heads], [*kept.neurons, *kept.heads], strict=True):
        assert rows.tolist() == sorted(set(rows.tolist()))
        inside = scores[rows.long()]
        outside = scores[[at for at in range(len(scores)) if at not in set(rows.tolist())]]
        if len(inside) and len(outside):
            assert float(inside.min()) >= float(outside.max())


def test_everything_fits_a_budget_of_everything() -> None:
    costs = Costs(10.0, 1.0, 20.0)
    scores = torch.rand(LAYERS, WIDTH), torch.rand(LAYERS, HEADS)
    kept = select_within(*scores, costs, costs.of(LAYERS * WIDTH, LAYERS * HEADS))
    assert [len(rows) for rows in kept.neurons] == [WIDTH] * LAYERS
    assert [len(rows) for rows in kept.heads or ()] == [HEADS] * LAYERS


def test_multiplications_are_those_of_the_linear_maps(tiny: tuple[Store, Backbone]) -> None:
    config = tiny[1].config
    costs = multiplications(config, tokens=0)
    ffn = 2 * config.hidden * config.ffn
    attention = 4 * config.hidden**2
    total = costs.of(config.layers * config.ffn, config.layers * config.heads)
    assert total == config.layers * (ffn + attention)


def test_costs_are_measured_and_positive(tiny: tuple[Store, Backbone]) -> None:
    backbone = tiny[1]
    encoder = fp32_encoder(backbone)
    texts = ["the film was good", "a dog", "what is the new bank card ?"]
    encodings = InputEncoder(backbone.tokenizer, backbone.config, ["{text}"], 32).encode(texts)
    costs = measure_costs(encoder, encodings)
    assert costs.neuron > 0
    assert costs.head > 0
    assert costs.fixed >= 0
    every = torch.arange(backbone.config.ffn).int()
    assert speedup(encoder, Kept((every,) * backbone.config.layers), encodings) > 0
    none = torch.zeros(0, dtype=torch.int32)
    plan = plan_of(
        encoder, Kept((none,) * backbone.config.layers, (none,) * backbone.config.layers)
    )
    assert plan.layers is not None
    assert [layer.heads for layer in plan.layers] == [0] * backbone.config.layers


def test_times_are_medians_of_turns() -> None:
    calls: list[str] = []
    seconds = time_in_turns(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, "cpu", rounds=3
    )
    assert calls == ["a", "b"] * 5
    assert set(seconds) == {"a", "b"}
    assert all(value >= 0 for value in seconds.values())


@pytest.mark.parametrize("budget", [0.0, -5.0])
def test_no_budget_keeps_nothing(budget: float) -> None:
    scores = torch.rand(LAYERS, WIDTH), torch.rand(LAYERS, HEADS)
    kept = select_within(*scores, Costs(0.0, 1.0, 20.0), budget)
    assert sum(map(len, kept.neurons)) + sum(map(len, kept.heads or ())) == 0
