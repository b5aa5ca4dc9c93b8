"""Finds how many tokens make a batch efficient on this machine, by a short measurement.

More sequences in one forward use the machine better, up to a point; beyond it they only make others
wait longer. The smallest batch near the best throughput is the budget.
"""

import time
from typing import Any

import torch

from model_store.artifact import Overlay
from model_store.backbone import Backbone
from model_store.backend import Backend
from model_store.manifest import LinearHead as LinearHeadRecord
from model_store.manifest import Manifest, Prompt
from model_store.packing import Item
from model_store.plan import LinearHead
from model_store.tokenization import Encoding

LENGTH = 32
"""Tokens of the sequences tried."""
COUNTS = (4, 8, 16, 32, 64, 128)
GAIN = 1.03
"""Of throughput for twice the sequences, without which still more are not tried."""
ENOUGH = 0.97
"""Of the best throughput."""
LONGEST_S = 0.25
"""A batch that takes longer is not tried twice as large."""
ROUNDS = 3


def efficient_tokens(backend: Backend[Any], backbone: Backbone) -> int:
    """The smallest batch, in tokens, with nearly the best throughput; at least one long sequence.

    Takes about a second. The whole network is measured: it takes the most time.
    """
    config = backbone.config
    length = min(LENGTH, config.max_tokens)
    item = Item(Encoding([0] * length, [0] * length, 0), 0)
    plan = backend.warm(backend.plan(_whole(backbone)))
    rates: dict[int, float] = {}
    for count in COUNTS:
        seconds = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            backend.answer([item] * count, [plan])
            seconds.append(time.perf_counter() - started)
        rate = count * length / min(seconds)
        gained = rate > GAIN * max(rates.values(), default=0.0)
        rates[count * length] = rate
        if not gained or min(seconds) > LONGEST_S:
            break
    best = max(rates.values())
    smallest = next(tokens for tokens, rate in rates.items() if rate >= ENOUGH * best)
    return max(smallest, config.max_tokens)


def _whole(backbone: Backbone) -> Overlay:
    """An overlay that keeps everything; the backend reads no more of its manifest than this."""
    config = backbone.config
    known: dict[str, Any] = {"read": "mean", "head": LinearHeadRecord(), "prompt": Prompt(tokens=0)}
    manifest = Manifest.model_construct(**known)
    every = torch.arange(config.ffn, dtype=torch.int32)
    head = LinearHead(torch.zeros(2, config.hidden), torch.zeros(2))
    return Overlay(manifest, (every,) * config.layers, None, head)
