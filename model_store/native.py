"""The native forward: `native/forward.cpp` with a backbone and plans handed over, on the CPU.

Built with the package, once for each family of processors; where no build fits (no compiler at
installation, another architecture), `backend.TorchBackend` serves, which is also the reference. The
structures here mirror those at the top of the C++ file, letters and paddings included.
"""

import ctypes
import dataclasses
import hashlib
import itertools
import mmap
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p, cast
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model_store.artifact import Overlay
from model_store.backbone import EncoderConfig
from model_store.manifest import VerbalizerHead
from model_store.native_weights import (
    COLUMNS,
    LANES,
    Named,
    Precision,
    Widths,
    low_precision,
    multiple,
    panels,
    weights,
    wide,
)
from model_store.ops import activate
from model_store.packing import Item
from model_store.plan import Changes

Build = Literal["amx", "avx512", "avx2"]

NEEDS: dict[Build, tuple[str, ...]] = {
    "amx": ("amx_tile", "amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni"),
    "avx512": ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16", "avx512_vnni"),
    "avx2": ("avx2", "fma3"),
}
"""What a build needs of the processor, best build first."""

HUGE_PAGE = 1 << 21

_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
_READS = ("cls", "mask", "mean")
_ACTIVATIONS = {"gelu": 1, "gelu_tanh": 2, "relu": 3}


class _Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class _Linear(Structure):
    _fields_ = [(name, c_void_p) for name in ("panels", "bias", "scales", "sums")]


class _LayerWeights(Structure):
    _fields_ = [
        ("qkv", _Linear),
        ("out", _Linear),
        ("w_in", c_void_p),
        ("b_in", c_void_p),
        ("in_scales", c_void_p),
        ("in_sums", c_void_p),
        ("w_out", c_void_p),
        ("b_out", c_void_p),
        ("out_scales", c_void_p),
        ("attention_norm", _Norm),
        ("ffn_norm", _Norm),
        ("bytes", c_int32),
    ]


class _Model(Structure):
    _fields_ = [
        ("precision", c_int32),
        ("layers", c_int32),
        ("hidden", c_int32),
        ("heads", c_int32),
        ("ffn", c_int32),
        ("embedding", c_int32),
        ("activation", c_int32),
        ("position_offset", c_int32),
        ("eps", c_float),
        ("words", c_void_p),
        ("positions", c_void_p),
        ("types", c_void_p),
        ("embedding_norm", _Norm),
        ("projection", _Linear),
        ("layer", POINTER(_LayerWeights)),
    ]


class _Delta(Structure):
    _fields_ = [("rank", c_int64), ("down", c_void_p), ("up", c_void_p)]


class _TaskLayer(Structure):
    _fields_ = [
        ("kept", c_int32),
        ("heads", c_int32),
        ("neurons", c_void_p),
        ("head_list", c_void_p),
        ("out_sums", c_void_p),
        ("in_panels", c_void_p),
        ("out_panels", c_void_p),
        ("outer_sums", c_void_p),
        ("scales", c_void_p),
        ("b_out", c_void_p),
        ("attention_norm", _Norm),
        ("ffn_norm", _Norm),
        ("q", _Delta),
        ("k", _Delta),
        ("v", _Delta),
        ("o", _Delta),
        ("ffn_in", _Delta),
        ("ffn_out", _Delta),
    ]


class _Task(Structure):
    _fields_ = [
        ("layers", POINTER(_TaskLayer)),
        ("own_attention", c_int32),
        ("read", c_int32),
        ("prompt", c_int32),
        ("classes", c_int32),
        ("prompt_vectors", c_void_p),
        ("prompt_hidden", c_void_p),
        ("prompt_qkv", c_void_p),
        ("head_weight", c_void_p),
        ("head_bias", c_void_p),
    ]


class _Batch(Structure):
    _fields_ = [
        ("sequences", c_int32),
        ("segments", c_int32),
        ("tokens", c_void_p),
        ("token_types", c_void_p),
        ("lengths", c_void_p),
        ("masks", c_void_p),
        ("segment_of", c_void_p),
        ("tasks", c_void_p),
        ("probabilities", c_void_p),
        ("read", c_void_p),
    ]


_STRUCTURES = (_Norm, _Linear, _LayerWeights, _Model, _Delta, _TaskLayer, _Task, _Batch)


def builds() -> list[Build]:
    """The builds that are installed and that this process can run, best first."""
    have = torch.cpu.get_capabilities()
    usable = []
    for build, needed in NEEDS.items():
        if all(have.get(name, False) for name in needed):
            with suppress(OSError):
                load(build)
                usable.append(build)
    return usable


def _path(build: Build) -> Path | None:
    folder = Path(__file__).parent
    paths = [folder / f"_native_{build}{suffix}" for suffix in EXTENSION_SUFFIXES]
    return next((path for path in paths if path.exists()), None)


@cache
def load(build: Build) -> ctypes.CDLL:
    """The library of one build. Raises `OSError` where this machine cannot run it."""
    path = _path(build)
    if path is None:
        raise OSError(f"the native forward was not built for {build}: install with a C++ compiler")
    library = ctypes.CDLL(str(path))
    sizes = [ctypes.sizeof(structure) for structure in _STRUCTURES]
    try:
        built = list((c_int32 * len(sizes)).in_dll(library, "taskbone_sizes"))
    except ValueError:  # there is no such name
        built = []
    if built != sizes:
        raise OSError(f"the native forward for {build} was built from other sources: install again")
    library.taskbone_runner.restype = c_void_p
    library.taskbone_runner_free.argtypes = [c_void_p]
    library.taskbone_forward.argtypes = [c_void_p, c_void_p, c_void_p]
    library.taskbone_prompt.argtypes = [c_void_p] * 5
    library.taskbone_pack_ffn.argtypes = [
        c_void_p, c_int32, c_void_p, c_int32, c_void_p, c_void_p, c_void_p,
    ]  # fmt: skip
    library.taskbone_forward.restype = library.taskbone_prompt.restype = None
    library.taskbone_pack_ffn.restype = library.taskbone_runner_free.restype = None
    if library.taskbone_prepare():
        raise OSError(f"the kernel gives this process no leave to use {build}")
    return library


@dataclass(eq=False)
class NativePlan:
    """An overlay as the native forward sees it; `NativeBackend.warm` makes a faster one of it."""

    task: _Task
    classes: int
    verbalizer: tuple[Tensor, Tensor] | None
    """Label tokens' rows of the MLM decoder `[C, E]`, and their biases `[C]`."""
    prompt_tokens: int
    layers: Any
    neurons: tuple[Tensor, ...]
    parts: Mapping[Hashable, int]
    """Bytes of memory by what they are: parts of several plans with one key are one."""
    keep: list[Any] = field(default_factory=list)
    """What the structures point into."""


@dataclass(frozen=True, eq=False)
class PackedFfn:
    """One layer's kept neurons, gathered and packed: equal sets of several tasks share one."""

    in_panels: Tensor
    out_panels: Tensor
    sums: Tensor

    @property
    def bytes(self) -> int:
        """Memory in bytes."""
        return sum(part.nbytes for part in (self.in_panels, self.out_panels, self.sums))


class NativeBackend:
    """A backbone packed for the native forward in one precision.

    `answer` and `plan` are for one thread at a time, `warm` for one other beside it.
    """

    def __init__(
        self,
        config: EncoderConfig,
        tensors: Mapping[str, Tensor],
        precision: Precision,
        threads: int,
        build: Build | None = None,
        packed: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Tensors as in `EncoderConfig.shapes`; `packed`: what `weights` makes of them, if it is
        there already. Raises `OSError` where there is no usable build.
        """
        if build is None:
            build = next(iter(builds()), None)
            if build is None:
                raise OSError("there is no native forward for this processor")
        if build == "avx2" and precision != "fp32":
            raise OSError(f"the build for avx2 computes in fp32, not in {precision}")
        if not self.supports(config):
            raise OSError(f"no native forward for H {config.hidden}, A {config.heads}")
        self.name = f"native forward for {build}, {precision}"
        self.warm_up_lengths: Sequence[int] = ()
        self.config = config
        self.precision: Precision = precision
        self.build = build
        self._library = load(build)
        self._keep: list[Any] = []
        self._low = low_precision(precision)
        self._widths = Widths.of(config)
        self._hidden = self._widths.hidden
        self._mlm = {name: x.float() for name, x in tensors.items() if name.startswith("mlm.")}
        if config.has_mlm:
            self._decoder = tensors.get("mlm.decoder.weight", tensors["embeddings.word"])
        self._weights = packed or private(weights(config, tensors, precision))
        self._model = self._build_model()
        self._shared: WeakValueDictionary[tuple[int, bytes], PackedFfn] = WeakValueDictionary()
        self._runner = c_void_p(self._library.taskbone_runner(threads))
        self._helper = c_void_p(self._library.taskbone_runner(1))

    def __del__(self) -> None:
        for name in ("_runner", "_helper"):
            if hasattr(self, name):
                self._library.taskbone_runner_free(getattr(self, name))

    @staticmethod
    def supports(config: EncoderConfig) -> bool:
        """Whether neurons can be counted in 16 bits, and widths are not beyond the kernels'."""
        small = config.ffn < 1 << 16 and config.hidden <= 4096
        return small and config.hidden // config.heads <= 128

    # -- The forward ------------------------------------------------------------------------------

    def answer(self, items: Sequence[Item], plans: Sequence[NativePlan]) -> list[NDArray[Any]]:
        """Probabilities `[C]` in fp32 for each item; `plans[s]` serves the items of segment s."""
        assert items, "a batch without items"
        order = sorted(range(len(items)), key=lambda number: items[number].segment)
        encodings = [items[number].encoding for number in order]
        segments = [items[number].segment for number in order]
        lengths = [len(encoding.token_ids) for encoding in encodings]
        tokens, types = (
            np.fromiter(itertools.chain.from_iterable(parts), np.int32, sum(lengths))
            for parts in (
                (encoding.token_ids for encoding in encodings),
                (encoding.token_types for encoding in encodings),
            )
        )
        masks = [encoding.mask for encoding in encodings]
        numbers = np.array([lengths, masks, segments], dtype=np.int32)
        self._check(tokens, types, numbers, plans)
        classes = [plans[segment].classes for segment in segments]
        probabilities = np.empty(sum(classes), dtype=np.float32)
        read = None
        if any(plan.verbalizer is not None for plan in plans):
            read = np.empty((len(items), self.config.hidden), dtype=np.float32)
        tasks = (c_void_p * len(plans))(*(ctypes.addressof(plan.task) for plan in plans))
        batch = _Batch(
            len(items),
            len(plans),
            tokens.ctypes.data,
            types.ctypes.data,
            numbers[0].ctypes.data,
            numbers[1].ctypes.data,
            numbers[2].ctypes.data,
            ctypes.addressof(tasks),
            probabilities.ctypes.data,
            None if read is None else read.ctypes.data,
        )
        self._library.taskbone_forward(byref(self._model), self._runner, byref(batch))
        answers: list[NDArray[Any]] = [probabilities] * len(items)
        at = 0
        for number, position in enumerate(order):
            plan = plans[segments[number]]
            if plan.verbalizer is not None:
                assert read is not None
                answers[position] = self._verbalize(read[number], plan.verbalizer)
                continue
            answers[position] = probabilities[at : at + plan.classes]
            at += plan.classes
        return answers

    def _check(
        self,
        tokens: NDArray[Any],
        types: NDArray[Any],
        numbers: NDArray[Any],
        plans: Sequence[NativePlan],
    ) -> None:
        """Raise `ValueError` for what is beyond a table: it would be read all the same."""
        config, (lengths, masks, segments) = self.config, numbers
        prompts = np.array([plan.prompt_tokens for plan in plans], dtype=np.int32)
        for what, given, limit in (
            ("token", tokens, config.vocabulary),
            ("token type", types, max(1, config.token_types)),
            ("length", lengths - 1, config.max_tokens - prompts[segments]),
            ("mask", masks, lengths),
        ):
            # Of unsigned numbers, the negative ones are too large as well.
            wrong = given.view(np.uint32) >= limit
            if wrong.any():
                at = int(wrong.argmax())
                number = given[at] + (what == "length")
                raise ValueError(f"{what} {number} given: that is outside what the backbone has")

    def _verbalize(self, read: NDArray[Any], rows: tuple[Tensor, Tensor]) -> NDArray[Any]:
        x = torch.from_numpy(read)[None]
        x = F.linear(x, self._mlm["mlm.dense.weight"], self._mlm["mlm.dense.bias"])
        x = activate(x, self.config.mlm_activation)
        weight, bias = self._mlm["mlm.norm.weight"], self._mlm["mlm.norm.bias"]
        x = F.layer_norm(x, weight.shape, weight, bias, self.config.norm_eps)
        probabilities: NDArray[Any] = F.linear(x, *rows).softmax(dim=1)[0].numpy()
        return probabilities

    # -- Plans ------------------------------------------------------------------------------------

    def plan(self, overlay: Overlay) -> NativePlan:
        """The overlay, ready at once: neurons are gathered from the backbone when it answers."""
        config, keep = self.config, list[Any]()
        own = 0

        def pointer(tensor: Tensor) -> int:
            nonlocal own
            keep.append(tensor)
            own += tensor.nbytes
            return tensor.data_ptr()

        layers = (_TaskLayer * config.layers)()
        neurons = tuple(rows.to(torch.uint16).contiguous() for rows in overlay.neurons)
        for number, layer in enumerate(layers):
            heads = None if overlay.heads is None else overlay.heads[number]
            self._fill_layer(layer, number, neurons[number], heads, overlay.changes, pointer)
        task = _Task(
            layers=layers,
            own_attention=overlay.owns_layers,
            read=_READS.index(overlay.manifest.read),
        )
        if overlay.prompt is not None:
            task.prompt = len(overlay.prompt)
            task.prompt_vectors = pointer(
                wide(overlay.prompt.float(), multiple(config.embedding, 64))
            )
        verbalizer = None
        if isinstance(overlay.manifest.head, VerbalizerHead):
            rows = torch.tensor(overlay.manifest.head.token_ids)
            verbalizer = self._decoder[rows].float(), self._mlm["mlm.decoder.bias"][rows]
        else:
            assert overlay.head is not None, "a linear head has tensors"
            task.classes = len(overlay.head.bias)
            task.head_weight = pointer(wide(overlay.head.weight.float(), self._hidden))
            task.head_bias = pointer(overlay.head.bias.float().contiguous())
        keep.append(layers)
        own += ctypes.sizeof(layers) + ctypes.sizeof(task)
        return NativePlan(
            task, task.classes, verbalizer, task.prompt, layers, neurons, {object(): own}, keep
        )

    def warm(self, plan: NativePlan) -> NativePlan:
        """`plan` with its neurons packed and its prompt's layer 0 computed: same answers, sooner.

        Layers of several tasks that keep the same neurons share them.
        """
        layers = type(plan.layers)(*plan.layers)
        parts, keep = dict(plan.parts), [plan, layers]
        for number, (layer, neurons) in enumerate(zip(layers, plan.neurons, strict=True)):
            key = number, hashlib.blake2b(neurons.numpy().tobytes(), digest_size=16).digest()
            ffn = self._shared.get(key)
            if ffn is None:
                ffn = self._shared[key] = self._pack_ffn(number, neurons)
            keep.append(ffn)
            parts[key] = ffn.bytes
            layer.in_panels = ffn.in_panels.data_ptr()
            layer.out_panels = ffn.out_panels.data_ptr()
            layer.outer_sums = ffn.sums.data_ptr()
        task = _Task.from_buffer_copy(plan.task)
        task.layers = layers
        if plan.prompt_tokens:
            hidden = torch.empty(plan.prompt_tokens, self._hidden)
            qkv = torch.empty(plan.prompt_tokens, 3 * self._widths.attention, dtype=self._low)
            self._library.taskbone_prompt(
                byref(self._model), self._helper, byref(task), hidden.data_ptr(), qkv.data_ptr()
            )
            task.prompt_hidden, task.prompt_qkv = hidden.data_ptr(), qkv.data_ptr()
            keep += [hidden, qkv]
            parts[object()] = hidden.nbytes + qkv.nbytes
        return dataclasses.replace(plan, task=task, layers=layers, parts=parts, keep=keep)

    def _pack_ffn(self, layer: int, neurons: Tensor) -> PackedFfn:
        """Gather and pack layer `layer`'s `neurons [K]` (uint16)."""
        kept, hidden = multiple(len(neurons), COLUMNS), self._hidden
        size = 1 if self._model.layer[layer].bytes else self._low.itemsize
        packed = PackedFfn(
            _empty(kept * hidden * size),
            _empty(kept * hidden * size),
            torch.empty(hidden, dtype=torch.int32),
        )
        self._library.taskbone_pack_ffn(
            byref(self._model),
            layer,
            neurons.data_ptr(),
            len(neurons),
            packed.in_panels.data_ptr(),
            packed.out_panels.data_ptr(),
            packed.sums.data_ptr(),
        )
        return packed

    def _fill_layer(
        self,
        layer: _TaskLayer,
        number: int,
        neurons: Tensor,
        heads: Tensor | None,
        changes: Changes,
        pointer: Any,
    ) -> None:
        config = self.config
        layer.kept, layer.neurons = len(neurons), pointer(neurons)
        layer.heads = -1
        if heads is not None and len(heads) < config.heads:
            layer.heads = len(heads)
            layer.head_list = pointer(heads.to(torch.int32).contiguous())
            by_head = self._weights.get(f"{number}.out.sums_of_heads")  # [A, Hp]
            if by_head is not None:
                layer.out_sums = pointer(by_head[heads.long()].sum(0, dtype=torch.int32))
        scale, shift = changes.get(f"ffn.{number}.scale"), changes.get(f"ffn.{number}.bias")
        if scale is not None:
            layer.scales = pointer(wide(scale.float(), multiple(len(neurons), COLUMNS)))
        if shift is not None:
            layer.b_out = pointer(
                self._weights[f"{number}.b_out"] + wide(shift.float(), self._hidden)
            )
        for name in ("attention", "ffn"):
            weight = changes.get(f"norm.{number}.{name}.weight")
            bias = changes.get(f"norm.{number}.{name}.bias")
            if weight is not None and bias is not None:
                parts = (pointer(wide(part.float(), self._hidden)) for part in (weight, bias))
                setattr(layer, f"{name}_norm", _Norm(*parts))
        for part in ("q", "k", "v", "o", "ffn_in", "ffn_out"):
            down = changes.get(f"delta.{number}.{part}.down")
            up = changes.get(f"delta.{number}.{part}.up")
            if down is None or up is None:
                continue
            rank, down, up = len(down), down.float(), up.float()
            if part in "qkv":
                up = self._widths.spread(up)
            elif part == "o":
                down = self._widths.spread(down.t()).t()
            elif part == "ffn_out":
                down = wide(down, multiple(len(neurons), COLUMNS))
            if part in ("q", "k", "v", "ffn_in"):
                down = wide(down, self._hidden)
            delta = _Delta(
                rank,
                pointer(panels(down, self._low, LANES)),
                pointer(panels(up, self._low, COLUMNS)),
            )
            setattr(layer, part, delta)

    # -- The backbone -----------------------------------------------------------------------------

    def _build_model(self) -> _Model:
        config = self.config
        layers = (_LayerWeights * config.layers)()
        for number, layer in enumerate(layers):
            self._build_layer(layer, f"{number}.")
        self._keep.append(layers)
        model = _Model(
            precision=_PRECISIONS.index(self.precision),
            layers=config.layers,
            hidden=config.hidden,
            heads=config.heads,
            ffn=config.ffn,
            embedding=config.embedding,
            activation=_ACTIVATIONS[config.activation],
            position_offset=config.position_offset,
            eps=config.norm_eps,
            layer=cast(layers, POINTER(_LayerWeights)),
        )
        self._point(model, "", "words positions types")
        self._point(model.embedding_norm, "embedding_norm.", "weight bias")
        self._point(model.projection, "projection.", "panels bias")
        return model

    def _build_layer(self, layer: _LayerWeights, prefix: str) -> None:
        layer.bytes = self.precision == "int8"
        for name in ("qkv", "out"):
            self._point(getattr(layer, name), f"{prefix}{name}.", "panels bias scales sums")
        self._point(layer, prefix, "w_in b_in in_scales in_sums w_out b_out out_scales")
        for name in ("attention_norm", "ffn_norm"):
            self._point(getattr(layer, name), f"{prefix}{name}.", "weight bias")

    def _point(self, structure: Structure, prefix: str, names: str) -> None:
        """Set the fields to where the weights of these names are; some precisions lack some."""
        for name in names.split():
            tensor = self._weights.get(prefix + name)
            setattr(structure, name, None if tensor is None else tensor.data_ptr())


def private(named: Iterable[Named]) -> dict[str, Tensor]:
    """Weights for this process alone, the large ones in huge pages."""
    kept = {}
    for name, tensor in named:
        if tensor.nbytes >= HUGE_PAGE:
            place = _empty(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
            kept[name] = place.copy_(tensor)
        else:
            # A part of a mapped file would keep all of it in memory.
            kept[name] = tensor.clone()
    return kept


def _empty(size: int) -> Tensor:
    """Memory of `size` bytes, in huge pages where it is as large: weights are read end to end."""
    if size < HUGE_PAGE:
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size)
