"""Texts to token ids: the template, special tokens, and truncation that spares the template.

Used by localization and serving alike, so that a text means the same to both. Knows no torch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from model_store.backbone import EncoderConfig
from model_store.errors import InputError
from model_store.manifest import TextInput

_FIELDS = re.compile(r"(\{(?:text|text1|text2|mask)\})")
_TEXT_FIELD = ("{text}",)
_PAIR_FIELDS = ("{text1}", "{text2}")


@dataclass(frozen=True)
class Encoding:
    """One input as tokens, special tokens included, soft prompt not included."""

    token_ids: list[int]
    token_types: list[int]
    mask: int
    """Index of the mask token, or 0 (the first token) where the template has none."""


class InputEncoder:
    """Turns inputs of one task into `Encoding`s of at most `max_tokens` tokens."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: EncoderConfig,
        template: Sequence[str],
        max_tokens: int,
    ) -> None:
        """Raises `InputError` if the template has `{mask}` and the backbone no mask token."""
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer
        self._has_token_types = config.token_types > 1
        # Literal pieces and fields in turn, so that a text that holds "{mask}" stays a text.
        self._pieces = [_FIELDS.split(part) for part in template]
        self._pairs = any("{text1}" in part for part in template)
        self._mask_id = config.mask_token_id if any("{mask}" in part for part in template) else None
        self._mask_token = ""
        if any("{mask}" in part for part in template):
            token = None if self._mask_id is None else tokenizer.id_to_token(self._mask_id)
            if token is None:
                raise InputError("the template has {mask}, but the backbone has no mask token")
            self._mask_token = token

    def encode(self, inputs: Sequence[TextInput]) -> list[Encoding]:
        """Encode inputs; texts that are too long lose their ends, the longer of a pair first.

        Raises `InputError` for a pair where one text is expected, and the other way round.
        """
        fields = [self._fields(item, number) for number, item in enumerate(inputs)]
        encoded = self._tokenizer.encode_batch_fast([self._render(texts) for texts in fields])
        result = []
        for texts, item in zip(fields, encoded, strict=True):
            ids, types = item.ids, item.type_ids
            if len(ids) > self.max_tokens:
                ids, types = self._truncated(texts)
            result.append(self._encoding(ids, types))
        return result

    def _fields(self, item: TextInput, number: int) -> list[str]:
        if isinstance(item, str):
            if self._pairs:
                raise InputError(f"inputs[{number}]: one text was given; this task takes pairs")
            texts = [item]
        else:
            if not self._pairs:
                raise InputError(f"inputs[{number}]: a pair was given; this task takes one text")
            texts = list(item)
        # A text may hold the mask token's own string, which must not become a second mask.
        if self._mask_token:
            texts = [text.replace(self._mask_token, " ") for text in texts]
        return texts

    def _render(self, texts: Sequence[str]) -> str | tuple[str, str]:
        values = dict(zip(_PAIR_FIELDS if self._pairs else _TEXT_FIELD, texts, strict=True))
        values["{mask}"] = self._mask_token
        parts = ["".join(values.get(piece, piece) for piece in pieces) for pieces in self._pieces]
        return parts[0] if len(parts) == 1 else (parts[0], parts[1])

    def _truncated(self, texts: list[str]) -> tuple[list[int], list[int]]:
        """Shorten the texts, never the template, until the whole fits."""
        # Character offsets of each text's own tokens say where to cut.
        offsets = [self._tokenizer.encode(text, add_special_tokens=False).offsets for text in texts]
        kept = [len(item) for item in offsets]
        fixed = len(self._tokenizer.encode(*self._pair(["" for _ in texts])).ids)
        excess = sum(kept) + fixed - self.max_tokens
        while True:
            for _ in range(max(excess, 1)):
                longest = max(range(len(kept)), key=lambda index: kept[index])
                if not kept[longest]:
                    raise InputError(
                        f"the template alone exceeds the {self.max_tokens} tokens of this task"
                    )
                kept[longest] -= 1
            cut = [
                text[: spans[count - 1][1]] if count else ""
                for text, spans, count in zip(texts, offsets, kept, strict=True)
            ]
            encoded = self._tokenizer.encode(*self._pair(cut))
            excess = len(encoded.ids) - self.max_tokens
            if excess <= 0:
                return encoded.ids, encoded.type_ids

    def _pair(self, texts: Sequence[str]) -> tuple[str, str | None]:
        rendered = self._render(texts)
        return (rendered, None) if isinstance(rendered, str) else rendered

    def _encoding(self, ids: list[int], types: list[int]) -> Encoding:
        mask = 0 if self._mask_id is None else ids.index(self._mask_id)
        return Encoding(ids, types if self._has_token_types else [0] * len(ids), mask)
