"""The native forward: every build and precision against the reference, and laws over any batch.

Two kinds of comparison: with `TorchBackend` in fp32, one sequence at a time, within a tolerance
that the precision allows; and of the native forward with itself, bit for bit, where batch-mates,
threads or the state of a plan must not matter.
"""

import ctypes.util
import dataclasses
import gc
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model_store import native
from model_store.artifact import Overlay
from model_store.backbone import Backbone, EncoderConfig
from model_store.backend import TorchBackend
from model_store.manifest import LinearHead as LinearHeadRecord
from model_store.manifest import Manifest, Prompt, VerbalizerHead
from model_store.native import Build, NativeBackend, NativePlan, builds, load
from model_store.native_weights import Precision
from model_store.packing import Item, Read
from model_store.plan import LinearHead
from model_store.tokenization import Encoding
from tests.overlays import PARTS, fp32_encoder, random_changes, small_backbone
from tests.reference import FAMILIES

Answers = list[NDArray[Any]]

KINDS: list[tuple[Build, Precision]] = [
    ("amx", "fp32"),
    ("amx", "bf16"),
    ("amx", "int8"),
    ("avx512", "fp32"),
    ("avx512", "bf16"),
    ("avx512", "int8"),
    ("avx2", "fp32"),
]
TOLERANCE: dict[Precision, float] = {"fp32": 1e-5, "bf16": 0.008, "int8": 0.04}
"""Of probabilities: not twice the largest differences that these networks have."""

MANY = 600
"""Positions of the backbone for long sequences."""

BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "one layer": ("bert", {"num_hidden_layers": 1}),
    "odd widths": (
        "bert",
        {
            "hidden_size": 40,
            "num_attention_heads": 5,
            "intermediate_size": 71,
            "hidden_act": "gelu_new",
        },
    ),
    "odd heads": (
        "bert",
        {
            "hidden_size": 66,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "hidden_act": "relu",
        },
    ),
    "wide heads": (
        "bert",
        {"hidden_size": 256, "num_attention_heads": 2, "intermediate_size": 200},
    ),
    "usual heads": (
        "bert",
        {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256},
    ),
    "odd electra": (
        "electra",
        {
            "embedding_size": 24,
            "hidden_size": 72,
            "num_attention_heads": 3,
            "intermediate_size": 130,
        },
    ),
    "one layer electra": ("electra", {"num_hidden_layers": 1}),
    "long": ("bert", {"max_position_embeddings": MANY}),
}

ALL: dict[str, Any] = {"heads": (1, 2, 0), "rank": 2, "scales": True, "norms": True}
TASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "first token": {"prompt": 0, "read": "cls"},
    "mask": {"read": "mask"},
    "mask without prompt": {"read": "mask", "prompt": 0},
    "verbalizer": {"verbalizer": True},
    "no neurons": {"neurons": (0,)},
    "all neurons": {"neurons": 1.0},
    "neurons by layer": {"neurons": (0, 17, 33)},
    "one class": {"classes": 1},
    "many classes": {"classes": 77},
    "long prompt": {"prompt": 18, "read": "cls"},
    "heads by layer": {"heads": (2, 0, 1)},
    "no heads": {"heads": (0,), "rank": 3},
    "scales": {"scales": True},
    "norms": {"norms": True},
    "rank 1": {"rank": 1},
    "rank 2": {"rank": 2, "prompt": 0},
    "rank 5": {"rank": 5, "read": "mask"},
    "rank 17": {"rank": 17, "read": "cls"},
    "attention deltas": {"rank": 3, "parts": ("q", "k", "v", "o")},
    "ffn deltas": {"rank": 3, "parts": ("ffn_in", "ffn_out"), "neurons": (0, 20)},
    "everything": {"prompt": 7} | ALL,
    "everything, verbalizer": {"verbalizer": True, "neurons": (31, 1)} | ALL,
}
"""Settings of `_overlay`, by what is special about them."""


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Backbone]:
    """Makes the backbones of `BACKBONES`, each once."""

    @cache
    def make(name: str) -> Backbone:
        family, changes = BACKBONES[name]
        return small_backbone(tmp_path_factory.mktemp("backbone"), family, **changes)[1]

    return make


@pytest.fixture(scope="module")
def native_of(backbones: Callable[[str], Backbone]) -> Callable[..., NativeBackend]:
    """Makes native backends of a backbone, and keeps a few; skips where the build cannot run."""

    # Each has working memory in huge pages: not all at once.
    @lru_cache(maxsize=8)
    def make(name: str, build: Build, precision: Precision, threads: int = 1) -> NativeBackend:
        if build not in builds():
            pytest.skip(f"the native forward for {build} is not built, or not for this processor")
        backbone = backbones(name)
        return NativeBackend(backbone.config, backbone.tensors, precision, threads, build)

    return make


def _overlay(
    config: EncoderConfig,
    *,
    seed: int = 0,
    read: Read = "mean",
    prompt: int = 3,
    neurons: Sequence[int] | float = 0.5,
    heads: Sequence[int] | None = None,
    rank: int = 0,
    parts: Sequence[str] = PARTS,
    scales: bool = False,
    norms: bool = False,
    classes: int = 3,
    verbalizer: bool = False,
) -> Overlay:
    """Random; `neurons` and `heads` are how many each layer keeps, in turn, or a share of all."""
    generator = torch.Generator().manual_seed(seed)

    def some(width: int, counts: Sequence[int]) -> tuple[torch.Tensor, ...]:
        turns = itertools.islice(itertools.cycle(counts), config.layers)
        return tuple(
            torch.randperm(width, generator=generator)[:count].sort().values.int()
            for count in turns
        )

    if isinstance(neurons, float):
        neurons = [round(neurons * config.ffn)]
    kept = some(config.ffn, neurons)
    kept_heads = None if heads is None else some(config.heads, heads)
    changes = random_changes(
        config,
        kept,
        kept_heads,
        generator,
        scales=scales,
        norms=norms,
        delta_rank=rank,
        parts=parts,
    )
    weight = torch.randn(classes, config.hidden, generator=generator) / config.hidden**0.5
    linear = LinearHead(weight, torch.randn(classes, generator=generator) / 3)
    tokens = torch.randperm(config.vocabulary, generator=generator)[:classes].tolist()
    words = VerbalizerHead(words=tuple(map(str, tokens)), token_ids=tuple(tokens))
    record: dict[str, Any] = {
        "read": "mask" if verbalizer else read,
        "prompt": Prompt(tokens=prompt),
        "head": words if verbalizer else LinearHeadRecord(),
    }
    # What a backend makes of an overlay needs no more than that.
    manifest = Manifest.model_construct(**record)
    vectors = torch.randn(prompt, config.embedding, generator=generator) if prompt else None
    head = None if verbalizer else linear
    return Overlay(manifest, kept, vectors, head, kept_heads, changes)


def _encoding(config: EncoderConfig, length: int, seed: int = 0) -> Encoding:
    """Random tokens; the mask may be any but the first, and the second half has type 1."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    tokens = torch.randint(config.vocabulary, (length,), generator=generator).tolist()
    kinds = [int(config.token_types > 1 and place >= length // 2) for place in range(length)]
    mask = 1 + int(torch.randint(length - 1, (1,), generator=generator)) if length > 1 else 0
    return Encoding(tokens, kinds, mask)


def _expected(backbone: Backbone, overlay: Overlay, encodings: Sequence[Encoding]) -> Answers:
    """The reference's answers, one sequence at a time."""
    reference = TorchBackend(fp32_encoder(backbone), threads=1)
    plan = reference.plan(overlay)
    return [reference.answer([Item(encoding, 0)], [plan])[0] for encoding in encodings]


def _same(given: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]]) -> bool:
    """Bit for bit."""
    return [row.tobytes() for row in given] == [row.tobytes() for row in expected]


Backbones = Callable[[str], Backbone]
NativeOf = Callable[..., NativeBackend]


Answered = Callable[[str], tuple[list[Overlay], list[Encoding], list[Answers]]]


@pytest.fixture(scope="module")
def answered(backbones: Backbones) -> Answered:
    """All of `TASKS` on a backbone, inputs, and the reference's answers."""

    @cache
    def make(name: str) -> tuple[list[Overlay], list[Encoding], list[Answers]]:
        backbone = backbones(name)
        config = backbone.config
        overlays = [_overlay(config, seed=seed, **task) for seed, task in enumerate(TASKS.values())]
        encodings = [_encoding(config, length) for length in (2, 3, 5, 16, 17, 33, 46)]
        return overlays, encodings, [_expected(backbone, one, encodings) for one in overlays]

    return make


# -- The reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(("build", "precision"), KINDS)
def test_answers_of_mixed_tasks_are_those_of_the_reference(
    answered: Answered,
    native_of: NativeOf,
    build: Build,
    precision: Precision,
    name: str,
) -> None:
    backend = native_of(name, build, precision)
    overlays, encodings, expected = answered(name)
    plans = [backend.plan(overlay) for overlay in overlays]
    # Tasks in turn, as they would wait in a queue.
    items = [Item(one, segment) for one in encodings for segment in range(len(plans))]
    ready = backend.answer(items, plans)
    for row, item in enumerate(items):
        task = list(TASKS)[item.segment]
        there = expected[item.segment][row // len(plans)]
        assert ready[row].dtype == np.float32
        np.testing.assert_allclose(
            ready[row], there, atol=TOLERANCE[precision], rtol=0, err_msg=task
        )
    # Packed beforehand, or by more threads, they are the same to the last bit.
    warm = [backend.warm(plan) for plan in plans]
    assert _same(backend.answer(items, warm), ready)
    assert _same(native_of(name, build, precision, 2).answer(items, plans), ready)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("build", "precision"), KINDS)
def test_long_sequences_up_to_the_position_limit(
    backbones: Backbones, native_of: NativeOf, build: Build, precision: Precision, threads: int
) -> None:
    backend, backbone = native_of("long", build, precision, threads), backbones("long")
    overlays = [
        _overlay(backbone.config, prompt=10),
        _overlay(backbone.config, prompt=0, read="cls", seed=1),
        _overlay(backbone.config, prompt=512, read="cls", seed=2),
        _overlay(backbone.config, prompt=11, seed=3, **ALL),
    ]
    lengths = [(127, 129, MANY - 10), (48, 49, MANY), (2, MANY - 512), (511, MANY - 11)]
    for overlay, counts in zip(overlays, lengths, strict=True):
        encodings = [_encoding(backbone.config, length) for length in counts]
        plan = backend.plan(overlay)
        given = backend.answer([Item(one, 0) for one in encodings], [plan])
        expected = _expected(backbone, overlay, encodings)
        for one, there in zip(given, expected, strict=True):
            np.testing.assert_allclose(one, there, atol=TOLERANCE[precision], rtol=0)


@pytest.mark.parametrize(("build", "precision"), KINDS)
def test_the_shortest_sequences_are_answered(
    backbones: Backbones, native_of: NativeOf, build: Build, precision: Precision
) -> None:
    backend, backbone = native_of("bert", build, precision), backbones("bert")
    reads: tuple[Read, ...] = ("cls", "mean")
    for prompt, read in itertools.product((0, 1), reads):
        overlay = _overlay(backbone.config, prompt=prompt, read=read)
        encodings = [_encoding(backbone.config, 1, seed) for seed in range(3)]
        given = backend.answer([Item(one, 0) for one in encodings], [backend.plan(overlay)])
        expected = _expected(backbone, overlay, encodings)
        for one, there in zip(given, expected, strict=True):
            np.testing.assert_allclose(one, there, atol=TOLERANCE[precision], rtol=0)


@pytest.mark.parametrize(("build", "precision"), KINDS)
def test_a_large_batch_of_many_tasks(
    backbones: Backbones, native_of: NativeOf, build: Build, precision: Precision
) -> None:
    backend, backbone = native_of("odd widths", build, precision, 2), backbones("odd widths")
    config = backbone.config
    overlays = [_overlay(config, seed=seed, **(ALL if seed % 3 == 0 else {})) for seed in range(40)]
    items = [Item(_encoding(config, 2 + number % 40, number), number % 40) for number in range(400)]
    given = backend.answer(items, [backend.plan(overlay) for overlay in overlays])
    for number in range(0, 400, 7):
        overlay = overlays[items[number].segment]
        (expected,) = _expected(backbone, overlay, [items[number].encoding])
        np.testing.assert_allclose(given[number], expected, atol=TOLERANCE[precision], rtol=0)


# -- Laws: bit for bit -----------------------------------------------------------------------------


@st.composite
def _tasks(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Settings of up to four tasks for a backbone of 48 neurons and 4 heads in 3 layers."""
    count = st.lists(st.integers(0, 48), min_size=3, max_size=3)
    task = st.fixed_dictionaries(
        {
            "seed": st.integers(0, 3),
            "read": st.sampled_from(["cls", "mask", "mean"]),
            "prompt": st.sampled_from([0, 1, 3, 17]),
            "neurons": count,
            "heads": st.none() | st.lists(st.integers(0, 4), min_size=3, max_size=3),
            "rank": st.sampled_from([0, 0, 1, 3, 17]),
            "parts": st.sets(st.sampled_from(PARTS), min_size=1).map(sorted),
            "scales": st.booleans(),
            "norms": st.booleans(),
            "verbalizer": st.booleans(),
        }
    )
    return draw(st.lists(task, min_size=1, max_size=4))


@pytest.mark.parametrize(("build", "precision"), KINDS)
@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    tasks=_tasks(),
    asked=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=12),
    warm=st.integers(0, 15),
    threads=st.integers(2, 3),
)
def test_an_answer_depends_on_its_own_input_and_task_alone(
    backbones: Backbones,
    native_of: NativeOf,
    build: Build,
    precision: Precision,
    tasks: list[dict[str, Any]],
    asked: list[tuple[int, int]],
    warm: int,
    threads: int,
) -> None:
    """Whatever shares the batch, in any order, by any number of threads, warm or ready."""
    backend, config = native_of("bert", build, precision), backbones("bert").config
    plans = [backend.plan(_overlay(config, **task)) for task in tasks]
    mixed = [
        backend.warm(plan) if warm >> number & 1 else plan for number, plan in enumerate(plans)
    ]
    items = [
        Item(_encoding(config, length, number), task % len(tasks))
        for number, (length, task) in enumerate(asked)
    ]
    alone = [backend.answer([Item(item.encoding, 0)], [plans[item.segment]])[0] for item in items]
    assert _same(backend.answer(items, plans), alone)
    assert _same(backend.answer(items, mixed), alone)
    assert _same(native_of("bert", build, precision, threads).answer(items, mixed), alone)
    assert _same(backend.answer(items[::-1], plans), alone[::-1])


@pytest.mark.parametrize("threads", [3, 8])
@pytest.mark.parametrize(("build", "precision"), KINDS)
def test_few_short_sequences_are_shared_by_many_threads(
    backbones: Backbones, native_of: NativeOf, build: Build, precision: Precision, threads: int
) -> None:
    """More threads than rows, tasks or processors, and work cut into the smallest pieces."""
    backend, config = native_of("bert", build, precision), backbones("bert").config
    many = native_of("bert", build, precision, threads)
    few: list[list[dict[str, Any]]] = [
        [{}] * 3,
        [{}],
        [{"prompt": 0}, ALL],
        [{"prompt": 17, "read": "cls"}, {}],
    ]
    for kinds in few:
        plans = [backend.warm(backend.plan(_overlay(config, **kind))) for kind in kinds]
        items = [Item(_encoding(config, 2 + 9 * s), s) for s in range(len(plans))]
        assert _same(many.answer(items, plans), backend.answer(items, plans))


@pytest.mark.parametrize(
    "lengths",
    [[1 + 7 * s % 38 for s in range(48)], [300, 4, 4, 4], [4, 4, 4, 300], [200, 200], [9] * 90],
    ids=["many", "long first", "long last", "two", "equal"],
)
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize(("build", "precision"), KINDS)
def test_large_batches_are_divided_among_the_threads(
    backbones: Backbones,
    native_of: NativeOf,
    build: Build,
    precision: Precision,
    threads: int,
    lengths: Sequence[int],
) -> None:
    """Evenly or, where that is not possible, not; each answer lands where it belongs."""
    backend, config = native_of("long", build, precision), backbones("long").config
    kinds: list[dict[str, Any]] = [
        {"verbalizer": True, "classes": 5},
        {"prompt": 0, "read": "cls", "classes": 2},
        ALL,
        {"prompt": 17, "classes": 7},
    ]
    plans = [backend.plan(_overlay(config, seed=seed, **kind)) for seed, kind in enumerate(kinds)]
    items = [Item(_encoding(config, length, s), s % 4) for s, length in enumerate(lengths)]
    alone = [backend.answer([Item(item.encoding, 0)], [plans[item.segment]])[0] for item in items]
    assert _same(native_of("long", build, precision, threads).answer(items, plans), alone)


@pytest.mark.parametrize(("build", "precision"), KINDS)
def test_plans_are_made_and_warmed_while_others_answer(
    backbones: Backbones, native_of: NativeOf, build: Build, precision: Precision
) -> None:
    backend, config = native_of("bert", build, precision, 2), backbones("bert").config
    overlays = [_overlay(config, seed=seed, **(ALL if seed % 2 else {})) for seed in range(6)]
    plans = [backend.plan(overlay) for overlay in overlays]
    items = [Item(_encoding(config, 3 + number), number % 6) for number in range(12)]
    before = backend.answer(items, plans)
    warmed: list[list[NativePlan]] = []

    def warm() -> None:
        for _ in range(20):
            warmed.append([backend.warm(backend.plan(overlay)) for overlay in overlays])

    thread = threading.Thread(target=warm)
    thread.start()
    while thread.is_alive():
        assert _same(backend.answer(items, plans), before)
    thread.join()
    assert len(warmed) == 20
    for some in warmed[::5]:
        assert _same(backend.answer(items, some), before)


@pytest.mark.parametrize(("build", "precision"), KINDS)
def test_another_library_may_use_the_processors_tiles_in_between(
    backbones: Backbones, native_of: NativeOf, build: Build, precision: Precision
) -> None:
    """torch shapes them as well, in this very thread."""
    backend, backbone = native_of("usual heads", build, precision), backbones("usual heads")
    plan = backend.plan(_overlay(backbone.config))
    items = [Item(_encoding(backbone.config, 40), 0)]
    before = backend.answer(items, [plan])
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    product = x @ x
    for _ in range(3):
        assert _same(backend.answer(items, [plan]), before)
        assert torch.equal(x @ x, product)


@pytest.mark.parametrize("name", ["usual heads", "odd electra", "one layer"])
@pytest.mark.parametrize(("build", "precision"), KINDS)
def test_rows_beyond_one_block_change_no_answer(
    backbones: Backbones, native_of: NativeOf, build: Build, precision: Precision, name: str
) -> None:
    """Hundreds of rows of one task, and of tasks that share what they may, cut into blocks."""
    backend, config = native_of(name, build, precision), backbones(name).config
    plans = [
        backend.plan(_overlay(config, seed=seed, **task))
        for seed, task in enumerate([{}, ALL, {"read": "cls"}, {"prompt": 0, "norms": True}])
    ]
    items = [
        Item(_encoding(config, 1 + number % 37, number), number % 5 % 4) for number in range(60)
    ]
    given = backend.answer(items, plans)
    assert _same(native_of(name, build, precision, 2).answer(items, plans), given)
    for number in range(0, 60, 5):
        item = items[number]
        alone = backend.answer([Item(item.encoding, 0)], [plans[item.segment]])
        assert _same(alone, [given[number]])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("build", "precision"), KINDS)
def test_numbers_that_overflow_stay_inside_their_task(
    backbones: Backbones, native_of: NativeOf, build: Build, precision: Precision, threads: int
) -> None:
    """Batch-mates, and every later batch in the same memory, are answered as if nothing was."""
    backend, config = native_of("bert", build, precision, threads), backbones("bert").config
    overlays = [_overlay(config), _overlay(config, seed=1, **ALL), _overlay(config, read="cls")]
    plans = [backend.plan(overlay) for overlay in overlays]
    items = [Item(_encoding(config, 3 + number, number), number % 3) for number in range(12)]
    alone = backend.answer(items, plans)
    for number, broken in enumerate(_broken(config)):
        at = number % 4  # before, between and behind the others
        plan = backend.plan(broken)
        fault = [Item(_encoding(config, 5 + 7 * k), at) for k in range(4)]
        moved = [Item(item.encoding, item.segment + (item.segment >= at)) for item in items]
        for worse in (plan, backend.warm(plan)):
            given = backend.answer([*fault, *moved], [*plans[:at], worse, *plans[at:]])
            for one in given[:4]:
                assert not np.isfinite(one).all(), f"overlay {number} gives no numbers"
            assert _same(given[4:], alone)
        assert _same(backend.answer(items, plans), alone)


def _broken(config: EncoderConfig) -> Iterator[Overlay]:
    """Overlays whose numbers overflow, or are none, in every place that an overlay has."""
    plain = _overlay(config)
    assert plain.prompt is not None
    assert plain.head is not None
    for bad in (float("nan"), float("inf"), 3e38):
        yield dataclasses.replace(plain, prompt=torch.full_like(plain.prompt, bad))
        yield dataclasses.replace(
            plain, head=LinearHead(torch.full_like(plain.head.weight, bad), plain.head.bias)
        )
        whole = _overlay(config, neurons=1.0, **(ALL | {"heads": None}))
        for name in whole.changes:
            if ".1." in name and not (bad == 3e38 and ".weight" in name):
                worse = {name: torch.full_like(whole.changes[name], bad)}
                yield dataclasses.replace(whole, changes={**whole.changes, **worse})


# -- Memory ----------------------------------------------------------------------------------------


@pytest.fixture
def backend(backbones: Backbones) -> NativeBackend:
    """The best build here, in fp32, with nothing in it yet."""
    if not builds():
        pytest.skip("no native forward was built for this processor")
    backbone = backbones("bert")
    return NativeBackend(backbone.config, backbone.tensors, "fp32", threads=1)


def test_equal_neurons_of_two_plans_are_in_memory_once(backend: NativeBackend) -> None:
    config = backend.config
    one = _overlay(config)
    # The same neurons in layers 0 and 1, others in the last; and all else of its own.
    neurons = (*one.neurons[:2], one.neurons[2][1:])
    other = dataclasses.replace(_overlay(config, seed=1, norms=True), neurons=neurons)
    first, second = (backend.warm(backend.plan(overlay)) for overlay in (one, other))
    shared = set(first.parts) & set(second.parts)
    assert len(shared) == 2
    assert all(first.parts[key] == second.parts[key] > 0 for key in shared)
    pointers = [[layer.in_panels for layer in plan.layers] for plan in (first, second)]
    assert pointers[0][:2] == pointers[1][:2]
    assert pointers[0][2] != pointers[1][2]
    width = config.hidden + 32  # filled up to 64
    expected = 3 * (2 * 64 * width * 4 + 4 * width)  # 24 neurons filled up to 64, in and out; sums
    assert sum(size for key, size in first.parts.items() if isinstance(key, tuple)) == expected

    assert len(backend._shared) == 4
    del first
    gc.collect()
    assert len(backend._shared) == 3, "the last layer of the first"
    items = [Item(_encoding(config, 9), 0)]
    assert _same(backend.answer(items, [second]), backend.answer(items, [backend.plan(other)]))
    del second
    gc.collect()
    assert len(backend._shared) == 0


def test_a_plan_counts_what_it_holds(backend: NativeBackend) -> None:
    overlay = _overlay(backend.config, prompt=5, **ALL)
    ready = backend.plan(overlay)
    held = [part for part in ready.keep if isinstance(part, torch.Tensor)]
    assert sum(ready.parts.values()) >= sum(tensor.nbytes for tensor in held) > 0
    warm = backend.warm(ready)
    assert dict(ready.parts).items() <= dict(warm.parts).items(), "the ready plan lives on in it"
    (prompt,) = [
        size
        for key, size in warm.parts.items()
        if key not in ready.parts and not isinstance(key, tuple)
    ]
    hidden, attention = 64, 4 * 32  # filled up: 32 wide, and 4 heads of 8
    assert prompt == 5 * 4 * (hidden + 3 * attention)


def test_a_ready_plan_answers_as_before_when_it_was_made_warm(backend: NativeBackend) -> None:
    overlay = _overlay(backend.config)
    plan = backend.plan(overlay)
    items = [Item(_encoding(backend.config, 9), 0)]
    before = backend.answer(items, [plan])
    warm = backend.warm(plan)
    assert plan.layers[0].in_panels is None
    assert _same(backend.answer(items, [plan]), before)
    del plan
    gc.collect()
    assert _same(backend.answer(items, [warm]), before), "it holds what it points into"


def test_a_backend_that_is_let_go_ends_its_threads(backbones: Backbones) -> None:
    if not builds():
        pytest.skip("no native forward was built for this processor")
    backbone = backbones("bert")
    before = len(list(Path("/proc/self/task").iterdir()))
    backend = NativeBackend(backbone.config, backbone.tensors, "fp32", threads=3)
    assert len(list(Path("/proc/self/task").iterdir())) == before + 2
    del backend
    gc.collect()
    assert len(list(Path("/proc/self/task").iterdir())) == before


# -- What is refused -------------------------------------------------------------------------------


def test_inputs_beyond_the_backbones_tables_are_refused(backend: NativeBackend) -> None:
    config = backend.config
    plan = backend.plan(_overlay(config, prompt=10))
    good = Encoding([2, 5, 3], [0, 1, 1], 1)
    wrong = {
        f"token {config.vocabulary} given": dataclasses.replace(good, token_ids=[2, 120, 3]),
        "token -1 given": dataclasses.replace(good, token_ids=[2, -1, 3]),
        "token type 2 given": dataclasses.replace(good, token_types=[0, 2, 1]),
        "token type -1 given": dataclasses.replace(good, token_types=[0, -1, 1]),
        "length 57 given": _encoding(config, 57),
        "length 0 given": Encoding([], [], 0),
        "mask 3 given": dataclasses.replace(good, mask=3),
        "mask -1 given": dataclasses.replace(good, mask=-1),
    }
    expected = backend.answer([Item(good, 0)], [plan])
    for message, encoding in wrong.items():
        for items in ([Item(encoding, 0)], [Item(good, 0), Item(encoding, 0)]):
            with pytest.raises(ValueError, match=message):
                backend.answer(items, [plan])
        assert _same(backend.answer([Item(good, 0)], [plan]), expected)
    assert backend.answer([Item(_encoding(config, 56), 0)], [plan]), "66 positions"


def test_a_backbone_without_token_types_takes_type_0_alone(
    backbones: Backbones, native_of: NativeOf
) -> None:
    if not builds():
        pytest.skip("no native forward was built for this processor")
    backend = native_of("distilbert", builds()[0], "fp32")
    assert backend.config.token_types == 0
    plan = backend.plan(_overlay(backend.config))
    assert backend.answer([Item(Encoding([2, 3], [0, 0], 0), 0)], [plan])
    with pytest.raises(ValueError, match="token type 1 given"):
        backend.answer([Item(Encoding([2, 3], [0, 1], 0), 0)], [plan])


def test_a_build_that_is_not_there_is_an_os_error(
    backbones: Backbones, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_path", lambda build: None)
    load.cache_clear()
    backbone = backbones("bert")
    assert builds() == []
    with pytest.raises(OSError, match=r"not built for avx2: install with a C\+\+ compiler"):
        load("avx2")
    with pytest.raises(OSError, match="no native forward for this processor"):
        NativeBackend(backbone.config, backbone.tensors, "fp32", threads=1)


def test_a_build_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its structures would hold other things in other places."""
    for build in builds():
        load.cache_clear()
        assert load(build)
    there = builds()
    monkeypatch.setattr(native, "_STRUCTURES", (*native._STRUCTURES[:-1], native._Task))
    load.cache_clear()
    for build in there:
        with pytest.raises(OSError, match=f"for {build} was built from other sources"):
            load(build)
    if ctypes.util.find_library("m"):
        library = str(ctypes.util.find_library("m"))
        monkeypatch.setattr(native, "_path", lambda build: library)
        with pytest.raises(OSError, match="for avx2 was built from other sources"):
            load("avx2")
    assert builds() == []


def test_a_build_that_cannot_run_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor lacks something, the build is missing, or the kernel gives no leave."""
    missing: set[Build] = set()

    def find(build: Build) -> None:
        if build in missing:
            raise OSError("not there")

    monkeypatch.setattr(native, "load", find)
    have = {"avx2": True, "fma3": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: have)
    assert builds() == ["avx2"]
    have |= dict.fromkeys(native.NEEDS["avx512"], True)
    assert builds() == ["avx512", "avx2"]
    have |= dict.fromkeys(native.NEEDS["amx"], True)
    assert builds() == ["amx", "avx512", "avx2"]
    missing.add("avx512")
    assert builds() == ["amx", "avx2"]
    have["avx2"] = False
    assert builds() == ["amx"]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"})
    assert builds() == []


def test_what_no_build_computes_is_refused(backbones: Backbones) -> None:
    backbone = backbones("bert")
    for precision in ("bf16", "int8"):
        with pytest.raises(OSError, match=f"computes in fp32, not in {precision}"):
            NativeBackend(backbone.config, backbone.tensors, precision, 1, "avx2")
    wide = backbone.config.model_copy(update={"hidden": 1032})
    with pytest.raises(OSError, match="no native forward for H 1032, A 4"):
        NativeBackend(wide, backbone.tensors, "fp32", 1, "avx2")
