"""Artifacts with one thing wrong, made from good ones: `mutant(data, number)` is always the same.

Knows the format (a length, a JSON header, the tensors' bytes) from its description alone, and uses
nothing of the reader that it is there to test.
"""

import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

KEY = "taskbone"
DTYPES = ("F32", "BF16", "I32", "I64", "F16", "F64", "U8", "BOOL", "F8_E4M3", "C64", "", "f32", "X")
NUMBERS = (0, 1, -1, 2, 3, 7, 47, 48, 2**15, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**40)
VALUES: tuple[Any, ...] = (
    *NUMBERS, None, True, 0.5, -0.0, 1e308, math.nan, math.inf, "", " ", "a", "\0", "\u202e",
    "é" * 70, "x" * 20_000, "{text}", "{text1} {text2}", "{mask}", "{", "../../up", "/etc/passwd",
    "\ud800",
    [], [[]], [0] * 2_000, ["a"] * 3, [None], {}, {"a": 1}, {"kind": "linear"},
    {"kind": "verbalizer"},
)  # fmt: skip
SHAPES: tuple[Any, ...] = (
    [], [0], [1], [2**63], [2**32, 2**32], [-1], [1.0], ["1"], [True], [[1]], 3, None, "3", {},
    [1] * 9, [0, 2**62],
)  # fmt: skip
OTHER_NAMES = {
    "ffn_kept": ("layers", "'ffn."),
    "ffn_width": ("width",),
    "heads_kept": ("'heads.",),
    "deltas": ("'delta.",),
    "components": ("unknown tensor",),
    "max_tokens": ("template alone",),
}
"""What an error may call a manifest's field by, besides its name."""


@dataclass(frozen=True)
class Mutant:
    """An artifact that may be wrong. `names`: of these words the refusal must have one."""

    what: str
    data: bytes
    names: tuple[str, ...] = ("",)
    harmless: bool = False
    """It says just what the good one said, in other bytes."""


@dataclass(frozen=True)
class Parts:
    """An artifact taken apart."""

    header: dict[str, Any]
    manifest: dict[str, Any]
    body: bytes


def parts(data: bytes) -> Parts:
    """Take a good artifact apart."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return Parts(header, json.loads(header["__metadata__"][KEY]), data[8 + size :])


def whole(header: object, body: bytes, manifest: object = None) -> bytes:
    """Put an artifact together; header and manifest as bytes or text go in as they are."""
    if manifest is not None:
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        assert isinstance(header, dict)
        header = {**header, "__metadata__": {KEY: text}}
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + body


def mutant(data: bytes, number: int) -> Mutant:
    """The mutant of this number."""
    dice = random.Random(number)
    made = dice.choice(KINDS)(data, dice)
    while made.data == data:
        made = dice.choice(KINDS)(data, dice)
    return made


# --- bytes ----------------------------------------------------------------------------------------


def _flipped(data: bytes, dice: random.Random) -> Mutant:
    header = int.from_bytes(data[:8], "little") + 8
    first, last = dice.choice([(0, 8), (8, header), (header, len(data))])
    changed = bytearray(data)
    for _ in range(dice.choice([1, 1, 1, 2, 8, 64])):
        changed[dice.randrange(first, last)] ^= 1 << dice.randrange(8)
    return Mutant(f"bits flipped in {first} to {last}", bytes(changed))


def _cut(data: bytes, dice: random.Random) -> Mutant:
    at = dice.randrange(len(data))
    return Mutant(f"cut at {at}", data[:at], ("not an artifact", "not a whole"))


def _trailing(data: bytes, dice: random.Random) -> Mutant:
    more = dice.choice([b"\0", b" ", data, data[-16:], b"PK\x03\x04"])
    return Mutant(f"{len(more)} bytes behind it", data + more, ("not a whole",))


def _spliced(data: bytes, dice: random.Random) -> Mutant:
    at, other, count = (dice.randrange(1, len(data)) for _ in range(3))
    piece = data[other : other + count % 200]
    changed = data[:at] + piece + data[at + (len(piece) if dice.random() < 0.5 else 0) :]
    return Mutant(f"{len(piece)} bytes of {other} at {at}", changed)


def _length(data: bytes, dice: random.Random) -> Mutant:
    size = int.from_bytes(data[:8], "little")
    lied = dice.choice([0, 1, 2, size - 1, size + 1, 10**8, 2**31, 2**63, 2**64 - 1, len(data)])
    return Mutant(f"header of {lied} bytes", lied.to_bytes(8, "little") + data[8:])


# --- the header -----------------------------------------------------------------------------------


def _tensor_entry(data: bytes, dice: random.Random) -> Mutant:
    good = parts(data)
    name = dice.choice([name for name in good.header if name != "__metadata__"])
    entry = dict(good.header[name])
    first, last = entry["data_offsets"]
    change, value = dice.choice(
        [
            ("dtype", dice.choice([*DTYPES, 3, None, ["F32"]])),
            ("shape", dice.choice([*SHAPES, entry["shape"][::-1], [*entry["shape"], 1]])),
            ("shape", [side + dice.choice([-1, 1]) for side in entry["shape"]]),
            (
                "data_offsets",
                dice.choice(
                    [[last, first], [0, last], [first, last + 4], [first - 4, last - 4],
                     [first, 2**64], [-1, last], [first], "all", [0, 0], [first + 1, last + 1]]
                ),
            ),
            ("surprise", 1),
        ]
    )  # fmt: skip
    entry[change] = value
    if dice.random() < 0.1:
        del entry[change]
        change = f"no {change}"
    made = whole({**good.header, name: entry}, good.body)
    same = all(entry.get(key) == known for key, known in good.header[name].items())
    # Where the header is no safetensors header at all, the library says where it ends to be one.
    return Mutant(f"{name}: {change} {value!r:.40}", made, () if same else (name, "not a whole"))


def _tensor_names(data: bytes, dice: random.Random) -> Mutant:
    good = parts(data)
    name = dice.choice(list(good.header))
    other = dice.choice(
        [name + "x", name.upper(), "", "\0", "../" + name, "ffn.-1.neurons", "ffn.00.neurons",
         "ffn.99999999999.neurons", "é" * 5_000, "prompt", "head.bias", "delta.0.q.up"]
    )  # fmt: skip
    header = dict(good.header)
    kind = dice.choice(["without", "renamed", "twice", "twice, first", "copied"])
    names: tuple[str, ...] = (name, repr(other)[:5], KEY, "not a whole")
    if kind in ("without", "renamed"):
        entry = header.pop(name)
        if kind == "renamed":
            header[other] = entry
    elif kind == "copied":
        header[other] = header[name]
    else:
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        text, again = json.dumps(header)[1:-1], json.dumps({name: entry})[1:-1]
        both = f"{{{text}, {again}}}" if kind == "twice" else f"{{{again}, {text}}}"
        return Mutant(
            f"{name} {kind}", whole(both.encode(), good.body), (f"{name!r} stands twice",)
        )
    return Mutant(f"{name} {kind} {other:.20}", whole(header, good.body), names)


# --- the manifest ---------------------------------------------------------------------------------


def _field(data: bytes, dice: random.Random) -> Mutant:
    """Replace, remove or add one value anywhere in the manifest."""
    good = parts(data)
    place: Any = good.manifest
    path: list[Any] = []
    while True:
        path.append(dice.choice(list(place) if isinstance(place, dict) else range(len(place))))
        inner = place[path[-1]]
        if not isinstance(inner, dict | list) or not inner or dice.random() < 0.3:
            break
        place = inner
    kind = dice.choice(["replaced", "replaced", "replaced", "removed", "added", "doubled"])
    if kind == "added" and isinstance(place, dict):
        place["surprise"] = dice.choice(VALUES)
    elif kind == "added":
        place.append(dice.choice(VALUES))
    elif kind == "removed":
        del place[path[-1]]
    elif kind == "doubled" and isinstance(place, list):
        place.extend(list(place))
    else:
        place[path[-1]] = dice.choice(VALUES)
    top = str(path[0])
    others = ("surprise", "golden", "not JSON", "Invalid JSON")
    names = (top, *OTHER_NAMES.get(top, ()), *others)
    changed = whole(good.header, good.body, good.manifest)
    return Mutant(f"manifest {'.'.join(map(str, path))} {kind}", changed, names)


def _manifest_text(data: bytes, dice: random.Random) -> Mutant:
    """Change the manifest's text, as JSON or against it."""
    good = parts(data)
    text = json.dumps(good.manifest)
    at = dice.randrange(len(text))
    made, names = dice.choice(
        [
            (text[:at], ("JSON",)),
            (text[:-1] + ', "task": "other"}', ("'task' stands twice",)),
            (text + text, ("JSON",)),
            (text.replace('"', "'"), ("JSON",)),
            ("[" * at + text + "]" * at, ("manifest",)),
            (text[:at] + "\ud800" + text[at:], ("manifest", "damaged", "not a whole")),
            (text[:at] + dice.choice('{}[]",:0-\\') + text[at + 1 :], ("",)),
        ]
    )
    return Mutant(f"manifest's text changed at {at}", whole(good.header, good.body, made), names)


# --- the tensors ----------------------------------------------------------------------------------


def _float_value(data: bytes, dice: random.Random) -> Mutant:
    good = parts(data)
    name = _of_type(good, dice, ("F32", "BF16"))
    value = dice.choice([math.nan, math.inf, -math.inf, 3.3e38, -1e30, 1e-45, 0.0, 1.5])
    packed = struct.pack("<f", value)
    raw = packed if good.header[name]["dtype"] == "F32" else packed[2:]
    changed = _written(good, name, dice, raw)
    names = (name,) if not math.isfinite(value) else ("golden",)
    return Mutant(f"{value} in {name}", changed, names)


def _index(data: bytes, dice: random.Random) -> Mutant:
    good = parts(data)
    name = _of_type(good, dice, ("I32",))
    first, last = good.header[name]["data_offsets"]
    count = (last - first) // 4
    rows = list(struct.unpack(f"<{count}i", good.body[first:last]))
    here, there = dice.randrange(count), dice.randrange(count)
    rows[here] = dice.choice([rows[there], -1, 4, 48, 2**31 - 1, -(2**31), rows[here] + 1])
    body = good.body[:first] + struct.pack(f"<{count}i", *rows) + good.body[last:]
    return Mutant(f"index {rows[here]} in {name}", whole(good.header, body), (name, "golden"))


def _of_type(good: Parts, dice: random.Random, types: tuple[str, ...]) -> str:
    """A tensor with values of one of these types."""
    names = [
        name
        for name, entry in good.header.items()
        if entry.get("dtype") in types and math.prod(entry["shape"])
    ]
    return dice.choice(names)


def _written(good: Parts, name: str, dice: random.Random, raw: bytes) -> bytes:
    first, last = good.header[name]["data_offsets"]
    at = first + len(raw) * dice.randrange((last - first) // len(raw))
    return whole(good.header, good.body[:at] + raw + good.body[at + len(raw) :])


# --- what changes nothing -------------------------------------------------------------------------


def _harmless(data: bytes, dice: random.Random) -> Mutant:
    good = parts(data)
    raw = json.dumps(good.header).encode()
    names = list(good.header)
    dice.shuffle(names)
    keys = list(good.manifest)
    dice.shuffle(keys)
    metadata = {**good.header["__metadata__"], "note": "not read"}
    what, changed = dice.choice(
        [
            ("spaces behind the header", whole(raw + b" " * dice.randrange(1, 99), good.body)),
            (
                "another order of tensors",
                whole({key: good.header[key] for key in names}, good.body),
            ),
            (
                "another order of fields",
                whole(good.header, good.body, {key: good.manifest[key] for key in keys}),
            ),
            ("another note", whole({**good.header, "__metadata__": metadata}, good.body)),
            (
                "indented",
                whole(good.header, good.body, json.dumps(good.manifest, indent=dice.randrange(9))),
            ),
        ]
    )
    return Mutant(what, changed, (), harmless=True)


KINDS: tuple[Callable[[bytes, random.Random], Mutant], ...] = (
    _flipped, _flipped, _cut, _trailing, _spliced, _length, _tensor_entry, _tensor_entry,
    _tensor_names, _field, _field, _field, _manifest_text, _float_value, _float_value, _index,
    _harmless,
)  # fmt: skip
