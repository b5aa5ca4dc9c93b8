"""Slow, obvious implementations, and small random checkpoints, that tests compare ours with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from model_store.packing import Batch
from model_store.plan import Gate, Part
from model_store.tokenization import Encoding

WORDS = """
the a cat dog film bank card is was not very good bad lost found of in on to and my new old red blue
big small what who where when how much money news game team win ##s ##ed ##ing
""".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert", "electra")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and the `transformers` model that was saved into it."""

    folder: Path
    model: Any


def save_tokenizer(folder: Path, model_max_length: int = 512) -> None:
    """A WordPiece tokenizer over a few words, with BERT's special tokens."""
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = SPECIAL + WORDS + letters + [f"##{letter}" for letter in letters] + list(".,:?!'")
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    fast: Any = PreTrainedTokenizerFast
    fast(
        tokenizer_object=tokenizer,
        model_max_length=model_max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)


def small_checkpoint(
    folder: Path, family: str, *, mlm: bool = True, seed: int = 0, **changes: Any
) -> Checkpoint:
    """A small random checkpoint of one family, written as `transformers` writes it."""
    import transformers

    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": 120,
        "max_position_embeddings": 66,
        "pad_token_id": 0,
    }
    usual = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    if family == "distilbert":
        usual = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}
    if family == "electra":
        usual["embedding_size"] = 16
    if "roberta" in family:
        usual["type_vocab_size"] = 1
        # RoBERTa's position ids start at pad_token_id + 1.
        common["pad_token_id"] = 1
    config_class, encoder_class, mlm_class = {
        "bert": ("BertConfig", "BertModel", "BertForMaskedLM"),
        "roberta": ("RobertaConfig", "RobertaModel", "RobertaForMaskedLM"),
        "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel", "XLMRobertaForMaskedLM"),
        "distilbert": ("DistilBertConfig", "DistilBertModel", "DistilBertForMaskedLM"),
        "electra": ("ElectraConfig", "ElectraModel", "ElectraForMaskedLM"),
    }[family]
    config = getattr(transformers, config_class)(**(common | usual | changes))
    config._attn_implementation = "eager"
    model = getattr(transformers, mlm_class if mlm else encoder_class)(config).eval()
    with torch.no_grad():  # larger and less regular than the usual initialization
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return Checkpoint(folder, model)


def base_model(model: Any) -> Any:
    """The encoder inside a `transformers` model with or without an MLM head."""
    return getattr(model, model.base_model_prefix, model)


def padded(encodings: Sequence[Encoding], pad: int) -> dict[str, Tensor]:
    """The usual padded form of a batch, as `transformers` takes it."""
    longest = max(len(encoding.token_ids) for encoding in encodings)
    ids = torch.full((len(encodings), longest), pad)
    types = torch.zeros_like(ids)
    mask = torch.zeros_like(ids)
    for row, encoding in enumerate(encodings):
        count = len(encoding.token_ids)
        ids[row, :count] = torch.tensor(encoding.token_ids)
        types[row, :count] = torch.tensor(encoding.token_types)
        mask[row, :count] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def transformers_hidden(
    model: Any, encodings: Sequence[Encoding], prompt: Tensor | None = None
) -> list[Tensor]:
    """Last hidden state of each sequence, soft prompt rows included, computed with padding.

    The prompt stands after the first token, as vectors in the place of word embeddings.
    """
    base = base_model(model)
    config = base.config
    inputs = padded(encodings, config.pad_token_id)
    words = base.get_input_embeddings()(inputs["input_ids"])
    mask, types = inputs["attention_mask"], inputs["token_type_ids"]
    length = 0
    if prompt is not None:
        length = len(prompt)
        rows = prompt.expand(len(words), *prompt.shape)
        words = torch.cat([words[:, :1], rows, words[:, 1:]], dim=1)
        ones = mask.new_ones(len(words), length)
        mask = torch.cat([mask[:, :1], ones, mask[:, 1:]], dim=1)
        types = torch.cat([types[:, :1], ones * 0, types[:, 1:]], dim=1)
    extra: dict[str, Tensor] = {}
    if config.model_type != "distilbert":
        extra["token_type_ids"] = types
    if "roberta" in config.model_type:  # with embeddings given it cannot tell padding
        positions = torch.arange(words.shape[1]) + config.pad_token_id + 1
        extra["position_ids"] = positions.expand(len(words), -1)
    hidden = base(inputs_embeds=words, attention_mask=mask, **extra).last_hidden_state
    return [
        hidden[row, : len(encoding.token_ids) + length] for row, encoding in enumerate(encodings)
    ]


def transformers_mlm(model: Any, hidden: Tensor) -> Any:
    """The MLM head of a `transformers` model on `hidden [n, H]`."""
    kind = model.config.model_type
    if kind == "bert":
        return model.cls(hidden)
    if "roberta" in kind:
        return model.lm_head(hidden)
    if kind == "distilbert":
        return model.vocab_projector(
            model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))
        )
    if kind == "electra":
        return model.generator_lm_head(model.generator_predictions(hidden))
    raise ValueError(kind)


def unpacked(rows: Tensor, batch: Batch) -> list[Tensor]:
    """Packed rows `[N, H]` cut into sequences, in the order in which the caller gave them."""
    lengths = [run.keys for run in batch.runs for _ in range(run.count)]
    parts = torch.split(rows, lengths)
    result = [rows[:0]] * len(parts)
    for index, part in zip(batch.order, parts, strict=True):
        result[index] = part
    return result


def neuron_gate(gates: Sequence[Tensor]) -> Gate:
    """A plan's gate that multiplies layer l's neurons by `gates[l]`, `[F]`."""

    def gate(layer: int, part: Part, x: Tensor) -> Tensor:
        return x * gates[layer] if part == "ffn_in" else x

    return gate
