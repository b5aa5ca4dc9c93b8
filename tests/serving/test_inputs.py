"""From a predict body's bytes to its inputs."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import InvalidInputError
from serving.inputs import parse_inputs, parse_many
from serving.types import TextInput


def inputs_of(body: bytes) -> list[TextInput]:
    """A body's inputs alone."""
    return parse_inputs(body)[0]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXTS)
def test_one_text_is_a_list_of_one(text: str) -> None:
    assert inputs_of(json.dumps({"inputs": text}).encode()) == [text]


@given(st.lists(st.one_of(TEXTS, st.tuples(TEXTS, TEXTS)), min_size=1), st.booleans())
def test_texts_and_pairs_come_out_as_they_went_in(inputs: list[TextInput], escape: bool) -> None:
    body = json.dumps({"inputs": inputs}, ensure_ascii=escape).encode()
    assert inputs_of(body) == inputs


@given(st.binary())
def test_any_bytes_are_inputs_or_an_error_of_ours(body: bytes) -> None:
    try:
        inputs = inputs_of(body)
    except InvalidInputError:
        return
    assert inputs


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda children: st.lists(children) | st.dictionaries(TEXTS, children),
)


@given(JSON)
def test_any_json_is_inputs_or_an_error_of_ours(inputs: object) -> None:
    try:
        parsed = inputs_of(json.dumps({"inputs": inputs}).encode())
    except InvalidInputError:
        return
    assert all(
        isinstance(item, str) or (isinstance(item, tuple) and len(item) == 2) for item in parsed
    )


def test_two_texts_are_two_inputs_and_not_a_pair() -> None:
    assert inputs_of(b'{"inputs": ["a", "b"]}') == ["a", "b"]
    assert inputs_of(b'{"inputs": [["a", "b"]]}') == [("a", "b")]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b'{"inputs": "\xff"}', "JSON in UTF-8"),
        (b'{"inputs": "\\ud800"}', "JSON in UTF-8"),
        (b'{"inputs": NaN}', "JSON"),
        (b'{"inputs": ' + b"[" * 100_000, "JSON"),
        (b'"text"', "the body is a text"),
        (b"[]", "the body is an empty list"),
        (b"{}", r"the keys \[\]"),
        (b'{"input": "a"}', r"the keys \['input'\]"),
        (b'{"inputs": "a", "top_k": 3}', "nothing else"),
        (b'{"inputs": "a", "truncate": 1}', "truncate is a number; expected true or false"),
        (b'{"inputs": "a", "truncate": null}', "truncate is null"),
        (b'{"inputs": []}', "inputs is an empty list"),
        (b'{"inputs": null}', "inputs is null"),
        (b'{"inputs": {"a": "b"}}', "inputs is an object"),
        (b'{"inputs": ["a", 3]}', "inputs.1 is a number"),
        (b'{"inputs": [true]}', "inputs.0 is a boolean"),
        (b'{"inputs": [["a"]]}', r"inputs.0 is a list of 1.*\[\[\"first\", \"second\"\]\]"),
        (b'{"inputs": [["a", "b", "c"]]}', "inputs.0 is a list of 3"),
        (b'{"inputs": [["a", null]]}', "inputs.0 is a list of 2"),
    ],
)
def test_what_is_wrong_is_said(body: bytes, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        inputs_of(body)


def test_texts_are_cut_unless_the_caller_says_no() -> None:
    assert parse_inputs(b'{"inputs": "a"}') == (["a"], True)
    assert parse_inputs(b'{"truncate": true, "inputs": "a"}') == (["a"], True)
    assert parse_inputs(b'{"inputs": "a", "truncate": false}') == (["a"], False)


def test_many_tasks_are_a_list_of_names_or_all() -> None:
    assert parse_many(b'{"tasks": ["a", "b"], "inputs": "x"}') == (["a", "b"], ["x"], True)
    assert parse_many(b'{"tasks": "*", "inputs": [["x", "y"]], "truncate": false}') == (
        None,
        [("x", "y")],
        False,
    )


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ('"a"', "tasks is a text"),
        ("[]", "tasks is an empty list"),
        ("null", "tasks is null"),
        ('["a", 1]', "tasks is a list of 2"),
        ('["a", "a"]', "names a task twice"),
    ],
)
def test_anything_else_is_no_list_of_tasks(tasks: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        parse_many(f'{{"inputs": "x", "tasks": {tasks}}}'.encode())


def test_tasks_must_be_named() -> None:
    with pytest.raises(InvalidInputError, match="expected a list of names"):
        parse_many(b'{"inputs": "x"}')
    with pytest.raises(InvalidInputError, match=r"the keys \['inputs', 'tasks'\]"):
        parse_inputs(b'{"inputs": "x", "tasks": ["a"]}')
