"""Fluctuation scores against their definition: variances of what each unit adds to its layer."""

import dataclasses

import torch

from localization.attribution import score_units
from localization.config import AttributionConfig
from localization.network import Examples, Network, Tuned, start
from model_store.backbone import Backbone
from model_store.encoder import Encoder
from model_store.ops import TorchOps
from model_store.packing import Item, pack
from model_store.plan import Part
from model_store.store import Store
from model_store.tokenization import InputEncoder

PARTS: tuple[Part, ...] = ("ffn_in", "heads")


def _setup(backbone: Backbone, rows: int) -> tuple[Network, Tuned, Examples]:
    network = Network(Encoder(backbone.config, backbone.tensors, TorchOps()), "mean", None)
    texts = [f"the film number {row} was {'good' if row % 3 else 'bad'}" for row in range(rows)]
    encodings = InputEncoder(backbone.tokenizer, backbone.config, ["{text}"], 32).encode(texts)
    return network, start(network, 2, 0, seed=0), Examples(encodings, torch.zeros(rows).long())


def _scores(
    network: Network, tuned: Tuned, examples: Examples, rows: int
) -> dict[Part, torch.Tensor]:
    config = AttributionConfig(score="fluctuation", rows=rows)
    return score_units(network, tuned, examples, config, PARTS, 0, lambda *_: None)


def test_a_units_score_is_the_variance_of_what_it_adds(tiny: tuple[Store, Backbone]) -> None:
    network, tuned, examples = _setup(tiny[1], 70)  # more rows than go through at once
    found = _scores(network, tuned, examples, 70)
    config, tensors = network.encoder.config, network.encoder.tensors
    seen: dict[tuple[int, Part], torch.Tensor] = {}

    def keep(layer: int, part: Part, x: torch.Tensor) -> torch.Tensor:
        seen[layer, part] = x
        return x

    plan = dataclasses.replace(network.plan(tuned), gate=keep)
    with torch.no_grad():
        batch = pack([Item(one, 0) for one in examples.encodings], [plan.layout])
        network.encoder.forward(batch, [plan])
    width = config.hidden // config.heads
    for layer in range(config.layers):
        h, w_out = seen[layer, "ffn_in"], tensors[f"layers.{layer}.ffn_out.weight"]
        neurons = torch.stack(
            [
                torch.outer(h[:, unit], w_out[unit]).var(dim=0, unbiased=False).sum()
                for unit in range(config.ffn)
            ]
        )
        torch.testing.assert_close(
            found["ffn_in"][layer], neurons / neurons.sum(), atol=1e-6, rtol=1e-3
        )
        x, w_o = seen[layer, "heads"], tensors[f"layers.{layer}.attention_out.weight"]
        columns = [slice(head * width, (head + 1) * width) for head in range(config.heads)]
        heads = torch.stack(
            [(x[:, some] @ w_o[:, some].t()).var(dim=0, unbiased=False).sum() for some in columns]
        )
        torch.testing.assert_close(found["heads"][layer], heads / heads.sum(), atol=1e-6, rtol=1e-3)


def test_labels_do_not_count_and_only_the_first_rows_do(tiny: tuple[Store, Backbone]) -> None:
    network, tuned, examples = _setup(tiny[1], 12)
    first = _scores(network, tuned, examples, 8)
    others = Examples([*examples.encodings[:8], *examples.encodings[:4]], 1 - examples.classes)
    for part, scores in _scores(network, tuned, others, 8).items():
        assert torch.equal(scores, first[part])
    assert not torch.equal(_scores(network, tuned, examples, 12)["ffn_in"], first["ffn_in"])
