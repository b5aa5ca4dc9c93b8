"""What answers: a backbone made ready on one device in one precision, for sequences of many tasks.

`NativeBackend` is the fast one on the CPU; `TorchBackend` runs `encoder.Encoder` anywhere and is
the reference. Both take the same overlays and items, and `choose` takes what suits the machine.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from model_store.artifact import Overlay
from model_store.backbone import EncoderConfig
from model_store.encoder import Encoder
from model_store.gpu import gpu_ops, gpu_seconds, measure_ffn, warm_up
from model_store.native import NativeBackend, builds
from model_store.native_weights import Precision
from model_store.ops import fast_bf16
from model_store.ops_onednn import fastest_ops
from model_store.packing import Item, pack
from model_store.plan import Plan, own_bytes
from model_store.shared_weights import SharedWeights
from model_store.tokenization import Encoding

AT_ONCE = 64
"""Sequences of one forward of `answer_all`."""

_TYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


class AnyPlan(Protocol):
    """An overlay made ready by a backend, which alone knows what is inside."""

    @property
    def parts(self) -> Mapping[Hashable, int]:
        """Bytes of memory by what they are: parts of several plans with one key are one."""
        ...


P = TypeVar("P", bound=AnyPlan)


class Backend(Protocol[P]):
    """`answer` and `plan` are called by one thread, `warm` by another beside it."""

    precision: Precision
    name: str
    """For people: what computes, and in which precision."""
    warm_up_lengths: Sequence[int]
    """Tokens of sequences whose first time is slow."""

    def plan(self, overlay: Overlay) -> P:
        """The overlay, ready at once."""
        ...

    def warm(self, plan: P) -> P:
        """A plan that gives the same answers sooner, for more memory; this may take its time."""
        ...

    def answer(self, items: Sequence[Item], plans: Sequence[P]) -> Sequence[NDArray[Any]]:
        """Probabilities `[C]` in fp32 for each item; `plans[s]` serves the items of segment s."""
        ...


@dataclass(frozen=True, eq=False)
class TorchPlan:
    """A plan of the encoder's, what it was made of, and its memory."""

    plan: Plan
    overlay: Overlay
    parts: Mapping[Hashable, int]


class TorchBackend:
    """The encoder in torch, on any device."""

    def __init__(self, encoder: Encoder, threads: int, *, slices: bool = False) -> None:
        """`slices`: a warm plan has its neurons cut out, where they could be read by number."""
        self._encoder = encoder
        self._threads = threads
        self._slices = slices and encoder.ops.shares_layers
        self.precision: Precision = _NAMES[encoder.ops.dtype]
        self.name = f"torch on {encoder.ops.device}, {self.precision}"
        # oneDNN compiles a kernel for every new shape.
        on_cpu = encoder.ops.device == "cpu"
        self.warm_up_lengths: Sequence[int] = range(8, 65, 8) if on_cpu else ()

    def plan(self, overlay: Overlay) -> TorchPlan:
        """The overlay, its neurons read by number where that is possible, else gathered."""
        return self._plan(overlay, sliced=False)

    def warm(self, plan: TorchPlan) -> TorchPlan:
        """A plan with its neurons cut out, where that is faster."""
        return self._plan(plan.overlay, sliced=True) if self._slices else plan

    def _plan(self, overlay: Overlay, *, sliced: bool) -> TorchPlan:
        with torch.inference_mode():
            plan = overlay.plan(self._encoder, sliced=sliced)
        return TorchPlan(plan, overlay, {object(): own_bytes(plan)})

    def answer(self, items: Sequence[Item], plans: Sequence[TorchPlan]) -> list[NDArray[Any]]:
        """Probabilities; one forward for all tasks that share the backbone's attention."""
        # OpenMP keeps this per thread, so it is set in the one that computes.
        torch.set_num_threads(self._threads)
        answers: dict[int, NDArray[Any]] = {}
        with torch.inference_mode():
            for together in self._together(items, plans):
                segments = sorted({items[index].segment for index in together})
                number = {segment: new for new, segment in enumerate(segments)}
                group = [plans[segment].plan for segment in segments]
                batch = pack(
                    [Item(items[at].encoding, number[items[at].segment]) for at in together],
                    [plan.layout for plan in group],
                )
                rows = [
                    row
                    for logits in self._encoder.forward(batch, group)
                    for row in logits.softmax(dim=1).cpu().numpy()
                ]
                answers |= {together[at]: row for at, row in zip(batch.order, rows, strict=True)}
        return [answers[index] for index in range(len(items))]

    def _together(self, items: Sequence[Item], plans: Sequence[TorchPlan]) -> list[list[int]]:
        """Indices of the items that one forward serves: tasks with layers of their own are alone.

        Such tasks have no weights of a layer in common with others; see decision 0008.
        """
        groups: dict[int, list[int]] = {}
        for index, item in enumerate(items):
            own = plans[item.segment].plan.layers is not None
            groups.setdefault(item.segment if own else -1, []).append(index)
        return list(groups.values())


def answer_all(
    backend: "Backend[Any]",
    overlay: Overlay,
    encodings: Sequence[Encoding],
    progress: Callable[[int, int, str], None] | None = None,
) -> torch.Tensor:
    """Probabilities `[B, C]` of any number of inputs to one task; `progress(done, all, "rows")`."""
    plan = backend.warm(backend.plan(overlay))
    # Equal lengths together: torch has an attention call for each.
    order = sorted(range(len(encodings)), key=lambda row: len(encodings[row].token_ids))
    rows: dict[int, NDArray[Any]] = {}
    for at in range(0, len(order), AT_ONCE):
        group = order[at : at + AT_ONCE]
        answers = backend.answer([Item(encodings[row], 0) for row in group], [plan])
        rows |= dict(zip(group, answers, strict=True))
        if progress is not None:
            progress(len(rows), len(order), "rows")
    return torch.from_numpy(np.stack([rows[row] for row in range(len(encodings))]))


def choose(
    config: EncoderConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    device: str,
    precision: Precision | None,
    threads: int,
    shared: SharedWeights | None = None,
) -> "Backend[Any]":
    """The fastest backend on `device` (`cpu` or `cuda`); `precision` None: the fastest exact one.

    `shared`: where the native forward's weights are in memory once for several processes. Raises
    `ValueError` where nothing here computes in the precision asked for.
    """
    if device == "cpu":
        native = builds()
        wide = [build for build in native if build != "avx2"]
        wanted: Precision = precision or ("bf16" if wide else "fp32")
        usable = native if wanted == "fp32" else wide
        if usable and wanted != "fp16" and NativeBackend.supports(config):
            packed = None if shared is None else shared.packed(config, wanted)
            return NativeBackend(config, tensors, wanted, threads, usable[0], packed)
    if precision == "int8":
        raise ValueError(
            "int8 needs the native forward on a processor with AVX-512 VNNI and BF16: choose bf16 "
            "or fp32"
        )
    if device == "cpu":
        if precision == "fp16":
            raise ValueError("fp16 needs a CUDA device: choose bf16 or fp32")
        bf16 = precision == "bf16" or (precision is None and fast_bf16(device))
        return TorchBackend(Encoder(config, tensors, fastest_ops(device, bf16=bf16)), threads)
    half: Precision = "bf16" if fast_bf16(device) else "fp16"
    encoder = Encoder(config, tensors, gpu_ops(_TYPES[precision or half], device))
    warm_up(encoder)
    slices = encoder.ops.shares_layers and measure_ffn(encoder, gpu_seconds).slices_pay
    return TorchBackend(encoder, threads, slices=slices)
