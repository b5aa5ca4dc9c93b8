"""From the bytes of a predict request to its inputs. Knows JSON, nothing of HTTP or of the tasks.

Whether a task takes texts or pairs, and how many, is for the service to say.
"""

from typing import Any

from pydantic_core import from_json

from serving.errors import InvalidInputError
from serving.types import TextInput

_KEYS = frozenset(("inputs", "truncate"))
_MANY_KEYS = _KEYS | {"tasks"}


def parse_inputs(body: bytes) -> tuple[list[TextInput], bool]:
    """The `inputs` of a predict body, one text or pair each, and whether to `truncate` them.

    Raises `InvalidInputError`.
    """
    data = _object(body, _KEYS, '{"inputs": ..., "truncate": true}')
    return inputs_of(data["inputs"]), _truncate(data)


def parse_many(body: bytes) -> tuple[list[str] | None, list[TextInput], bool]:
    """The `tasks` of a body for many tasks (None: all), its `inputs`, and whether to `truncate`.

    Raises `InvalidInputError`.
    """
    data = _object(body, _MANY_KEYS, '{"tasks": [...] or "*", "inputs": ..., "truncate": true}')
    return _tasks(data.get("tasks")), inputs_of(data["inputs"]), _truncate(data)


def _object(body: bytes, known: frozenset[str], expected: str) -> dict[str, Any]:
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidInputError(f"the body is not valid JSON in UTF-8: {error}") from None
    if not isinstance(data, dict) or "inputs" not in data or not data.keys() <= known:
        given = f"the keys {sorted(data)}" if isinstance(data, dict) else _kind(data)
        raise InvalidInputError(f"the body is {given[:200]}; expected {expected} and nothing else")
    return data


def _truncate(data: dict[str, Any]) -> bool:
    given = data.get("truncate", True)
    if given is not True and given is not False:
        raise InvalidInputError(f"truncate is {_kind(given)}; expected true or false")
    return given


def _tasks(given: object) -> list[str] | None:
    if given == "*":
        return None
    if not isinstance(given, list) or not given or not all(isinstance(name, str) for name in given):
        raise InvalidInputError(
            f'tasks is {_kind(given)}; expected a list of names, or "*" for all tasks'
        )
    if len(set(given)) < len(given):
        raise InvalidInputError("tasks names a task twice")
    return given


def inputs_of(given: object, name: str = "inputs") -> list[TextInput]:
    """The texts or pairs that a value stands for, as the native routes read it; `name` is its key.

    Raises `InvalidInputError`.
    """
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise InvalidInputError(
            f"{name} is {_kind(given)}; expected a text, a list of texts, or a list of pairs"
        )
    return [
        value if isinstance(value, str) else _pair(value, name, number)
        for number, value in enumerate(given)
    ]


def _pair(value: object, name: str, number: int) -> TextInput:
    if isinstance(value, list) and len(value) == 2:
        first, second = value
        if isinstance(first, str) and isinstance(second, str):
            return first, second
    raise InvalidInputError(
        f'{name}.{number} is {_kind(value)}; expected a text, or a pair as ["first", "second"] '
        '(a single pair is [["first", "second"]])'
    )


def _kind(value: object) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    names = {dict: "an object", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
