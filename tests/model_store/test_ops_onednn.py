"""The packed bf16 operations against plain torch."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_store.backbone import Activation, Backbone
from model_store.encoder import Encoder
from model_store.ops import TorchOps, bucket
from model_store.ops_onednn import OneDnnOps
from model_store.packing import Item, Read, pack
from model_store.store import Store
from model_store.tokenization import InputEncoder
from tests.overlays import random_overlay


@given(st.integers(1, 100_000))
def test_buckets_hold_the_rows_and_waste_little(rows: int) -> None:
    size = bucket(rows)
    assert rows <= size <= max(rows + 7, rows * 1.25)
    assert bucket(size) == size


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 70),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    activation=st.sampled_from([None, "gelu", "gelu_tanh", "relu"]),
)
def test_linear_equals_torch(
    rows: int, sizes: tuple[int, int], activation: Activation | None
) -> None:
    inputs, outputs = sizes
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    bias = torch.randn(outputs, generator=generator)
    fast, plain = OneDnnOps(), TorchOps()
    low = [tensor.bfloat16() for tensor in (x, weight, bias)]
    ours = fast.linear(low[0], fast.pack_linear(low[1], low[2], activation))
    expected = plain.linear(
        low[0].float(), plain.pack_linear(low[1].float(), low[2].float(), activation)
    )
    torch.testing.assert_close(ours.float(), expected, atol=0.03, rtol=0.02)


def test_a_layer_without_neurons_leaves_the_bias() -> None:
    ops = OneDnnOps()
    none, bias = torch.zeros(0, 8).bfloat16(), torch.ones(8).bfloat16()
    ffn = ops.pack_ffn(none, none[:, 0], none, bias, "gelu")
    y = ops.linear(ops.linear(torch.randn(3, 8).bfloat16(), ffn.inner), ffn.outer)
    assert torch.equal(y, torch.ones(3, 8).bfloat16())


def test_a_layer_without_heads_leaves_the_bias() -> None:
    ops = OneDnnOps()
    x, bias = torch.randn(3, 8).bfloat16(), torch.ones(8).bfloat16()
    queries = ops.linear(x, ops.pack_linear(torch.zeros(0, 8).bfloat16(), bias[:0]))
    assert queries.shape == (3, 0)
    out = ops.linear(queries, ops.pack_linear(torch.zeros(8, 0).bfloat16(), bias))
    assert torch.equal(out, torch.ones(3, 8).bfloat16())


def test_a_delta_beside_a_packed_weight_is_refused() -> None:
    ops = OneDnnOps()
    packed = ops.pack_linear(torch.zeros(8, 8).bfloat16(), None)
    with pytest.raises(AssertionError, match="merge it before"):
        ops.linear(
            torch.zeros(1, 8).bfloat16(), dataclasses.replace(packed, delta=torch.ones(8, 8))
        )


@pytest.mark.parametrize("prompt_tokens", [0, 3])
@pytest.mark.parametrize("read", ["cls", "mean"])
@pytest.mark.parametrize(
    "inside",
    [
        {},
        {"heads": (2, 1, 3)},
        {"heads": (0, 4, 2), "norms": True},
        {"heads": (3, 2, 0)},
        {"scales": True},
        {"delta_rank": 2},
        {"heads": (2, 0, 3), "scales": True, "norms": True, "delta_rank": 2},
    ],
    ids=str,
)
def test_the_whole_forward_equals_the_reference(
    tiny: tuple[Store, Backbone], inside: dict[str, Any], read: Read, prompt_tokens: int
) -> None:
    _, backbone = tiny
    overlay = random_overlay(backbone, prompt_tokens=prompt_tokens, read=read, **inside)
    texts = InputEncoder(backbone.tokenizer, backbone.config, ["{text}"], 32)
    encodings = texts.encode(["the film was good", "a", "what is the new red bank card ?"] * 3)
    answers = []
    for ops in (TorchOps(), OneDnnOps()):
        encoder = Encoder(backbone.config, backbone.tensors, ops)
        with torch.inference_mode():
            plan = overlay.plan(encoder)
            batch = pack([Item(encoding, 0) for encoding in encodings], [plan.layout])
            answers.append(encoder.forward(batch, [plan])[0].softmax(dim=1))
    torch.testing.assert_close(answers[1], answers[0], atol=0.05, rtol=0)
