"""Templates, special tokens and truncation, with laws over any text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_store.backbone import Backbone
from model_store.errors import InputError
from model_store.manifest import TextInput
from model_store.store import Store
from model_store.tokenization import CHARACTERS_PER_TOKEN, InputEncoder

CLS, SEP, MASK = 2, 3, 4


def _encoder(backbone: Backbone, template: tuple[str, ...], max_tokens: int = 20) -> InputEncoder:
    return InputEncoder(backbone.tokenizer, backbone.config, template, max_tokens)


def _tokens(backbone: Backbone, ids: list[int]) -> list[str | None]:
    return [backbone.tokenizer.id_to_token(token) for token in ids]


def test_a_text_in_its_template(tiny: tuple[Store, Backbone]) -> None:
    backbone = tiny[1]
    (encoding,) = _encoder(backbone, ("the film : {text} . is {mask}",)).encode(["a good cat"])
    tokens = "[CLS] the film : a good cat . is [MASK] [SEP]".split()
    assert _tokens(backbone, encoding.token_ids) == tokens
    assert encoding.mask == 9
    assert set(encoding.token_types) == {0}


def test_a_pair_as_two_segments_and_in_one_template(tiny: tuple[Store, Backbone]) -> None:
    backbone = tiny[1]
    pair: list[TextInput] = [("a cat", "the dog")]
    (two,) = _encoder(backbone, ("{text1}", "{text2}")).encode(pair)
    assert two.token_types == [0, 0, 0, 0, 1, 1, 1]
    (one,) = _encoder(backbone, ("{text2} not {text1}",)).encode(pair)
    assert _tokens(backbone, one.token_ids) == "[CLS] the dog not a cat [SEP]".split()


def test_the_wrong_kind_of_input_is_named(tiny: tuple[Store, Backbone]) -> None:
    with pytest.raises(InputError, match=r"inputs\[1\]: a pair was given"):
        _encoder(tiny[1], ("{text}",)).encode(["a", ("b", "c")])
    with pytest.raises(InputError, match=r"inputs\[0\]: one text was given"):
        _encoder(tiny[1], ("{text1}", "{text2}")).encode(["a"])


def test_a_template_longer_than_the_limit_is_named(tiny: tuple[Store, Backbone]) -> None:
    long = _encoder(tiny[1], ("the " * 30 + "{text}",), 20)
    with pytest.raises(InputError, match="template alone"):
        long.encode(["a"])


def test_a_texts_own_braces_and_mask_stay_text(tiny: tuple[Store, Backbone]) -> None:
    (encoding,) = _encoder(tiny[1], ("{text} is {mask}",), 40).encode(["{mask} [MASK] {text}"])
    assert encoding.token_ids.count(MASK) == 1
    assert encoding.token_ids[encoding.mask] == MASK
    assert encoding.mask == len(encoding.token_ids) - 2


words = st.sampled_from("the cat film zebra unbelievable é 漢 \x00 , [SEP] {text}".split(" "))
texts = st.lists(words, max_size=60).map(" ".join)


@settings(deadline=None, max_examples=150)
@given(first=texts, second=texts, limit=st.integers(12, 40))
def test_truncation_spares_the_template(
    tiny: tuple[Store, Backbone], first: str, second: str, limit: int
) -> None:
    backbone = tiny[1]
    encoder = _encoder(backbone, ("{text1} and {text2} is {mask} .",), limit)
    (encoding,) = encoder.encode([(first, second)])
    assert len(encoding.token_ids) <= limit
    assert encoding.token_ids[0] == CLS
    tail = _tokens(backbone, encoding.token_ids[encoding.mask - 1 :])
    assert tail == ["is", "[MASK]", ".", "[SEP]"]


def test_the_longer_of_a_pair_is_cut_first(tiny: tuple[Store, Backbone]) -> None:
    backbone = tiny[1]
    encoder = _encoder(backbone, ("{text1}", "{text2}"), 12)
    (encoding,) = encoder.encode([("cat", "the dog " * 20)])
    assert encoding.token_ids.count(SEP) == 2
    assert _tokens(backbone, encoding.token_ids)[:3] == ["[CLS]", "cat", "[SEP]"]
    assert len(encoding.token_ids) == 12


@pytest.mark.parametrize(
    ("template", "fits", "long", "message"),
    [
        (("{text}",), "a " * 18, "a " * 19, r"inputs\[1\]: 21 tokens.* at most 20"),
        (("{text}",), "a", " " * 20 * CHARACTERS_PER_TOKEN + "a", r"inputs\[1\]: 1281 characters"),
        (("{text1}", "{text2}"), ("a", "a " * 16), ("a " * 9, "a " * 9), r"inputs\[1\]: 21 tok"),
    ],
)
def test_a_text_that_may_not_be_cut_is_refused(
    tiny: tuple[Store, Backbone],
    template: tuple[str, ...],
    fits: TextInput,
    long: TextInput,
    message: str,
) -> None:
    encoder = _encoder(tiny[1], template)
    assert encoder.encode([fits], truncate=False) == encoder.encode([fits])
    assert len(encoder.encode([fits, long])) == 2
    with pytest.raises(InputError, match=message):
        encoder.encode([fits, long], truncate=False)


def test_a_huge_text_is_cut_before_it_costs_anything(tiny: tuple[Store, Backbone]) -> None:
    encoder = _encoder(tiny[1], ("{text}",), 16)
    long = "!" * (CHARACTERS_PER_TOKEN * 16)
    assert encoder.encode([long + "the cat " * 100_000]) == encoder.encode([long])


def test_text_and_template_never_make_a_second_mask(tiny: tuple[Store, Backbone]) -> None:
    for template, item in (
        ("[{text}] is {mask}", "MASK"),
        ("{text1}{text2} is {mask}", ("the [MA", "SK] bad")),
    ):
        (encoding,) = _encoder(tiny[1], (template,)).encode([item])
        assert encoding.token_ids.count(MASK) == 1
        assert encoding.mask == len(encoding.token_ids) - 2


@settings(deadline=None, max_examples=50)
@given(items=st.lists(texts, min_size=1, max_size=6))
def test_a_text_is_encoded_the_same_alone(tiny: tuple[Store, Backbone], items: list[str]) -> None:
    encoder = _encoder(tiny[1], ("{text}",))
    assert encoder.encode(items) == [encoder.encode([item])[0] for item in items]
