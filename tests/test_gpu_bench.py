"""The GPU benchmark without a GPU: it says so; and its parts compute on a tiny CPU encoder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import (
    Bench,
    answer,
    drawn_lengths,
    flops,
    gather,
    hot,
    make_plan,
    memory,
    mixed,
    pruned,
    texts,
    wall_seconds,
)
from model_store.backbone import Backbone
from model_store.encoder import Encoder
from model_store.ops import TorchOps
from model_store.store import Store


@pytest.fixture
def bench(tiny: tuple[Store, Backbone]) -> Bench:
    _, backbone = tiny
    config = backbone.config.model_copy(update={"positions": 200})
    positions = torch.randn(config.positions, config.embedding)
    tensors = {**backbone.tensors, "embeddings.position": positions}
    encoder = Encoder(config, tensors, TorchOps(shares_layers=True))
    return Bench(encoder, "fp32", wall_seconds, lambda: 0, rounds=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_and_ends_well() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
    )
    assert result.returncode == 0
    assert "no CUDA device" in result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {"skipped": "no CUDA device"}


@torch.inference_mode()
def test_every_part_that_needs_no_peer_compares_something(bench: Bench) -> None:
    rows = [*pruned(bench), *gather(bench), *mixed(bench), *hot(bench)]
    assert len(rows) == 6
    assert all(row.ours_ms and row.peer_ms and row.ratio > 0 for row in rows)
    assert memory(bench, tasks=3)[0].met is True


@torch.inference_mode()
def test_tasks_answer_in_turn(bench: Bench) -> None:
    plans = [make_plan(bench.encoder, seed, 0.5) for seed in range(3)]
    sentences = texts(drawn_lengths(7), bench.encoder.config)
    scores = answer(bench, sentences, plans)
    assert [len(part) for part in scores] == [3, 2, 2]
    alone = answer(bench, sentences[1::3], plans[1:2])
    torch.testing.assert_close(scores[1], alone[0])


def test_arithmetic_is_counted_by_hand(bench: Bench) -> None:
    config = bench.encoder.config.model_copy(update={"layers": 2, "hidden": 1, "ffn": 2})
    # Two sentences of one and three tokens: 4 rows, 10 pairs.
    whole = 4 * (2 * 4) + 4 * 10 + 4 * (2 * 2 * 2)  # projections, attention, FFN
    last = 4 * (2 * 2) + 2 * (2 * 2) + 4 * 4 + 2 * (2 * 2 * 2)  # keys, queries, attention, FFN
    assert flops(config, [1, 3], 1.0) == whole + last
    assert flops(config, [1, 3], 0.5) == whole + last - 4 * 4 - 2 * 4
