"""From the bytes of a predict request to its inputs. Knows JSON, nothing of HTTP or of the tasks.

Whether a task takes texts or pairs, and how many, is for the service to say.
"""

from pydantic_core import from_json

from serving.errors import InvalidInputError
from serving.types import TextInput


def parse_inputs(body: bytes) -> list[TextInput]:
    """The `inputs` of a predict body, one text or pair each. Raises `InvalidInputError`."""
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidInputError(f"the body is not valid JSON in UTF-8: {error}") from None
    if not isinstance(data, dict) or data.keys() != {"inputs"}:
        given = f"the keys {sorted(data)}" if isinstance(data, dict) else _kind(data)
        raise InvalidInputError(
            f'the body is {given[:200]}; expected {{"inputs": ...}} and nothing else'
        )
    inputs = data["inputs"]
    if isinstance(inputs, str):
        return [inputs]
    if not isinstance(inputs, list) or not inputs:
        raise InvalidInputError(
            f"inputs is {_kind(inputs)}; expected a text, a list of texts, or a list of pairs"
        )
    return [_parse_input(number, value) for number, value in enumerate(inputs)]


def _parse_input(number: int, value: object) -> TextInput:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) == 2:
        first, second = value
        if isinstance(first, str) and isinstance(second, str):
            return first, second
    raise InvalidInputError(
        f'inputs.{number} is {_kind(value)}; expected a text, or a pair as ["first", "second"] '
        '(a single pair is [["first", "second"]])'
    )


def _kind(value: object) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    names = {dict: "an object", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
