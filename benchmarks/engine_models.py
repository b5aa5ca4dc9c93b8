"""The models that the engine benchmark runs, for ours and for the peers: the same weights.

BERT-base has random weights, MiniLM-L6 those of the demo. Every contestant reads the first token
with the same small linear head. The tasks' neurons are drawn by chance.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.ready_made import checkpoint_folder
from model_store.artifact import Overlay
from model_store.backbone import Backbone, EncoderConfig, import_checkpoint, load_backbone
from model_store.manifest import Manifest
from model_store.packing import Read
from model_store.plan import LinearHead
from model_store.store import Store

LABELS = ("no", "yes")


@dataclass(frozen=True)
class Model:
    """A checkpoint folder, the backbone made of it, and the head that all contestants have."""

    name: str
    folder: Path
    backbone: Backbone
    head: LinearHead

    @property
    def config(self) -> EncoderConfig:
        """The backbone's."""
        return self.backbone.config


class Classifier(nn.Module):
    """What the peers run: the `transformers` encoder and the head on its first token."""

    def __init__(self, encoder: nn.Module, head: LinearHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(head.weight.shape[1], head.weight.shape[0])
        self.head.weight = nn.Parameter(head.weight)
        self.head.bias = nn.Parameter(head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[B, T] -> [B, C]` logits."""
        encoded = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        logits: Tensor = self.head(encoded.last_hidden_state[:, 0])
        return logits


def open_model(name: str, work: Path) -> Model:
    """The model `bert-base` or `minilm-l6`, kept in the folder `work`."""
    if name == "minilm-l6":
        return model_of(name, checkpoint_folder(), work)
    if name == "bert-base":
        folder = work / "checkpoints" / name
        if not (folder / "tokenizer.json").is_file():
            _random_bert(folder)
        return model_of(name, folder, work)
    raise ValueError(f"unknown model {name!r}")


def model_of(name: str, folder: Path, work: Path) -> Model:
    """The model of a checkpoint folder; its backbone is put into the store `work/store`."""
    store = Store(work / "store")
    known = {info.name: info for info in store.backbones()}
    info = known.get(name) or import_checkpoint(str(folder), store, name)
    backbone = load_backbone(store.backbone_path(info.fingerprint), name)
    generator = torch.Generator().manual_seed(0)
    hidden = backbone.config.hidden
    weight = torch.randn(len(LABELS), hidden, generator=generator) / hidden**0.5
    return Model(name, folder, backbone, LinearHead(weight, torch.zeros(len(LABELS))))


def _random_bert(folder: Path) -> None:
    """A checkpoint of BERT-base's shape; MiniLM-L6 has the same vocabulary, so its tokenizer."""
    import transformers

    _quiet()
    torch.manual_seed(0)
    encoder = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)
    encoder.save_pretrained(folder)
    # The tokenizer comes last: it marks a folder that is complete.
    (folder / "tokenizer.json").write_bytes((checkpoint_folder() / "tokenizer.json").read_bytes())


def classifier(model: Model, dtype: torch.dtype, attention: str = "sdpa") -> Classifier:
    """The model as `transformers` runs it, in `dtype`."""
    import transformers

    _quiet()
    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    encoder = transformers.AutoModel.from_pretrained(
        model.folder, add_pooling_layer=False, **settings
    )
    return Classifier(encoder, model.head).to(dtype).eval()


def _quiet() -> None:
    """`transformers` would report the pooler's weights, which nobody reads, as unexpected."""
    import transformers

    untyped: Any = transformers.logging
    untyped.set_verbosity_error()
    untyped.disable_progress_bar()


def random_overlay(
    model: Model,
    number: int,
    keep: float,
    *,
    prompt_tokens: int = 0,
    read: Read = "cls",
) -> Overlay:
    """Task `number`: the model's head, and `keep` of each layer's neurons, drawn by chance."""
    config = model.config
    generator = torch.Generator().manual_seed(number)
    kept = round(keep * config.ffn)
    neurons = tuple(
        torch.randperm(config.ffn, generator=generator)[:kept].sort().values.int()
        for _ in range(config.layers)
    )
    prompt = None
    if prompt_tokens:
        prompt = torch.randn(prompt_tokens, config.embedding, generator=generator)
    components = ("ffn_neurons", "prompt", "head") if prompt_tokens else ("ffn_neurons", "head")
    manifest = Manifest.model_validate(
        {
            "task": f"task-{number}",
            "labels": LABELS,
            "backbone": {"name": model.name, "fingerprint": model.backbone.fingerprint},
            "template": ("{text}",),
            "max_tokens": config.max_tokens - prompt_tokens,
            "prompt": {"tokens": prompt_tokens},
            "read": read,
            "head": {"kind": "linear"},
            "components": components,
            "ffn_kept": (kept,) * config.layers,
            "ffn_width": config.ffn,
            "provenance": {
                "command": "made for a benchmark",
                "created": "2026-01-01T00:00:00Z",
                "seed": number,
            },
            "golden": ({"input": "a text", "scores": (0.5, 0.5)},),
        }
    )
    return Overlay(manifest, neurons, prompt, model.head)


def useful_operations(
    config: EncoderConfig, lengths: list[int], keep: float, prompt_tokens: int = 0
) -> float:
    """Multiplications and additions that the pruned network needs for these sentences.

    Real tokens alone; of the last layer only what the first token's vector needs. Operations beside
    the matrix products are left out.
    """
    hidden, kept = config.hidden, round(keep * config.ffn)
    counts = [length + prompt_tokens for length in lengths]
    tokens, sentences = sum(counts), len(counts)
    one_token = 4 * hidden * hidden + 2 * hidden * kept  # q, k, v, o and the two of the FFN
    full = tokens * one_token + sum(2 * count * count * hidden for count in counts)
    last = tokens * 2 * hidden * hidden  # k and v
    last += sentences * (one_token - 2 * hidden * hidden) + 2 * tokens * hidden
    return 2.0 * ((config.layers - 1) * full + last)


def zipf_tasks(tasks: int, count: int, seed: int) -> list[int]:
    """`count` draws of a task, where task k is asked for 1 / (k + 1) as often as task 0."""
    weights = [1 / (number + 1) for number in range(tasks)]
    return random.Random(seed).choices(range(tasks), weights, k=count)
