"""What many tasks cost in one engine, and how many sentences it answers: no peers in here."""

import ctypes
import gc
import random
import statistics
from collections.abc import Callable, Sequence

import psutil
from rich.progress import Progress

from benchmarks.engine_contest import BATCHES, Settings
from benchmarks.engine_models import Model, random_overlay, zipf_tasks
from benchmarks.engine_ours import Ours
from benchmarks.engine_timing import interleaved
from benchmarks.engine_works import WORKS, Sentences, batches, sentences_of
from model_store import artifact
from model_store.artifact import Overlay
from model_store.native_weights import Precision

KEEP = 0.5
TASKS = 16
REGISTERED = 1000
COLD_TASKS = 200
PROMPT_TOKENS = 10
SST2_BATCH = 32
ZIPF_BATCHES = 32
GIB = 1 << 30

TurnDone = Callable[[], None]


def measure_alone(
    model: Callable[[str], Model],
    lengths: dict[str, list[int]],
    settings: Settings,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """All of it, by precision; cold memory by model, as no precision is in it."""
    works = {work.name: work for work in WORKS}
    bar = progress.add_task("turns of ours alone", total=None)

    def advance() -> None:
        progress.advance(bar)

    def asked(name: str) -> list[Sentences]:
        config = model(works[name].model).config
        limits = config.vocabulary, config.max_tokens
        return batches(works[name], lengths, BATCHES, *limits, settings.seed)

    mixed: dict[str, float] = {}
    zipf: dict[str, float] = {}
    sst2: dict[str, float] = {}
    for precision in settings.precisions:
        if "tasks16" in settings.parts:
            mixed[precision] = mixed_over_one(
                model("bert-base"), precision, asked("bert-base-32"), settings.rounds, advance
            )
        if "zipf" in settings.parts:
            small, batched = model("minilm-l6"), asked("minilm-l6-32")
            zipf[precision] = zipf_over_one(
                small, precision, batched, settings.rounds, settings.seed, advance
            )
        if "sst2" in settings.parts and "sst2" in lengths:
            small = model("minilm-l6")
            batched = sst2_batches(lengths["sst2"], small.config.vocabulary, settings.seed)
            sst2[precision] = sentences_per_second(
                small, precision, batched, settings.rounds, advance
            )
    cold: dict[str, float] = {}
    if "memory" in settings.parts:
        cold = {name: cold_task_bytes(model(name)) for name in ("bert-base", "minilm-l6")}
    return {
        "tasks16_over_one": {name: round(value, 4) for name, value in mixed.items()},
        "zipf_1000_over_one": {name: round(value, 4) for name, value in zipf.items()},
        "sentences_per_second": {name: round(value, 1) for name, value in sst2.items()},
        "cold_task_bytes": cold,
    }


def mixed_over_one(
    model: Model, precision: Precision, asked: Sequence[Sentences], rounds: int, turn_done: TurnDone
) -> float:
    """Time of batches of `TASKS` tasks over the time of the same batches of one task."""
    overlays = [random_overlay(model, number, KEEP) for number in range(TASKS)]
    ours = Ours(model.backbone, precision, overlays, GIB)
    count = len(asked[0].encodings)
    mixed = [number % TASKS for number in range(count)]
    ours.answer(asked[0].encodings, mixed)
    ours.settle()
    seconds = interleaved(
        {
            "mixed": lambda number: ours.answer(asked[number].encodings, mixed),
            "one": lambda number: ours.answer(asked[number].encodings, [0] * count),
        },
        len(asked),
        rounds,
        turn_done,
    )
    ours.close()
    return statistics.median(seconds["mixed"]) / statistics.median(seconds["one"])


def zipf_over_one(
    model: Model,
    precision: Precision,
    asked: Sequence[Sentences],
    rounds: int,
    seed: int,
    turn_done: TurnDone,
    *,
    registered: int = REGISTERED,
    batches_a_round: int = ZIPF_BATCHES,
) -> float:
    """Throughput with `registered` tasks asked for by Zipf's law over that with one task.

    One round is `batches_a_round` batches on end. Rounds go on through one long stream of requests,
    so that tasks which were not asked for lately come up, as on a server. Plans have 1 GiB.
    """
    ours = Ours(
        model.backbone,
        precision,
        [random_overlay(model, number, KEEP) for number in range(registered)],
        GIB,
    )
    count = len(asked[0].encodings)
    # Warm-up and every round of the stream; a quick turn may repeat.
    stream = zipf_tasks(registered, 4 * (rounds + 2) * batches_a_round * count, seed)
    place = 0

    def many(number: int) -> None:
        nonlocal place
        for step in range(batches_a_round):
            tasks = [stream[(place + row) % len(stream)] for row in range(count)]
            place += count
            ours.answer(asked[(number + step) % len(asked)].encodings, tasks)

    def one(number: int) -> None:
        for step in range(batches_a_round):
            ours.answer(asked[(number + step) % len(asked)].encodings, [0] * count)

    seconds = interleaved({"many": many, "one": one}, 1, rounds, turn_done)
    ours.close()
    return statistics.median(seconds["one"]) / statistics.median(seconds["many"])


def cold_task_bytes(model: Model, prompt_tokens: int = 0) -> int:
    """Memory that a registered task takes which nobody has asked for: growth of this process.

    Not less than its tensors: they may lie where something else was freed.
    """
    files = [
        artifact.write(random_overlay(model, number, KEEP, prompt_tokens=prompt_tokens))
        for number in range(COLD_TASKS)
    ]
    backbone = model.backbone
    gc.collect()
    _give_back_free_memory()
    before = psutil.Process().memory_info().rss
    overlays = [artifact.read(file, backbone.config, backbone.fingerprint) for file in files]
    gc.collect()
    grown = psutil.Process().memory_info().rss - before
    tensors = sum(_tensor_bytes(overlay) for overlay in overlays)
    return max(tensors, grown) // len(overlays)


def _tensor_bytes(overlay: Overlay) -> int:
    assert overlay.head is not None, "random overlays have a linear head"
    tensors = [*overlay.neurons, overlay.head.weight, overlay.head.bias]
    if overlay.prompt is not None:
        tensors.append(overlay.prompt)
    return sum(tensor.nbytes for tensor in tensors)


def _give_back_free_memory() -> None:
    """Or what is allocated next would go where something else was freed, and count as nothing."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc's alone
        libc.malloc_trim(0)


def sst2_batches(lengths: Sequence[int], vocabulary: int, seed: int) -> list[Sentences]:
    """All sentences of SST-2's test set, by length, in batches as they come."""
    generator = random.Random(seed)
    return [
        sentences_of(lengths[start : start + SST2_BATCH], vocabulary, generator)
        for start in range(0, len(lengths), SST2_BATCH)
    ]


def sentences_per_second(
    model: Model, precision: Precision, asked: Sequence[Sentences], rounds: int, turn_done: TurnDone
) -> float:
    """Sentences with a prompt of `PROMPT_TOKENS` that the engine alone answers in a second."""
    overlay = random_overlay(model, 0, KEEP, prompt_tokens=PROMPT_TOKENS)
    ours = Ours(model.backbone, precision, [overlay], GIB)

    def whole(number: int) -> None:
        for batch in asked:
            ours.answer(batch.encodings, [0] * len(batch.encodings))

    whole(0)
    ours.settle()
    seconds = interleaved({"ours": whole}, 1, rounds, turn_done)["ours"]
    ours.close()
    return sum(len(batch.encodings) for batch in asked) / statistics.median(seconds)
