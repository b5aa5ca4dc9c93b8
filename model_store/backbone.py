"""A backbone: the frozen encoder's config, tensors and tokenizer, in and out of the store.

Importing turns a Hugging Face checkpoint into our layout once; loading maps the file, so that all
processes of a machine share its pages. Knows nothing of tasks.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from model_store.checkpoint import FAMILIES, canonical_tensors, read_config, read_tensors
from model_store.errors import BackboneError, UnsupportedCheckpointError
from model_store.manifest import Frozen, describe

if TYPE_CHECKING:
    from model_store.store import BackboneInfo, Store

TENSORS_FILE = "model.safetensors"
CONFIG_FILE = "backbone.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_SOURCES = (
    TOKENIZER_FILE,
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spiece.model",
)

Activation = Literal["gelu", "gelu_tanh", "relu"]
Positive = Annotated[int, Field(gt=0)]


class EncoderConfig(Frozen):
    """What the forward needs to know; families differ by these values alone.

    `hidden` H, `embedding` E (differs from H only in small ELECTRA models), `layers` L, `heads` A,
    `ffn` F. Position ids run from `position_offset`. `token_types` 0 means no such embedding.
    """

    family: Literal["bert", "roberta", "xlm-roberta", "distilbert", "electra"]
    vocabulary: Positive
    hidden: Positive
    embedding: Positive
    layers: Positive
    heads: Positive
    ffn: Positive
    positions: Positive
    position_offset: Annotated[int, Field(ge=0)]
    token_types: Annotated[int, Field(ge=0)]
    norm_eps: Annotated[float, Field(gt=0)]
    activation: Activation
    mlm_activation: Activation
    has_mlm: bool
    tied_decoder: bool
    mask_token_id: int | None

    @property
    def max_tokens(self) -> int:
        """Longest sequence, special tokens and soft prompt included."""
        return self.positions - self.position_offset

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a backbone of this config has."""
        hidden, ffn, width = self.hidden, self.ffn, self.embedding
        shapes: dict[str, tuple[int, ...]] = {
            "embeddings.word": (self.vocabulary, width),
            "embeddings.position": (self.positions, width),
            "embeddings.norm.weight": (width,),
            "embeddings.norm.bias": (width,),
        }
        if self.token_types:
            shapes["embeddings.token_type"] = (self.token_types, width)
        if width != hidden:
            shapes["embeddings.projection.weight"] = (hidden, width)
            shapes["embeddings.projection.bias"] = (hidden,)
        layer: dict[str, tuple[int, ...]] = {
            "qkv.weight": (3 * hidden, hidden),
            "qkv.bias": (3 * hidden,),
            "attention_out.weight": (hidden, hidden),
            "ffn_in.weight": (ffn, hidden),
            "ffn_in.bias": (ffn,),
            "ffn_out.weight": (ffn, hidden),
        }
        for name in ("attention_out.bias", "ffn_out.bias"):
            layer[name] = (hidden,)
        for norm in ("attention_norm", "ffn_norm"):
            layer[f"{norm}.weight"] = layer[f"{norm}.bias"] = (hidden,)
        for number in range(self.layers):
            shapes |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
        if self.has_mlm:
            shapes["mlm.dense.weight"] = (width, hidden)
            for name in ("mlm.dense.bias", "mlm.norm.weight", "mlm.norm.bias"):
                shapes[name] = (width,)
            shapes["mlm.decoder.bias"] = (self.vocabulary,)
            if not self.tied_decoder:
                shapes["mlm.decoder.weight"] = (self.vocabulary, width)
        return shapes


@dataclass(frozen=True)
class Backbone:
    """A stored backbone, mapped into memory. Tensors are fp32 and must not be written to."""

    name: str
    fingerprint: str
    config: EncoderConfig
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, shape and little-endian fp32 bytes of all tensors in order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}:{list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def import_checkpoint(source: str, store: "Store", name: str | None = None) -> "BackboneInfo":
    """Put the checkpoint `source` (a folder or a Hugging Face id) into the store, once.

    Raises `BackboneError` (with the store unchanged) for anything that is not a supported
    safetensors checkpoint with every tensor and a tokenizer in place.
    """
    folder = _checkpoint_folder(source)
    raw = read_config(folder)
    tensors_in = read_tensors(folder)
    tokenizer, mask_token_id = _read_tokenizer(folder)
    config = _encoder_config(raw, tensors_in, mask_token_id)
    tensors = canonical_tensors(tensors_in, config.family, config.shapes())
    tied = config.has_mlm and "mlm.decoder.weight" not in tensors
    if tied and not raw.get("tie_word_embeddings", True):
        raise BackboneError(
            "missing tensor: mlm.decoder.weight (in our names); config.json says that the MLM "
            "decoder is not tied to the word embeddings"
        )
    config = config.model_copy(update={"tied_decoder": tied})
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= config.vocabulary:
        raise BackboneError(
            f"{source}: the tokenizer has a token {highest}, the embedding table "
            f"{config.vocabulary} rows; they belong to different models"
        )
    fingerprint = fingerprint_of(tensors)
    with store.staging() as staging:
        save_file(dict(sorted(tensors.items())), staging / TENSORS_FILE)
        (staging / CONFIG_FILE).write_text(config.model_dump_json(indent=1))
        tokenizer.save(str(staging / TOKENIZER_FILE))
        return store.add_backbone(fingerprint, name or _short_name(source), staging)


def load_backbone(path: Path, name: str = "") -> Backbone:
    """Map the stored backbone in folder `path`; its last component is the fingerprint."""
    try:
        config = EncoderConfig.model_validate_json((path / CONFIG_FILE).read_text())
        tokenizer = Tokenizer.from_file(str(path / TOKENIZER_FILE))
        with safe_open(path / TENSORS_FILE, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except ValidationError as error:
        raise BackboneError(f"{path / CONFIG_FILE}: {describe(error)}") from None
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"{path}: the stored backbone is damaged: {error}") from None
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if shapes != config.shapes():
        raise BackboneError(
            f"{path}: the stored backbone is damaged: tensors do not fit its config"
        )
    return Backbone(name or path.name[:12], path.name, config, tensors, tokenizer)


def _checkpoint_folder(source: str) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise BackboneError(
            f"{source!r} is neither a folder nor a Hugging Face id such as org/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BackboneError(
            f"{source!r} is no folder here, and fetching it from the Hugging Face hub failed: "
            f"{reason}"
        ) from None


def _short_name(source: str) -> str:
    path = Path(source)
    return path.resolve().name if path.is_dir() else source


def _read_tokenizer(folder: Path) -> tuple[Tokenizer, int | None]:
    from transformers import AutoTokenizer

    # Without this, transformers makes up an empty tokenizer of the config's family.
    if not any((folder / name).exists() for name in TOKENIZER_SOURCES):
        raise BackboneError(
            f"{folder}: no tokenizer; one of these files is needed: {', '.join(TOKENIZER_SOURCES)}"
        )
    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    except Exception as error:  # noqa: BLE001 - transformers raises many kinds for a bad folder
        raise BackboneError(f"{folder}: no usable tokenizer: {error}") from None
    # Lengths are decided per task, and sequences are packed without padding.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, loaded.mask_token_id


def _encoder_config(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], mask_token_id: int | None
) -> EncoderConfig:
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedCheckpointError(
            f"config.json: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    for key, wanted in (("position_embedding_type", "absolute"), ("is_decoder", False)):
        if raw.get(key, wanted) != wanted:
            raise UnsupportedCheckpointError(f"config.json: {key} {raw[key]!r} is not supported")
    # The head's first tensor stands in every family's MLM checkpoint and in no other.
    has_mlm = any(
        name.startswith(
            ("cls.predictions.", "lm_head.", "vocab_transform.", "generator_predictions.")
        )
        for name in tensors
    )
    distil = family == "distilbert"
    keys = {
        "hidden": "dim" if distil else "hidden_size",
        "layers": "n_layers" if distil else "num_hidden_layers",
        "heads": "n_heads" if distil else "num_attention_heads",
        "ffn": "hidden_dim" if distil else "intermediate_size",
        "activation": "activation" if distil else "hidden_act",
    }
    try:
        values = {ours: raw[theirs] for ours, theirs in keys.items()}
        offset = raw.get("pad_token_id", 1) + 1 if "roberta" in family else 0
        config = EncoderConfig(
            family=family,
            vocabulary=raw["vocab_size"],
            embedding=raw.get("embedding_size", values["hidden"])
            if family == "electra"
            else values["hidden"],
            positions=raw["max_position_embeddings"],
            position_offset=offset,
            token_types=0 if distil else raw.get("type_vocab_size", 2),
            norm_eps=1e-12 if distil else raw.get("layer_norm_eps", 1e-12),
            has_mlm=has_mlm,
            tied_decoder=False,
            mask_token_id=mask_token_id,
            # RoBERTa's and ELECTRA's MLM heads use gelu whatever the encoder's activation.
            mlm_activation="gelu"
            if "roberta" in family or family == "electra"
            else _activation(values["activation"]),
            **(values | {"activation": _activation(values["activation"])}),
        )
    except KeyError as error:
        raise BackboneError(f"config.json: {error.args[0]} is missing") from None
    except TypeError:
        raise BackboneError("config.json: pad_token_id must be a number") from None
    except ValidationError as error:
        raise BackboneError(f"config.json: {describe(error)}") from None
    if config.hidden % config.heads:
        raise BackboneError(
            f"config.json: {config.hidden} hidden units do not divide among {config.heads} heads"
        )
    return config


def _activation(name: object) -> Activation:
    known: dict[object, Activation] = {
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "relu": "relu",
    }
    if name not in known:
        raise UnsupportedCheckpointError(
            f"config.json: activation {name!r} is not supported; "
            f"supported: {', '.join(map(str, known))}"
        )
    return known[name]
