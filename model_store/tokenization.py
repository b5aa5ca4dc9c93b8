"""Texts to token ids: the template, special tokens, and truncation that spares the template.

Used by localization and serving alike, so that a text means the same to both. Knows no torch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import Tokenizer

from model_store.backbone import EncoderConfig
from model_store.errors import InputError
from model_store.manifest import TextInput

CHARACTERS_PER_TOKEN = 64
"""Texts are cut to so many characters for each token that fits, before anything else."""

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

    def encode(self, inputs: Sequence[TextInput], truncate: bool = True) -> list[Encoding]:
        """Encode inputs; texts that are too long lose their ends, the longer of a pair first.

        Raises `InputError` for a pair where one text is expected, and the other way round; and,
        unless they shall `truncate`, for texts that are too long.
        """
        fields = [self._fields(item, number, truncate) for number, item in enumerate(inputs)]
        encoded = self._tokenizer.encode_batch_fast([self._render(texts) for texts in fields])
        if not truncate:
            self._refuse_long(encoded)
        return [
            self._encoding(item if len(item) <= self.max_tokens else self._truncated(texts), texts)
            for texts, item in zip(fields, encoded, strict=True)
        ]

    def _refuse_long(self, encoded: Sequence[tokenizers.Encoding]) -> None:
        for number, item in enumerate(encoded):
            if len(item) > self.max_tokens:
                raise InputError(
                    f"inputs[{number}]: {len(item)} tokens, the template's included; this task "
                    f"takes at most {self.max_tokens}: send less text, or let it be truncated"
                )

    def _fields(self, item: TextInput, number: int, truncate: bool) -> list[str]:
        if isinstance(item, str):
            if self._pairs:
                raise InputError(f"inputs[{number}]: one text was given; this task takes pairs")
            texts = [item]
        else:
            if not self._pairs:
                raise InputError(f"inputs[{number}]: a pair was given; this task takes one text")
            texts = list(item)
        # What lies so far behind the last token that fits costs time and changes nothing.
        most = self.max_tokens * CHARACTERS_PER_TOKEN
        if not truncate and max(map(len, texts)) > most:
            raise InputError(
                f"inputs[{number}]: {max(map(len, texts))} characters; this task takes at most "
                f"{self.max_tokens} tokens and {most} characters: send less text, or let it be "
                "truncated"
            )
        texts = [text[:most] for text in texts]
        # A text may hold the mask token's own string, which must not become a second mask.
        if self._mask_token:
            texts = [text.replace(self._mask_token, " ") for text in texts]
        return texts

    def _render(self, texts: Sequence[str]) -> str | tuple[str, str]:
        values = dict(zip(_PAIR_FIELDS if self._pairs else _TEXT_FIELD, texts, strict=True))
        values["{mask}"] = self._mask_token
        parts = ["".join(values.get(piece, piece) for piece in pieces) for pieces in self._pieces]
        return parts[0] if len(parts) == 1 else (parts[0], parts[1])

    def _truncated(self, texts: list[str]) -> tokenizers.Encoding:
        """Shorten the texts, never the template, until the whole fits."""
        alone = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        room = self.max_tokens - len(self._encode_one(["" for _ in texts]))
        while room >= 0:
            counts = _shares(alone, room)
            encoded = self._encode_one(
                [_first(*parts) for parts in zip(texts, alone, counts, strict=True)]
            )
            excess = len(encoded) - self.max_tokens
            if excess <= 0:
                return encoded
            # Tokens can merge and split at the seams between texts and template.
            room = min(room, sum(map(len, alone))) - excess
        raise InputError(f"the template alone exceeds the {self.max_tokens} tokens of this task")

    def _encode_one(self, texts: Sequence[str]) -> tokenizers.Encoding:
        rendered = self._render(texts)
        if isinstance(rendered, str):
            return self._tokenizer.encode(rendered)
        return self._tokenizer.encode(*rendered)

    def _encoding(self, encoded: tokenizers.Encoding, texts: list[str]) -> Encoding:
        mask = 0
        if self._mask_id is not None:
            if encoded.ids.count(self._mask_id) != 1:
                encoded = self._without_false_mask(texts, self._mask_id)
            mask = encoded.ids.index(self._mask_id)
        ids = encoded.ids
        return Encoding(ids, encoded.type_ids if self._has_token_types else [0] * len(ids), mask)

    def _without_false_mask(self, texts: list[str], mask_id: int) -> tokenizers.Encoding:
        """Texts and template together have made a second mask token: take its letters apart."""
        first, last = self._mask_token[0], self._mask_token[-1]
        harmless = [" " + text.replace(first, " ").replace(last, " ") + " " for text in texts]
        encoded = self._truncated(harmless)
        if encoded.ids.count(mask_id) != 1:
            raise InputError("the template holds the mask token beside {mask}")
        return encoded


def _first(text: str, encoded: tokenizers.Encoding, count: int) -> str:
    """The part of a text that its first `count` tokens stand for."""
    if count == len(encoded):
        return text
    span = encoded.token_to_chars(count - 1) if count else None
    return "" if span is None else text[: span[1]]


def _shares(texts: Sequence[tokenizers.Encoding], room: int) -> list[int]:
    """How many of its tokens each text keeps: `room` in all, the longer text cut first."""
    counts = [len(text) for text in texts]
    if sum(counts) <= room:
        return counts
    if len(counts) == 1:
        return [room]
    first, second = counts
    if first <= room // 2:
        return [first, room - first]
    if second <= room // 2:
        return [room - second, second]
    return [room - room // 2, room // 2]
