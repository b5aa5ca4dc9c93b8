"""The engine alone, in this process: what a server could answer if all around the engine were free.

    python -m benchmarks.server_engine --store DIR --seconds 5 --threads 2 --in-flight 256

The same engine as the server's, with the texts of the same requests encoded before; submitted again
as fast as it answers, so that `--in-flight` inputs are always waiting or computed. The last line of
output is one JSON object. `benchmarks.server --against engine` runs this beside a server.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from benchmarks.server_works import sentences
from model_store import artifact
from model_store.backbone import Backbone, load_backbone
from model_store.store import Store, open_store
from model_store.tokenization import Encoding
from serving.calibration import efficient_tokens
from serving.config import ServeConfig
from serving.engine import Engine, EngineAnswer, Servable
from serving.metrics import Metrics
from serving.plans import PlanCache
from serving.questions import as_input, groups
from serving.service import open_backend
from serving.tasks import LoadedVersion, load_version

WARM_UP_S = 2.0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, required=True, help="folder of the store")
    parser.add_argument("--tasks", help="names, separated by commas; all of the store")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=0, help="of the forward; 0: all cores")
    parser.add_argument("--inputs", type=int, default=1, help="of one request")
    parser.add_argument("--in-flight", type=int, default=256, help="inputs at any time")
    arguments = parser.parse_args()
    config = ServeConfig(store=arguments.store, engine_threads=arguments.threads)
    tasks = arguments.tasks.split(",") if arguments.tasks else None
    texts = sentences(arguments.data)
    rate = throughput(
        config, tasks, texts, arguments.inputs, arguments.in_flight, arguments.seconds
    )
    print(json.dumps({"sentences_per_s": round(rate, 1)}))
    return 0


def in_own_process(arguments: Sequence[str]) -> float:
    """Sentences per second, from this command in a process that does nothing else."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.server_engine", *arguments],
        # As in a replica.
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1])["sentences_per_s"])


def throughput(
    config: ServeConfig,
    tasks: Sequence[str] | None,
    texts: Sequence[str],
    inputs: int,
    in_flight: int,
    seconds: float,
) -> float:
    """Sentences per second of an engine set up as `serving.service.Service` does it."""
    store, metrics = open_store(config.store), Metrics()
    info = store.backbone(config.backbone)
    backbone = load_backbone(store.backbone_path(info.fingerprint), info.name)
    backend = open_backend(config, backbone)
    plans = PlanCache(backend, config.plan_cache_bytes, metrics)
    engine = Engine(
        backend,
        plans,
        metrics,
        max_batch_tokens=config.max_batch_tokens or efficient_tokens(backend, backbone),
        max_queued_tokens=config.max_queued_tokens,
        max_queue_s=60.0,
    )
    versions = {name: load(store, backbone, name) for name in tasks or store.task_names()}
    requests = []
    for name, chosen in groups(texts, list(versions), inputs):
        task = versions[name]
        given = [as_input(text, task.info.takes_pairs) for text in chosen]
        requests.append((task.servable, task.texts.encode(given)))
    loop = Loop(engine, requests)
    loop.run(max(1, in_flight // inputs), WARM_UP_S)
    plans.settle()
    rate = inputs * loop.run(max(1, in_flight // inputs), seconds)
    engine.close()
    plans.close()
    return rate


def load(store: Store, backbone: Backbone, name: str) -> LoadedVersion:
    """A task's active version."""
    info, data = store.read(name)
    return load_version(backbone, artifact.read(data, backbone.config, backbone.fingerprint), info)


class Loop:
    """Requests in turn, a next one as soon as one is answered."""

    def __init__(
        self, engine: Engine[Any], requests: Sequence[tuple[Servable, list[Encoding]]]
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._at = 0
        self._answered = 0
        self._end = 0.0
        self._under_way = threading.Semaphore(0)

    def run(self, at_once: int, seconds: float) -> float:
        """Requests answered per second."""
        self._answered = 0
        started = time.perf_counter()
        self._end = started + seconds
        for _ in range(at_once):
            self._submit()
        for _ in range(at_once):
            self._under_way.acquire()
        return self._answered / (time.perf_counter() - started)

    def _submit(self) -> None:
        servable, encodings = self._requests[self._at % len(self._requests)]
        self._at += 1
        self._engine.submit(servable, encodings).add_done_callback(self._next)

    def _next(self, answer: "Future[EngineAnswer]") -> None:
        answer.result()
        self._answered += 1
        if time.perf_counter() < self._end:
            self._submit()
        else:
            self._under_way.release()


if __name__ == "__main__":
    sys.exit(main())
