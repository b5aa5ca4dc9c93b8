"""One artifact file <-> one overlay: reading, writing, and every check that needs the tensors.

The format is `docs/artifact-format.md`. Knows nothing of where artifacts are kept.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from model_store.backbone import Backbone, EncoderConfig
from model_store.encoder import Encoder
from model_store.errors import ArtifactError, BackboneMismatchError, GoldenMismatchError
from model_store.manifest import (
    METADATA_KEY,
    Manifest,
    TextInput,
    VerbalizerHead,
    VerifiedArtifact,
    read_header,
)
from model_store.packing import Item, pack
from model_store.plan import Changes, LinearHead, Plan, owns_layers
from model_store.plan import VerbalizerHead as VerbalizerRows
from model_store.tokenization import InputEncoder

GOLDEN_TOLERANCE = 1e-3
"""Largest difference in a golden probability, in fp32 on any machine."""

SHOWN_LABELS = 5
"""Labels of the worst golden input that an error shows: those that differ most."""


@dataclass(frozen=True)
class Overlay:
    """Everything that one task adds to a backbone, on the CPU."""

    manifest: Manifest
    neurons: tuple[Tensor, ...]  # L x integers [K_l], ascending
    prompt: Tensor | None  # fp32 [P, E]
    head: LinearHead | None  # None: a verbalizer, which the manifest describes
    heads: tuple[Tensor, ...] | None = None  # L x int32 [a_l], ascending; None: all heads
    changes: Changes = field(default_factory=dict)
    """Scales, norms and deltas, under their tensor names; see `model_store.plan`."""

    @property
    def owns_layers(self) -> bool:
        """Whether its attention is its own: in torch on the CPU it is then a batch by itself."""
        return self.heads is not None or owns_layers(self.changes)

    def plan(self, encoder: Encoder, *, sliced: bool = True) -> Plan:
        """The overlay made ready to run on `encoder`: slices gathered and packed, prompt cached.

        Where tasks share the backbone's layers, `sliced=False` copies no weight and caches nothing:
        the neurons are read from the backbone by their numbers. The answers are the same.
        """
        device = encoder.ops.device
        shares = encoder.ops.shares_layers
        sliced = sliced or not shares
        head: LinearHead | VerbalizerRows
        if isinstance(self.manifest.head, VerbalizerHead):
            head = encoder.verbalizer(torch.tensor(self.manifest.head.token_ids))
        else:
            assert self.head is not None, "a linear head has tensors"
            head = LinearHead(self.head.weight.to(device), self.head.bias.to(device))
        make = encoder.ffn if sliced else encoder.ffn_beside
        ffn = tuple(make(number, rows, self.changes) for number, rows in enumerate(self.neurons))
        layers = adapters = None
        if self.owns_layers:
            heads = self.heads or (None,) * encoder.config.layers
            numbered = list(enumerate(heads))
            if shares:
                adapters = tuple(encoder.adapter(n, kept, self.changes) for n, kept in numbered)
            else:
                layers = tuple(encoder.layer(n, kept, self.changes) for n, kept in numbered)
        prompt = cache = None
        if self.prompt is not None:
            prompt = self.prompt.to(device=device, dtype=encoder.ops.dtype if shares else None)
            if not shares:
                cache = encoder.prompt_cache(prompt, None if layers is None else layers[0])
        table = encoder.ops.tabulate(ffn, adapters)
        return Plan(self.manifest.read, head, ffn, prompt, cache, layers, adapters, table)


def write(overlay: Overlay) -> bytes:
    """The overlay as an artifact file's bytes; the same overlay always gives the same bytes."""
    tensors = {f"ffn.{layer}.neurons": rows.int() for layer, rows in enumerate(overlay.neurons)}
    if overlay.prompt is not None:
        tensors["prompt"] = overlay.prompt
    if overlay.head is not None:
        tensors["head.weight"], tensors["head.bias"] = overlay.head.weight, overlay.head.bias
    if overlay.heads is not None:
        tensors |= {f"heads.{layer}.kept": rows for layer, rows in enumerate(overlay.heads)}
    tensors |= overlay.changes
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(contiguous, {METADATA_KEY: overlay.manifest.to_json()})


def read(data: bytes, config: EncoderConfig, fingerprint: str) -> Overlay:
    """Parse and check an artifact against its backbone; nothing is allocated before shapes agree.

    Raises `ManifestError`, `BackboneMismatchError` or `ArtifactError`, naming what is wrong.
    """
    manifest, tensors = read_header(data)
    _check_backbone(manifest, config, fingerprint)
    _check_tensors(tensors, manifest, config)
    loaded = _load(data)
    for name, tensor in loaded.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ArtifactError(f"tensor {name!r} holds NaN or infinite values")
    neurons = tuple(loaded[f"ffn.{layer}.neurons"] for layer in range(config.layers))
    for layer, rows in enumerate(neurons):
        _check_indices(f"ffn.{layer}.neurons", rows, config.ffn)
    if config.ffn < 1 << 16:  # half the memory of a task that waits to be asked
        neurons = tuple(rows.to(torch.uint16) for rows in neurons)
    heads = None
    if manifest.heads_kept is not None:
        heads = tuple(loaded[f"heads.{layer}.kept"] for layer in range(config.layers))
        for layer, rows in enumerate(heads):
            _check_indices(f"heads.{layer}.kept", rows, config.heads)
    head = (
        LinearHead(loaded["head.weight"], loaded["head.bias"]) if "head.weight" in loaded else None
    )
    changes = {name: loaded[name] for name in _change_shapes(manifest, config)}
    return Overlay(manifest, neurons, loaded.get("prompt"), head, heads, changes)


def verify(data: bytes, config: EncoderConfig, fingerprint: str) -> VerifiedArtifact:
    """`read`, and the proof of it that a store asks for."""
    overlay = read(data, config, fingerprint)
    return VerifiedArtifact(
        data=data, digest=hashlib.sha256(data).hexdigest(), manifest=overlay.manifest
    )


def rename(data: bytes, task: str) -> bytes:
    """The same overlay under another task name. Raises as `Manifest.from_json` for a bad name."""
    manifest, _ = read_header(data)
    renamed = Manifest.from_json(manifest.model_copy(update={"task": task}).to_json())
    return safetensors.torch.save(_load(data), {METADATA_KEY: renamed.to_json()})


def probabilities(
    encoder: Encoder, backbone: Backbone, overlay: Overlay, inputs: Sequence[TextInput]
) -> Tensor:
    """Class probabilities of `inputs`, `[B, C]` in fp32, as one batch: the plain way."""
    manifest = overlay.manifest
    plan = overlay.plan(encoder)
    texts = InputEncoder(
        backbone.tokenizer, backbone.config, manifest.template, manifest.max_tokens
    )
    batch = pack([Item(encoding, 0) for encoding in texts.encode(inputs)], [plan.layout])
    with torch.inference_mode():
        packed = encoder.forward(batch, [plan])[0].softmax(dim=1).cpu()
    result = torch.empty_like(packed)
    result[list(batch.order)] = packed
    return result


def check_golden(encoder: Encoder, backbone: Backbone, overlay: Overlay) -> None:
    """Raise `GoldenMismatchError` unless the golden inputs give their promised probabilities."""
    golden = overlay.manifest.golden
    given = probabilities(encoder, backbone, overlay, [item.input for item in golden])
    expected = torch.tensor([item.scores for item in golden])
    compare_golden(overlay.manifest, given, expected, GOLDEN_TOLERANCE)


def compare_golden(manifest: Manifest, given: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare probabilities `[B, C]`. Raises `GoldenMismatchError` that names the worst input."""
    difference = (given - expected).abs()
    worst = int(difference.amax(dim=1).argmax())
    if bool((difference <= tolerance).all()):
        return
    classes = sorted(
        difference[worst].topk(min(SHOWN_LABELS, difference.shape[1])).indices.tolist()
    )
    got, wanted = (
        ", ".join(f"{manifest.labels[c][:40]!r} {float(row[c]):.4f}" for c in classes)
        for row in (given[worst], expected[worst])
    )
    raise GoldenMismatchError(
        f"task {manifest.task!r}: golden input {worst} gives {got}; the artifact promises {wanted} "
        f"(tolerance {tolerance})"
    )


def _load(data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"not a whole safetensors file: {str(error)[:300]}") from None


def _check_backbone(manifest: Manifest, config: EncoderConfig, fingerprint: str) -> None:
    if manifest.backbone.fingerprint != fingerprint:
        raise BackboneMismatchError(
            f"task {manifest.task!r} was made for backbone {manifest.backbone.name[:80]!r} "
            f"({manifest.backbone.fingerprint[:12]}), this one is {fingerprint[:12]}; "
            "localize the task again on this backbone"
        )
    if len(manifest.ffn_kept) != config.layers or manifest.ffn_width != config.ffn:
        raise ArtifactError(
            f"ffn_kept has {len(manifest.ffn_kept)} layers of width {manifest.ffn_width}; "
            f"the backbone has {config.layers} of width {config.ffn}"
        )
    if manifest.heads_kept is not None and max(manifest.heads_kept) > config.heads:
        raise ArtifactError(
            f"heads_kept: {max(manifest.heads_kept)} exceeds the backbone's {config.heads} heads"
        )
    if manifest.max_tokens + manifest.prompt.tokens > config.max_tokens:
        raise ArtifactError(
            f"max_tokens {manifest.max_tokens} and {manifest.prompt.tokens} prompt tokens exceed "
            f"the backbone's longest sequence of {config.max_tokens}"
        )
    if isinstance(manifest.head, VerbalizerHead):
        if not config.has_mlm:
            raise ArtifactError("head: a verbalizer needs a backbone with an MLM head")
        beyond = [token for token in manifest.head.token_ids if token >= config.vocabulary]
        if beyond:
            raise ArtifactError(
                f"head.token_ids: {beyond[0]} is beyond the vocabulary of {config.vocabulary}"
            )


def _check_tensors(
    tensors: dict[str, tuple[str, tuple[int, ...]]], manifest: Manifest, config: EncoderConfig
) -> None:
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        f"ffn.{layer}.neurons": ("I32", (count,)) for layer, count in enumerate(manifest.ffn_kept)
    }
    if manifest.prompt.tokens:
        expected["prompt"] = ("F32", (manifest.prompt.tokens, config.embedding))
    if manifest.head.kind == "linear":
        classes = len(manifest.labels)
        expected["head.weight"] = ("F32", (classes, config.hidden))
        expected["head.bias"] = ("F32", (classes,))
    for layer, count in enumerate(manifest.heads_kept or ()):
        expected[f"heads.{layer}.kept"] = ("I32", (count,))
    expected |= _change_shapes(manifest, config)
    for name in sorted(expected.keys() - tensors.keys()):
        raise ArtifactError(f"missing tensor {name!r}")
    for name in sorted(tensors.keys() - expected.keys()):
        raise ArtifactError(f"unknown tensor {name[:80]!r}; the manifest does not describe it")
    for name, found in tensors.items():
        if found != expected[name]:
            raise ArtifactError(
                f"tensor {name!r} is {found[0]} {list(found[1])}; "
                f"{expected[name][0]} {list(expected[name][1])} is expected"
            )


def _change_shapes(
    manifest: Manifest, config: EncoderConfig
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every scale, norm and delta that the manifest announces."""
    result: dict[str, tuple[str, tuple[int, ...]]] = {}
    hidden, width = config.hidden, config.hidden // config.heads
    for layer, kept in enumerate(manifest.ffn_kept):
        if "scales" in manifest.components:
            result[f"ffn.{layer}.scale"] = ("F32", (kept,))
            result[f"ffn.{layer}.bias"] = ("F32", (hidden,))
        if "norms" in manifest.components:
            for norm in ("attention", "ffn"):
                result[f"norm.{layer}.{norm}.weight"] = ("F32", (hidden,))
                result[f"norm.{layer}.{norm}.bias"] = ("F32", (hidden,))
        if manifest.deltas is None:
            continue
        heads = config.heads if manifest.heads_kept is None else manifest.heads_kept[layer]
        ranks, attended = manifest.deltas, heads * width
        sides = dict.fromkeys("qkv", (ranks.qkv[layer], hidden, attended))
        sides["o"] = (ranks.o[layer], attended, hidden)
        sides["ffn_in"] = (ranks.ffn_in[layer], hidden, kept)
        sides["ffn_out"] = (ranks.ffn_out[layer], kept, hidden)
        for part, (rank, inputs, outputs) in sides.items():
            if rank:
                result[f"delta.{layer}.{part}.down"] = ("BF16", (rank, inputs))
                result[f"delta.{layer}.{part}.up"] = ("BF16", (outputs, rank))
    return result


def _check_indices(name: str, rows: Tensor, width: int) -> None:
    if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < width):
        raise ArtifactError(f"tensor {name!r} has an index outside 0 to {width - 1}")
    if bool((rows[1:] <= rows[:-1]).any()):
        raise ArtifactError(f"tensor {name!r} is not sorted, or repeats an index")
