"""Which neurons and heads the served versions keep, and how much of them two tasks share.

Knows overlays; no HTTP and no engine. A version's neurons are kept as bits, an eighth of a byte
each, so that comparing one task with 200 others takes about a millisecond.
"""

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model_store.backbone import EncoderConfig
from serving.tasks import LoadedVersion
from serving.types import LayerNeurons, NeuronMap, NeuronOverlap

Bits = NDArray[np.uint8]
"""`[L, ceil(F / 8)]`; neuron n of a layer is bit n % 8, the lowest first, of byte n // 8."""


class NeuronMaps:
    """Makes the maps. May be used from several threads."""

    def __init__(self, config: EncoderConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._bits: dict[str, Bits] = {}

    def describe(self, version: LoadedVersion, others: Sequence[LoadedVersion]) -> NeuronMap:
        """A version's neurons and heads by layer, and its overlap with each of the others."""
        mine, *theirs = self._bits_of([version, *others])
        manifest, config = version.manifest, self._config
        heads = version.servable.overlay.heads
        layers = tuple(
            LayerNeurons(
                kept=manifest.ffn_kept[layer],
                neurons=mine[layer].tobytes(),
                heads=tuple(range(config.heads)) if heads is None else tuple(heads[layer].tolist()),
            )
            for layer in range(config.layers)
        )
        shared = np.bitwise_count(np.stack(theirs) & mine).sum((1, 2)) if theirs else ()
        overlaps = tuple(
            self._overlap(version, other, int(count))
            for other, count in zip(others, shared, strict=True)
        )
        info = version.info
        return NeuronMap(
            info.task, info.version, info.digest, config.ffn, config.heads, layers, overlaps
        )

    def _overlap(self, mine: LoadedVersion, other: LoadedVersion, shared: int) -> NeuronOverlap:
        kept, others_kept = mine.manifest.ffn_kept, other.manifest.ffn_kept
        together = sum(kept) + sum(others_kept) - shared
        pairs = zip(kept, others_kept, strict=True)
        return NeuronOverlap(
            task=other.info.task,
            version=other.info.version,
            kept=sum(others_kept),
            shared=shared,
            by_chance=round(sum(one * two for one, two in pairs) / self._config.ffn, 1),
            jaccard=round(shared / together, 4) if together else 0.0,
        )

    def _bits_of(self, versions: Sequence[LoadedVersion]) -> list[Bits]:
        with self._lock:
            # What is not served any more is forgotten with the next new version.
            wanted = {one.info.digest: one for one in versions}
            if missing := wanted.keys() - self._bits.keys():
                made = {digest: self._make(wanted[digest]) for digest in missing}
                kept = {one: bits for one, bits in self._bits.items() if one in wanted}
                self._bits = kept | made
            return [self._bits[one.info.digest] for one in versions]

    def _make(self, version: LoadedVersion) -> Bits:
        kept = np.zeros((self._config.layers, self._config.ffn), np.bool_)
        for layer, neurons in enumerate(version.servable.overlay.neurons):
            kept[layer, neurons.numpy()] = True
        return np.packbits(kept, axis=1, bitorder="little")
