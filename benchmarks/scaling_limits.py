"""Measures what grows with the number of tasks and replicas, apart from the forward: the registry,
memory and start of a replica, the board's messages, `/metrics`. Where the design would break first.
"""

import dataclasses
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.engine_models import Model, open_model, random_overlay
from benchmarks.scaling_engine import KEEP, PROMPT_TOKENS
from model_store import artifact
from model_store.artifact import Overlay
from model_store.backend import Backend, choose
from model_store.durable import sha256
from model_store.folder import FolderStorage
from model_store.manifest import Golden
from model_store.packing import Item
from model_store.registry import Registry, TaskRecord, VersionRecord
from model_store.storage import decode, encode
from model_store.store import Store, VersionInfo
from model_store.tokenization import InputEncoder
from serving.board import Board, ReplicaStatus
from serving.metrics import Metrics
from serving.tasks import describe, load_version

SETS = 32
"""Different sets of neurons; tasks beyond share them under other names, as other artifacts."""
WHEN = "2026-01-01T00:00:00Z"
REPLICAS = (1, 10, 30, 100)


def many_tasks(folder: Path, count: int) -> Store:
    """A store on MiniLM-L6 with the tasks `task-0`, ..., all written in one change."""
    model = open_model("minilm-l6", folder)
    fp32 = choose(model.config, model.backbone.tensors, device="cpu", precision="fp32", threads=1)
    made = [_with_golden(model, fp32, number) for number in range(min(SETS, count))]
    storage = FolderStorage(folder / "store")

    def change(before: Registry, _: Any) -> Registry:
        records = {}
        for number in range(count):
            task, overlay = f"task-{number}", made[number % len(made)]
            manifest = overlay.manifest.model_copy(update={"task": task})
            data = artifact.write(dataclasses.replace(overlay, manifest=manifest))
            place = storage.root / "tasks" / task
            place.mkdir(parents=True, exist_ok=True)
            (place / "1.safetensors").write_bytes(data)
            version = VersionRecord(digest=sha256(data), published_at=WHEN, bytes=len(data))
            records[task] = TaskRecord(next_version=2, active=1, versions={1: version})
        return before.model_copy(update={"tasks": records, "generation": before.generation + 1})

    storage.change(change)
    return Store(storage)


def _with_golden(model: Model, fp32: Backend[Any], number: int) -> Overlay:
    overlay = random_overlay(model, number, KEEP, prompt_tokens=PROMPT_TOKENS)
    manifest, backbone = overlay.manifest, model.backbone
    texts = InputEncoder(backbone.tokenizer, model.config, manifest.template, manifest.max_tokens)
    text = manifest.golden[0].input
    (encoding,) = texts.encode([text])
    (scores,) = fp32.answer([Item(encoding, 0)], [fp32.plan(overlay)])
    golden = (Golden(input=text, scores=tuple(scores.tolist())),)
    return dataclasses.replace(overlay, manifest=manifest.model_copy(update={"golden": golden}))


def registry(count: int) -> dict[str, Any]:
    """Bytes of a registry with so many tasks, and how long it takes to read and to write."""
    version = {1: VersionRecord(digest="0" * 64, published_at=WHEN, bytes=27_000)}
    record = TaskRecord(next_version=2, active=1, versions=version)
    known = Registry(tasks={f"task-{number}": record for number in range(count)})
    data = encode(known)
    return {
        "tasks": count,
        "bytes": len(data),
        "read_ms": _median_ms(lambda: decode(data, "memory", "")),
        "write_ms": _median_ms(lambda: encode(known)),
    }


def store_times(store: Store) -> dict[str, Any]:
    """How long the calls that a replica and a registration make of a store take."""
    first = store.task_names()[0]
    return {
        "tasks": len(store.task_names()),
        "state_token_ms": _median_ms(store.state_token),
        "read_version_ms": _median_ms(lambda: store.read(first)),
        "change_ms": _median_ms(lambda: _change(store, first)),
    }


def _change(store: Store, task: str) -> None:
    store.deactivate(task)
    store.activate(task, 1)


def _median_ms(call: Callable[[], object], times: int = 5) -> float:
    found = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(found), 3)


def loaded(store: Store, count: int) -> dict[str, Any]:
    """Memory and time of so many versions in a replica, read and parsed, none asked yet: in a
    process of its own. Reading the registry for each is left out; `store_times` has it."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling_limits", str(store.root), str(count)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def load_here(root: Path, count: int) -> dict[str, Any]:
    """What `loaded` tells, of this process."""
    model = open_model("minilm-l6", root.parent)
    backbone, record = model.backbone, Store(root).registry()
    paths = [root / "tasks" / f"task-{number}" / "1.safetensors" for number in range(count)]
    read = artifact.read(paths[0].read_bytes(), backbone.config, backbone.fingerprint)
    gc.collect()
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    versions = []
    for path in paths:
        data = path.read_bytes()
        known = record.version(path.parent.name, 1)
        info = VersionInfo(path.parent.name, 1, known.digest, WHEN, len(data), True)
        read = artifact.read(data, backbone.config, backbone.fingerprint)
        versions.append(load_version(backbone, read, info))
    taken = time.perf_counter() - began
    gc.collect()
    grown = process.memory_info().rss - before
    return {
        "tasks": len(versions),
        "bytes_a_task": round(grown / count),
        "file_bytes": paths[0].stat().st_size,
        "ms_a_task": round(1000 * taken / count, 3),
    }


def metrics_page(tasks: int) -> dict[str, Any]:
    """Bytes of `/metrics` with so many tasks that have all been asked, and the time to make it."""
    metrics = Metrics()
    with tempfile.TemporaryDirectory() as folder:
        model = open_model("minilm-l6", Path(folder))
    manifest = random_overlay(model, 0, KEEP, prompt_tokens=PROMPT_TOKENS).manifest
    infos = [
        describe(
            manifest.model_copy(update={"task": f"task-{number}"}),
            VersionInfo(f"task-{number}", 1, f"{number:064d}", WHEN, 27_000, True),
        )
        for number in range(tasks)
    ]
    metrics.serve(infos)
    for info in infos:
        metrics.request(info.task, 1, 200, 0.01)
    page = metrics.render()[0]
    return {
        "tasks": tasks,
        "bytes": len(page),
        "series": sum(line[:1] != b"#" for line in page.splitlines()),
        "render_ms": _median_ms(metrics.render),
    }


@contextmanager
def ray_board() -> Iterator[tuple[Callable[..., Any], psutil.Process]]:
    """The board as an actor of a Ray of its own: how it is called, and its process."""
    import ray

    from serving.shared_board import connect, remove

    ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
        object_store_memory=80 << 20, logging_level=logging.ERROR,
    )  # fmt: skip
    try:
        call = connect("scaling")
        host: Any = ray.get_actor("board", namespace="scaling")
        yield call, psutil.Process(ray.get(host.process.remote()))
        remove("scaling")
    finally:
        ray.shutdown()


def board_round(call: Callable[..., Any], process: psutil.Process, replicas: int) -> dict[str, Any]:
    """One change that all replicas have to follow, over the real board: its calls, and how long it
    takes where all of them share this machine; then the calls of a second without changes."""
    from serving.shared_board import RayBoard

    counted: Counter[str] = Counter()

    def counting(method: str, *given: Any, **more: Any) -> Any:
        counted[method] += 1
        return call(method, *given, **more)

    board = RayBoard(counting)
    state = _Followed()
    threads = [
        threading.Thread(target=_follow, args=(board, f"replica-{number}", state))
        for number in range(replicas)
    ]
    for thread in threads:
        thread.start()
    while len(board.members()) < replicas:
        time.sleep(0.1)
    time.sleep(1.0)
    before, used = sum(counted.values()), _cpu(process)
    time.sleep(2.0)
    idle = (sum(counted.values()) - before) / 2
    before, used, began = sum(counted.values()), _cpu(process), time.perf_counter()
    state.generation += 1
    board.announce()
    seen = -1
    while any(one.generation < state.generation for one in board.members().values()):
        seen = board.changed(seen, 0.5)
    taken = time.perf_counter() - began
    calls, busy = sum(counted.values()) - before, _cpu(process) - used
    state.ending.set()
    for thread in threads:
        thread.join()
    return {
        "replicas": replicas,
        "calls_a_change": calls,
        "change_ms": round(1000 * taken, 1),
        "board_core_us_a_call": round(1e6 * busy / calls, 1),
        "calls_a_second_idle": round(idle, 1),
    }


@dataclasses.dataclass
class _Followed:
    generation: int = 0
    ending: threading.Event = dataclasses.field(default_factory=threading.Event)


def _follow(board: Board, name: str, state: _Followed) -> None:
    """What a replica's `serving.reconciler` does at the board."""
    status = ReplicaStatus(generation=state.generation, drained=state.generation)
    while not state.ending.is_set():
        count, _ = board.report(name, status)
        before, now = status, state.generation
        status = ReplicaStatus(generation=now, drained=now)
        if status == before:
            board.changed(count, FolderStorage.poll_s)
    board.leave(name)


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main(arguments: Sequence[str]) -> None:
    """`loaded` in a process of its own."""
    root, count = arguments
    print(json.dumps(load_here(Path(root), int(count))))


if __name__ == "__main__":
    main(sys.argv[1:])
