"""Thousands of damaged artifacts: each is refused by the name of its fault, or means what it says.

Long form: 10,000 mutants instead of 2,000.
"""

import gc
import json
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from model_store import artifact
from model_store.artifact import Overlay
from model_store.backbone import Backbone, load_backbone
from model_store.encoder import Encoder
from model_store.errors import ModelStoreError
from model_store.manifest import MAX_HEADER_BYTES
from model_store.store import Store
from model_store.verification import check_artifact
from tests.abuse.mutations import KEY, Mutant, Parts, mutant, parts, whole
from tests.overlays import fp32_encoder
from tests.soak import report, soak

CONTRACTS = Path(__file__).parents[1] / "contracts"
COUNT = 10_000 if soak() else 2_000
WARM_UP = 500
TEXTS = ["the film was good", "a", "what is my new bank card ?"]
LONGEST_MESSAGE = 2_000
NUMPY = {"F32": "<f4", "I32": "<i4", "BF16": "<i2"}


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """Good artifacts: one of each kind."""
    return [path.read_bytes() for path in sorted(CONTRACTS.glob("*.safetensors"))]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """The backbone that they are for."""
    (folder,) = (path for path in CONTRACTS.iterdir() if len(path.name) == 64)
    return load_backbone(folder, "tiny")


@pytest.fixture(scope="module")
def encoder(backbone: Backbone) -> Encoder:
    """Their encoder."""
    return fp32_encoder(backbone)


@pytest.fixture
def store(tmp_path: Path, backbone: Backbone) -> Store:
    """A store with the backbone and nothing else."""
    made = Store(tmp_path / "store")
    with made.staging() as staging:
        for file in (CONTRACTS / backbone.fingerprint).iterdir():
            shutil.copy(file, staging)
        made.add_backbone(backbone.fingerprint, "tiny", staging)
    return made


def outcome(made: Mutant, good: bytes, backbone: Backbone, encoder: Encoder) -> str:
    """What became of a mutant: `refused`, `identical` to the good one, or `other` but sound."""
    try:
        overlay = artifact.read(made.data, backbone.config, backbone.fingerprint)
        artifact.check_golden(encoder, backbone, overlay)
    except ModelStoreError as error:
        check_refusal(str(error), made)
        return "refused"
    mine, others = parts(made.data), parts(good)
    assert tensors_of(overlay) == tensors_in(mine), made.what
    assert _holds(json.loads(overlay.manifest.to_json()), mine.manifest), made.what
    same = tensors_in(mine) == tensors_in(others) and mine.manifest == others.manifest
    assert same or not made.harmless, made.what
    if not same:
        return "other"
    known = artifact.read(good, backbone.config, backbone.fingerprint)
    assert overlay.manifest == known.manifest
    assert torch.equal(answers(overlay, backbone, encoder), answers(known, backbone, encoder))
    return "identical"


def answers(overlay: Overlay, backbone: Backbone, encoder: Encoder) -> Tensor:
    """What an overlay answers to some inputs."""
    inputs: list[Any] = [(text, "news") if overlay.manifest.takes_pairs else text for text in TEXTS]
    return artifact.probabilities(encoder, backbone, overlay, inputs)


def check_refusal(message: str, made: Mutant) -> None:
    """A refusal names the fault, in one line that can be shown."""
    assert not made.harmless, f"{made.what}: {message}"
    assert 20 <= len(message) <= LONGEST_MESSAGE, f"{made.what}: {message[:200]}"
    assert any(name in message for name in made.names), f"{made.what}: {message}"
    for python in ("NoneType", "object has no attribute", "KeyError", "argument"):
        assert python not in message, f"{made.what}: {message}"


def tensors_in(file: Parts) -> dict[str, bytes]:
    """Each tensor's bytes as the header says where they are: a reader of ten lines."""
    return {
        name: file.body[slice(*entry["data_offsets"])]
        for name, entry in file.header.items()
        if name != "__metadata__"
    }


def tensors_of(overlay: Overlay) -> dict[str, bytes]:
    """The same of what was read."""
    tensors = {f"ffn.{layer}.neurons": rows.int() for layer, rows in enumerate(overlay.neurons)}
    tensors |= {f"heads.{layer}.kept": rows for layer, rows in enumerate(overlay.heads or ())}
    if overlay.prompt is not None:
        tensors["prompt"] = overlay.prompt
    if overlay.head is not None:
        tensors |= {"head.weight": overlay.head.weight, "head.bias": overlay.head.bias}
    return {name: _bytes(tensor) for name, tensor in {**tensors, **overlay.changes}.items()}


def _holds(record: Any, said: Any) -> bool:
    """Whether a record has all that was said, and perhaps defaults besides."""
    if isinstance(said, dict):
        return all(key in record and _holds(record[key], value) for key, value in said.items())
    if isinstance(said, list):
        return len(record) == len(said) and all(map(_holds, record, said))
    return bool(record == said)


def _bytes(tensor: Tensor) -> bytes:
    raw = tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor
    values: np.ndarray[Any, Any] = raw.contiguous().numpy()
    return values.tobytes()


# --- mutants --------------------------------------------------------------------------------------


def test_every_mutant_is_refused_by_its_fault_or_means_what_it_says(
    files: list[bytes], backbone: Backbone, encoder: Encoder
) -> None:
    found: Counter[str] = Counter()
    process = psutil.Process()
    before = 0
    for number in range(COUNT):
        if number == WARM_UP:
            gc.collect()
            before = process.memory_info().rss
        good = files[number % len(files)]
        found[outcome(mutant(good, number), good, backbone, encoder)] += 1
    gc.collect()
    grown = process.memory_info().rss / before - 1
    report(
        f"{COUNT:,} mutated artifacts",
        f"{found['refused']:,} refused by the name of the fault, {found['identical']:,} identical, "
        f"{found['other']:,} other sound artifacts; resident memory grew {100 * grown:.1f} %",
    )
    assert min(found["refused"], found["identical"], found["other"]) > COUNT / 100
    assert grown < 0.03


def test_memory_after_mutants_is_what_it_was(
    files: list[bytes], backbone: Backbone, encoder: Encoder
) -> None:
    def refuse_all() -> int:
        for number in range(200):
            good = files[number % len(files)]
            outcome(mutant(good, number), good, backbone, encoder)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        refuse_all()
        assert refuse_all() - refuse_all() > -50_000
    finally:
        tracemalloc.stop()


def test_a_refused_artifact_leaves_nothing_in_the_store(
    files: list[bytes], backbone: Backbone, store: Store
) -> None:
    def content() -> dict[str, bytes]:
        kept = (path for path in store.root.rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in kept if "backbones" not in path.parts}

    published: dict[tuple[str, int], bytes] = {}
    for number in range(COUNT // 20):
        made = mutant(files[number % len(files)], number)
        before = content()
        try:
            verified = check_artifact(made.data, store)
        except ModelStoreError:
            assert content() == before, made.what
            continue
        info = store.publish(verified)
        published[info.task, info.version] = made.data
    assert len(published) > COUNT / 2_000
    for (task, version), data in published.items():
        assert store.read(task, version)[1] == data
    files_there = [path for path in (store.root / "tasks").rglob("*") if path.is_file()]
    assert len(files_there) == len(published)


# --- made by hand ---------------------------------------------------------------------------------

MANY = 1_000_000


def _manifest(**changes: Any) -> Any:
    return lambda good: whole(good.header, good.body, {**good.manifest, **changes})


def _provenance(**changes: Any) -> Any:
    return lambda good: whole(
        good.header,
        good.body,
        {**good.manifest, "provenance": good.manifest["provenance"] | changes},
    )


def _text(change: Any) -> Any:
    return lambda good: whole(good.header, good.body, change(json.dumps(good.manifest)))


def _entry(name: str, **changes: Any) -> Any:
    return lambda good: whole({**good.header, name: good.header[name] | changes}, good.body)


def _keys(count: int) -> str:
    return ",".join(f'"{number:x}":0' for number in range(count))


HOSTILE: dict[str, tuple[Any, str]] = {
    "2^63 bytes of header": (
        lambda good: (1 << 63).to_bytes(8, "little") + good.body,
        "not an art",
    ),
    "100 MB of header announced": (
        lambda good: (10**8).to_bytes(8, "little") + whole(good.header, good.body)[8:],
        "not an artifact",
    ),
    "a header over the limit": (
        lambda good: whole(b"{" + b" " * MAX_HEADER_BYTES + b"}", b""),
        f"at most {MAX_HEADER_BYTES}",
    ),
    "tensors of 2^60 bytes": (
        _entry("head.weight", shape=[3, 2**47], data_offsets=[0, 2**60]),
        "'head.weight' is F32 [3, 140737488355328]; F32 [3, 32] is expected",
    ),
    "a shape whose product overflows": (_entry("head.weight", shape=[2**40, 2**40]), "head.weight"),
    "a shape of a million sides": (_entry("prompt", shape=[1] * MANY), "'prompt' needs"),
    "a type of a million letters": (_entry("prompt", dtype="F" * MANY), "'prompt' is FFFF"),
    "a tensor's name of 3 MB": (
        lambda good: whole({**good.header, "x" * 3 * MANY: good.header["prompt"]}, good.body),
        "unknown tensor 'xxx",
    ),
    "30,000 tensors": (
        lambda good: whole(
            {**good.header, **{f"t{n}": good.header["prompt"] for n in range(30_000)}}, good.body
        ),
        "unknown tensor 't0'",
    ),
    "120,000 tensors": (
        lambda good: whole(
            {**good.header, **{f"t{n}": {"shape": []} for n in range(120_000)}}, good.body
        ),
        "opening brackets",
    ),
    "a deep header": (lambda good: whole(b"[" * MANY + b"]" * MANY, b""), "opening brackets"),
    "a header so deep that it recurses": (
        lambda good: whole(b"[" * 50_000 + b"]" * 50_000, b""),
        "recursion depth",
    ),
    "a deep manifest": (_text(lambda text: "[" * 50_000 + text), "recursion depth"),
    "deep settings": (
        _text(lambda text: text.replace("{}", '{"a":' * 900 + "0" + "}" * 900)),
        "recu",
    ),
    "a million lists": (_provenance(settings={"a": [[]] * MANY}), "opening brackets"),
    "a million measurements": (_manifest(metrics=[{}] * MANY), "opening brackets"),
    "40,000 measurements": (_manifest(metrics=[{}] * 40_000), "metrics.0.network: Field required"),
    "a million counts": (
        _manifest(ffn_kept=[0] * MANY),
        "ffn_kept: Tuple should have at most 1000",
    ),
    "a million wrong counts": (_manifest(ffn_kept=[-1] * MANY), "ffn_kept.0: Input should be"),
    "half a million labels": (
        _manifest(labels=["a"] * (MANY // 2)),
        "labels: Tuple should have at mo",
    ),
    "300,000 unknown keys": (
        _text(lambda text: f"{text[:-1]}, {_keys(300_000)}}}"),
        "300016 keys; at most 1000",
    ),
    "300,000 keys, one of them twice, the last": (
        _text(lambda text: f'{text[:-1]}, {_keys(300_000)}, "twice":0, "twice":0}}'),
        "keys; at most 1000",
    ),
    "60,000 tensors, one of them twice": (
        lambda good: whole(f'{{{_keys(60_000)}, "prompt": 0, "prompt": 0}}'.encode(), b""),
        "'prompt' stands twice",
    ),
    "a key of 3 MB": (_manifest(**{"k" * 3 * MANY: 0}), "kkkk"),
    "a number of 4,000 digits": (
        _manifest(max_tokens=10**4_000),
        "max_tokens: Input should be less",
    ),
    "a number of 5,000 digits": (
        _text(lambda text: text.replace('"max_tokens": 32', '"max_tokens": ' + "9" * 5_000)),
        "4300 digits",
    ),
    "a path for a task": (_manifest(task="../../etc/passwd"), "task: String should match"),
    "an absolute path for a task": (_manifest(task="/tmp/x"), "task: String should match"),  # noqa: S108
    "a line feed behind a task": (_manifest(task="mood\n"), "task: String should match"),
    "a zero byte in a task": (_manifest(task="mood\0"), "task: String should match"),
    "letters that look like others": (
        _manifest(task="m\u043e\u043ed"),
        "task: String should match",
    ),
    "a backbone's name of 3 MB": (
        _manifest(backbone={"name": "n" * 3 * MANY, "fingerprint": "0" * 64}),
        "localize the task again",
    ),
    "another's fingerprint as a path": (
        _manifest(backbone={"name": "tiny", "fingerprint": "../" * 21 + "a"}),
        "backbone.fingerprint: String should match",
    ),
    "a template without end": (
        _manifest(template=["{text}" + "the " * 2_000]),
        "template alone exc",
    ),
    "a template that makes a mask": (_manifest(template=["{text}[MASK] {mask}"]), "beside {mask}"),
    "UTF-16": (lambda good: whole(json.dumps(good.header).encode("utf-16"), good.body), "utf-8"),
    "a byte order mark": (
        lambda good: whole(b"\xef\xbb\xbf" + json.dumps(good.header).encode(), good.body),
        "damaged",
    ),
    "two headers": (
        lambda good: whole(json.dumps(good.header).encode() * 2, good.body),
        "damaged",
    ),
    "a pickle": (lambda good: b"\x80\x04\x95\x10\0\0\0\0\0\0\0cos\nsystem\n", "not an artifact"),
    "a zip file": (lambda good: b"PK\x03\x04" + bytes(MANY), "not an artifact"),
    "zeros": (lambda good: bytes(MANY), "not an artifact"),
    "nothing": (lambda good: b"", "not an artifact"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_artifact_is_refused_by_its_fault_and_costs_little(
    name: str, files: list[bytes], backbone: Backbone, encoder: Encoder
) -> None:
    make, fault = HOSTILE[name]
    good = files[0]
    made = Mutant(name, make(parts(good)), (fault,))
    # Against 5.6 GB that one of these would once have taken.
    tracemalloc.start()
    try:
        assert outcome(made, good, backbone, encoder) == "refused"
        assert tracemalloc.get_traced_memory()[1] < 80_000_000
    finally:
        tracemalloc.stop()


def test_an_artifact_full_of_metadata_is_as_good_as_without(
    files: list[bytes], backbone: Backbone, encoder: Encoder
) -> None:
    good = parts(files[0])
    metadata = good.header["__metadata__"] | {f"note {number}": "x" * 40 for number in range(900)}
    made = whole({**good.header, "__metadata__": metadata}, good.body)
    assert KEY in metadata
    found = outcome(Mutant("metadata", made, (), harmless=True), files[0], backbone, encoder)
    assert found == "identical"
