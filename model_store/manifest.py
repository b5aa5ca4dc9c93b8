"""What an artifact says about itself: the manifest and its validation.

Knows no torch and no files, so that the command line and the store can read manifests cheaply. The
format text is `docs/artifact-format.md`; the JSON Schema beside it is generated from these classes.
"""

import json
import re
import sys
from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model_store.errors import ManifestError

FORMAT_VERSION = 1
METADATA_KEY = "taskbone"
"""Key in the safetensors header's `__metadata__` whose value is the manifest as JSON."""

MAX_HEADER_BYTES = 4 << 20
# What a hostile header of that size could be full of, each thing many times its size in memory.
MAX_BRACKETS, MAX_KEYS, MAX_DIMENSIONS = 100_000, 1_000, 8

TASK_NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
TEMPLATE_FIELDS = ("text", "text1", "text2", "mask")
_FIELD = re.compile(r"\{([^{}]*)\}")

TaskName = Annotated[str, Field(pattern=TASK_NAME_PATTERN)]
Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
TextInput = str | tuple[str, str]
"""One input: a text, or a pair of texts."""
Short = Annotated[str, Field(min_length=1, max_length=1_000)]
Long = Annotated[str, Field(max_length=10_000)]
# Bounds beyond any use, so that a hostile file cannot make its checking expensive.
MAX_LAYERS, MAX_LABELS, MAX_GOLDEN = 1_000, 10_000, 64
Rank = Annotated[int, Field(ge=0, le=1_024)]
Count = Annotated[int, Field(ge=0, le=1 << 24)]
# Every list stops at its first wrong entry (`fail_fast`): a million wrong ones are one error.
Layers = Annotated[tuple[Count, ...], Field(max_length=MAX_LAYERS, fail_fast=True)]
Ranks = Annotated[tuple[Rank, ...], Field(max_length=MAX_LAYERS, fail_fast=True)]


class Frozen(BaseModel):
    """Base of all records that are read from or written to JSON: immutable, nothing unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BackboneReference(Frozen):
    """The backbone that the overlay is for. The fingerprint decides; the name is for people."""

    name: str
    fingerprint: Fingerprint


class LinearHead(Frozen):
    """`scores = softmax(W x + b)`; tensors `head.weight [C, H]` and `head.bias [C]`."""

    kind: Literal["linear"] = "linear"


class VerbalizerHead(Frozen):
    """The backbone's MLM head at the read position, one token per label, in label order."""

    kind: Literal["verbalizer"] = "verbalizer"
    words: Annotated[tuple[Short, ...], Field(max_length=MAX_LABELS, fail_fast=True)]
    token_ids: Annotated[tuple[Count, ...], Field(max_length=MAX_LABELS, fail_fast=True)]


class Prompt(Frozen):
    """A soft prompt: `tokens` vectors directly after the first token, positions running on."""

    tokens: Annotated[int, Field(ge=0, le=512)]
    placement: Literal["after_first_token"] = "after_first_token"


class Golden(Frozen):
    """An input and the probabilities, in label order, that the overlay gives it in fp32."""

    input: Long | tuple[Long, Long]
    scores: Annotated[tuple[Share, ...], Field(max_length=MAX_LABELS, fail_fast=True)]


class DeltaRanks(Frozen):
    """Ranks of the low-rank deltas, one per layer; 0: that layer has none.

    Tensors `delta.{l}.{part}.down [r, in]` and `delta.{l}.{part}.up [out, r]`, in bf16; a kept
    weight is the backbone's plus `up @ down`. Queries, keys and values have one rank together.
    """

    qkv: Ranks
    o: Ranks
    ffn_in: Ranks
    ffn_out: Ranks


class Measurement(Frozen):
    """One figure: `value` of `metric` on `rows` rows of a split of the task's data.

    `dense` is the whole network, prompt-tuned; `localized` keeps the overlay's neurons and heads;
    `recovered` has low-rank deltas besides.
    """

    network: Literal["dense", "localized", "recovered"]
    split: Literal["validation", "test"]
    metric: Literal["accuracy", "macro_f1", "matthews"]
    value: Annotated[float, Field(ge=-1.0, le=1.0)]
    rows: Annotated[int, Field(ge=1)]


class Provenance(Frozen):
    """How the overlay came to be; enough to make it again."""

    command: str
    created: str
    seed: int
    data_sha256: dict[str, str] = {}
    settings: dict[str, Any] = {}
    versions: dict[str, str] = {}
    hardware: str = ""


class Manifest(Frozen):
    """The manifest of format version 1. See `docs/artifact-format.md` for each field's meaning."""

    format_version: Literal[1] = 1
    task: TaskName
    description: Long = ""
    labels: Annotated[tuple[Short, ...], Field(min_length=2, max_length=MAX_LABELS, fail_fast=True)]
    backbone: BackboneReference
    template: Annotated[tuple[Long, ...], Field(min_length=1, max_length=2, fail_fast=True)]
    max_tokens: Annotated[Count, Field(ge=8)]
    prompt: Prompt
    read: Literal["cls", "mask", "mean"]
    head: Annotated[LinearHead | VerbalizerHead, Field(discriminator="kind")]
    components: Annotated[
        tuple[Literal["ffn_neurons", "prompt", "head", "heads", "scales", "norms", "deltas"], ...],
        Field(max_length=16, fail_fast=True),
    ]
    ffn_kept: Layers
    ffn_width: Annotated[Count, Field(ge=1)]
    heads_kept: Layers | None = None
    """Kept attention heads per layer; None: every layer keeps all."""
    deltas: DeltaRanks | None = None
    metrics: Annotated[tuple[Measurement, ...], Field(max_length=64, fail_fast=True)] = ()
    provenance: Provenance
    golden: Annotated[
        tuple[Golden, ...], Field(min_length=1, max_length=MAX_GOLDEN, fail_fast=True)
    ]

    @property
    def takes_pairs(self) -> bool:
        """Whether an input is a pair of texts instead of one text."""
        return any("{text1}" in part for part in self.template)

    @property
    def kept_share(self) -> float:
        """Share of all feed-forward neurons that the overlay keeps, 0 to 1."""
        return sum(self.ffn_kept) / (self.ffn_width * len(self.ffn_kept))

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels: every label must be named once")
        check_template(self.template)
        if not self.ffn_kept:
            raise ValueError("ffn_kept: one count per layer is needed")
        if max(self.ffn_kept) > self.ffn_width:
            raise ValueError(f"ffn_kept: {max(self.ffn_kept)} exceeds ffn_width {self.ffn_width}")
        self._check_head()
        self._check_components()
        self._check_layers()
        for number, golden in enumerate(self.golden):
            if len(golden.scores) != len(self.labels):
                raise ValueError(
                    f"golden.{number}.scores: {len(golden.scores)} for {len(self.labels)} labels"
                )
            if isinstance(golden.input, str) == self.takes_pairs:
                expected = "a pair of texts" if self.takes_pairs else "one text"
                raise ValueError(f"golden.{number}.input: the template takes {expected}")
        return self

    def _check_head(self) -> None:
        has_mask = any("{mask}" in part for part in self.template)
        if self.read == "mask" and not has_mask:
            raise ValueError("read: 'mask' needs a template with {mask}")
        if isinstance(self.head, VerbalizerHead):
            if self.read != "mask":
                raise ValueError("head: a verbalizer reads 'mask'")
            if len(set(self.head.token_ids)) != len(self.head.token_ids):
                raise ValueError("head: two labels have the same token")
            if not len(self.head.words) == len(self.head.token_ids) == len(self.labels):
                raise ValueError(
                    f"head: {len(self.head.words)} words and {len(self.head.token_ids)} token ids "
                    f"for {len(self.labels)} labels; one of each per label is needed"
                )

    def _check_components(self) -> None:
        expected = {"ffn_neurons"}
        if self.prompt.tokens:
            expected.add("prompt")
        if self.head.kind == "linear":
            expected.add("head")
        if self.heads_kept is not None:
            expected.add("heads")
        if self.deltas is not None:
            expected.add("deltas")
        # Nothing else in the manifest tells of these two: their shapes follow from what is kept.
        expected |= set(self.components) & {"scales", "norms"}
        if set(self.components) != expected or len(self.components) != len(expected):
            raise ValueError(
                f"components: {sorted(self.components)} given; "
                f"prompt, head, heads_kept and deltas mean {sorted(expected)}"
            )

    def _check_layers(self) -> None:
        """Every list that has an entry per layer has as many as `ffn_kept`."""
        layers = len(self.ffn_kept)
        if self.heads_kept is not None and len(self.heads_kept) != layers:
            raise ValueError(f"heads_kept: {len(self.heads_kept)} counts for {layers} layers")
        for name, ranks in self.deltas or ():
            if len(ranks) != layers:
                raise ValueError(f"deltas.{name}: {len(ranks)} ranks for {layers} layers")

    def to_json(self) -> str:
        """The manifest as one line of JSON, as it stands in an artifact.

        Fields that came after the first release and say nothing are left out, so that it still
        reads an artifact that has none of the components that it does not know.
        """
        later = ("heads_kept", "deltas")
        return self.model_dump_json(exclude={name for name in later if getattr(self, name) is None})

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse and validate. Raises `ManifestError` that names every wrong field."""
        try:
            _parse(text, MAX_KEYS)
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            raise ManifestError(f"manifest: {describe(error)}") from None
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"manifest: not JSON: {error}") from None


class VerifiedArtifact(Frozen):
    """Artifact bytes that `artifact.verify` has checked; what a store takes in."""

    data: bytes = Field(repr=False)
    digest: Fingerprint
    manifest: Manifest


def check_template(template: tuple[str, ...]) -> None:
    """Raise `ValueError` unless there is `{text}` once, or `{text1}` and `{text2}` once each."""
    fields = [field for part in template for field in _FIELD.findall(part)]
    unknown = sorted(set(fields) - set(TEMPLATE_FIELDS))
    if unknown:
        raise ValueError(f"template: unknown field {{{unknown[0]}}}; known: {TEMPLATE_FIELDS}")
    texts = sorted(field for field in fields if field != "mask")
    if texts not in (["text"], ["text1", "text2"]):
        raise ValueError("template: needs {text} once, or {text1} and {text2} once each")
    if fields.count("mask") > 1:
        raise ValueError("template: {mask} may stand once")
    if any(not _FIELD.search(part) for part in template):
        raise ValueError("template: every part needs a field")


def describe(error: ValidationError) -> str:
    """A pydantic error as one line: `field: problem (given ...)`, several joined by `; `."""
    problems = []
    shown_most = 10
    for item in error.errors(include_url=False)[:shown_most]:
        place = ".".join(str(part) for part in item["loc"])[:200]
        message = item["msg"].removeprefix("Value error, ")[:300]
        given = repr(item["input"])
        shown = f" (given {given[:80]})" if item["type"] not in ("missing", "value_error") else ""
        problems.append(f"{place}: {message}{shown}" if place else f"{message}{shown}")
    if error.error_count() > shown_most:
        problems.append(f"and {error.error_count() - shown_most} more")
    return "; ".join(problems)


def _parse(text: str | bytes, max_keys: int) -> Any:
    """JSON in which every key stands once and no object has more than `max_keys`, or `ValueError`.

    Refuses what would take many times its size of memory before anything of it is made.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) > max_keys:
            raise ValueError(f"an object has {len(pairs)} keys; at most {max_keys} are expected")
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(name for name, _ in pairs).items()
            repeated = next(name for name, count in counts if count > 1)
            raise ValueError(f"the key {repeated[:80]!r} stands twice")
        return result

    encoded = text.encode() if isinstance(text, str) else text
    brackets = encoded.count(b"[") + encoded.count(b"{")
    if brackets > MAX_BRACKETS:
        raise ValueError(f"it has {brackets} opening brackets; at most {MAX_BRACKETS} are expected")
    return json.loads(encoded.decode(), object_pairs_hook=once)


def read_header(data: bytes) -> tuple[Manifest, dict[str, tuple[str, tuple[int, ...]]]]:
    """The manifest and each tensor's (dtype, shape) from an artifact's bytes, without the values.

    Raises `ManifestError` where the file is no safetensors file or has no valid manifest.
    """
    size = int.from_bytes(data[:8], "little")
    if MAX_HEADER_BYTES < size <= len(data):
        raise ManifestError(
            f"the header has {size} bytes; an artifact's has at most {MAX_HEADER_BYTES}"
        )
    if len(data) < 8 or not 2 <= size <= len(data) - 8:
        raise ManifestError("not an artifact: the file does not start with a safetensors header")
    try:
        header = _parse(data[8 : 8 + size], MAX_BRACKETS)
    except (ValueError, RecursionError) as error:
        raise ManifestError(
            f"not an artifact: the safetensors header is damaged: {error}"
        ) from None
    if not isinstance(header, dict):
        raise ManifestError("not an artifact: the safetensors header is damaged: it is no object")
    metadata = header.pop("__metadata__", None)
    text = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ManifestError(
            f"not an artifact: the safetensors metadata has no {METADATA_KEY!r} entry"
        )
    return Manifest.from_json(text), {name: _shape(name, item) for name, item in header.items()}


def _shape(name: str, entry: object) -> tuple[str, tuple[int, ...]]:
    """One tensor's (dtype, shape) from its entry in the header."""
    dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (0, 0)
    if (
        isinstance(dtype, str)
        and isinstance(shape, list)
        and len(shape) <= MAX_DIMENSIONS
        and all(type(side) is int and 0 <= side < 1 << 48 for side in shape)
    ):
        return dtype[:20], tuple(shape)
    raise ManifestError(
        f"not an artifact: the safetensors header is damaged: tensor {name[:80]!r} needs a dtype "
        f"and a shape of at most {MAX_DIMENSIONS} sizes"
    )


if __name__ == "__main__":
    sys.stdout.write(json.dumps(Manifest.model_json_schema(), indent=1) + "\n")
