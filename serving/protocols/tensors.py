"""Tensors of the Open Inference Protocol: a request's bytes to texts, an answer to named tensors.

Tensors lie in the JSON as `data`, or, by the binary tensor data extension, behind it: texts each
with its length in four bytes before it, numbers as little-endian fp32. Knows no HTTP framework.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from pydantic_core import to_json

from model_store.manifest import Frozen
from serving.errors import InvalidInputError
from serving.protocols.asking import parse
from serving.types import TaskAnswer, TextInput

OUTPUTS = ("label", "score", "probabilities")
Parameters = dict[str, bool | int | float | str]
Count = Annotated[int, Field(ge=0)]


class InputParameters(Frozen):
    """What may be said of an input."""

    binary_data_size: Count | None = None


class InputTensor(Frozen):
    """One input; `data` is missing where the tensor lies behind the JSON."""

    name: str
    shape: tuple[Count, ...]
    datatype: str
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = None


class OutputParameters(Frozen):
    """What may be said of an output."""

    binary_data: bool | None = None


class OutputWish(Frozen):
    """One output that the caller wants."""

    name: str
    parameters: OutputParameters = OutputParameters()


class InferParameters(Frozen):
    """What may be said of a request."""

    binary_data_output: bool = False
    truncate: bool = True
    timeout: Annotated[int, Field(ge=1)] | None = None
    """Microseconds after which the answer is of no use."""


class InferRequest(Frozen):
    """The JSON of an inference request."""

    id: str = ""
    parameters: InferParameters = InferParameters()
    inputs: tuple[InputTensor, ...]
    outputs: tuple[OutputWish, ...] | None = None


@dataclass(frozen=True)
class Infer:
    """A request, read."""

    request: InferRequest
    inputs: list[TextInput]


def read_infer(body: bytes, json_bytes: int | None) -> Infer:
    """A request from its body, whose first `json_bytes` bytes are JSON; None: all of them.

    Raises `InvalidInputError`.
    """
    if json_bytes is not None and json_bytes > len(body):
        raise InvalidInputError(
            f"Inference-Header-Content-Length is {json_bytes}; the body has {len(body)} bytes"
        )
    behind = memoryview(body)[len(body) if json_bytes is None else json_bytes :]
    request = parse(InferRequest, body if json_bytes is None else body[:json_bytes])
    texts = _texts(request.inputs, behind)
    check_outputs(request.outputs)
    return Infer(request, join(texts))


def join(texts: Mapping[str, Sequence[str]]) -> list[TextInput]:
    """The inputs that a request's tensors are: texts, or pairs. Raises `InvalidInputError`."""
    if texts.keys() == {"text"}:
        return list(texts["text"])
    if texts.keys() != {"text", "text_pair"}:
        given = ", ".join(repr(name[:40]) for name in texts) or "none"
        raise InvalidInputError(f"inputs: {given}; expected 'text', and 'text_pair' for pairs")
    first, second = texts["text"], texts["text_pair"]
    if len(first) != len(second):
        raise InvalidInputError(
            f"inputs: 'text' has {len(first)} elements and 'text_pair' {len(second)}; "
            "expected as many"
        )
    return list(zip(first, second, strict=True))


def _texts(inputs: Sequence[InputTensor], behind: memoryview) -> dict[str, list[str]]:
    """Each input's texts; `behind` holds the binary ones, in the order of the inputs."""
    found: dict[str, list[str]] = {}
    for tensor in inputs:
        size = tensor.parameters.binary_data_size
        if (size is None) == (tensor.data is None):
            raise InvalidInputError(
                f"input {tensor.name[:40]!r}: expected either data, or binary_data_size and the "
                "tensor behind the JSON"
            )
        if size is None:
            texts = _flat(tensor)
        else:
            if len(behind) < size:
                raise InvalidInputError(
                    f"input {tensor.name[:40]!r}: binary_data_size is {size}; {len(behind)} bytes "
                    "are left"
                )
            texts = unpack(tensor.name, behind[:size])
            behind = behind[size:]
        add(found, tensor.name, tensor.datatype, tensor.shape, texts)
    if len(behind):
        raise InvalidInputError(f"{len(behind)} bytes are left behind the last input")
    return found


def add(
    found: dict[str, list[str]], name: str, datatype: str, shape: Sequence[int], texts: list[str]
) -> None:
    """One more input's texts, if it is as it says. Raises `InvalidInputError`."""
    if name in found:
        raise InvalidInputError(f"inputs: {name[:40]!r} is given twice")
    if datatype != "BYTES":
        raise InvalidInputError(
            f"input {name[:40]!r}: datatype {datatype[:40]!r}; expected 'BYTES'"
        )
    if len(shape) not in (1, 2) or (len(shape) == 2 and shape[1] != 1):
        raise InvalidInputError(
            f"input {name[:40]!r}: shape {list(shape)[:8]}; expected [n] or [n, 1]"
        )
    if len(texts) != shape[0]:
        raise InvalidInputError(
            f"input {name[:40]!r}: the shape {list(shape)} needs {shape[0]} elements; "
            f"{len(texts)} are given"
        )
    found[name] = texts


def _flat(tensor: InputTensor) -> list[str]:
    """The texts of an input in JSON, flat or in rows of one."""
    texts = []
    for number, item in enumerate(tensor.data or ()):
        text = item[0] if isinstance(item, list) and len(item) == 1 else item
        if not isinstance(text, str):
            raise InvalidInputError(f"input {tensor.name[:40]!r}: element {number} is no text")
        texts.append(text)
    return texts


def unpack(name: str, data: memoryview) -> list[str]:
    """The texts of a binary input. Raises `InvalidInputError`."""
    texts: list[str] = []
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at) if at + 4 <= len(data) else (len(data),)
        at += 4
        if at + length > len(data):
            raise InvalidInputError(f"input {name[:40]!r}: the binary data is cut off")
        texts.append(decoded(name, len(texts), data[at : at + length]))
        at += length
    return texts


def decoded(name: str, number: int, data: bytes | memoryview) -> str:
    """A text from its UTF-8. Raises `InvalidInputError`."""
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise InvalidInputError(f"input {name[:40]!r}: element {number} is not UTF-8") from None


def check_outputs(outputs: Sequence[OutputWish] | None) -> None:
    """Raise `InvalidInputError` unless there are such outputs."""
    names = [wish.name for wish in outputs or ()]
    for name in names:
        if name not in OUTPUTS:
            raise InvalidInputError(f"output {name[:40]!r}: expected one of {', '.join(OUTPUTS)}")
    if len(set(names)) < len(names):
        raise InvalidInputError("outputs: one is asked for twice")


def write_infer(answer: TaskAnswer, request: InferRequest) -> tuple[bytes, int | None]:
    """The body of an answer, and how many of its bytes are JSON; None: all of them."""
    wishes = request.outputs or tuple(OutputWish(name=name) for name in OUTPUTS)
    told, behind = [], []
    for wish in wishes:
        tensor, values = output(wish.name, answer)
        binary = wish.parameters.binary_data
        if request.parameters.binary_data_output if binary is None else binary:
            packed = pack(values)
            tensor["parameters"] = {"binary_data_size": len(packed)}
            behind.append(packed)
        else:
            tensor["data"] = values
        told.append(tensor)
    body = to_json(
        {
            "model_name": answer.task,
            "model_version": str(answer.version),
            **({"id": request.id} if request.id else {}),
            "outputs": told,
        }
    )
    return b"".join((body, *behind)), len(body) if behind else None


def output(name: str, answer: TaskAnswer) -> tuple[dict[str, Any], list[Any]]:
    """One output without its data, and its data."""
    rows = answer.predictions
    match name:
        case "label":
            return _described(name, "BYTES", len(rows)), [row.label for row in rows]
        case "score":
            return _described(name, "FP32", len(rows)), [row.score for row in rows]
        case "probabilities":
            values = [value for row in rows for value in row.scores.values()]
            return _described(name, "FP32", len(rows), len(rows[0].scores)), values
    raise AssertionError(name)


def _described(name: str, datatype: str, *shape: int) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape)}


def pack(values: Sequence[Any]) -> bytes:
    """An output's data as bytes: texts or numbers."""
    if isinstance(values[0], str):
        encoded = [text.encode() for text in values]
        return b"".join(struct.pack("<I", len(text)) + text for text in encoded)
    return np.asarray(values, "<f4").tobytes()
