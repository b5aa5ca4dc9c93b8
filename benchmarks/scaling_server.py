"""Measures a whole server on this machine: what a request costs around the forward, and how fast it
answers at several loads. `scaling_validation` has the simulation foretell the same.

The costs are the processor time of the server's threads, of HAProxy and of the client, at 64
requests under way; what a request waits besides is taken from one at a time.
"""

import asyncio
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil

from benchmarks.scaling_costs import RequestCost, as_record
from benchmarks.server_running import TOKEN, free_port, running
from model_store.store import Store
from serving.load import Client, Outcome, Question, Server, as_bytes, closed

LOADS = (0.3, 0.5, 0.7, 0.85)
"""Of what the closed loop reaches, at which requests come by chance."""
AT_ONCE = 64
_TOLD = ("forward", "queue", "total")
SEVERAL = 16
"""Inputs of a request, for what each beyond the first costs."""


@dataclass(frozen=True)
class Setting:
    """How a server is started."""

    name: str
    replicas: int
    threads: int
    batch_tokens: int
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """One measurement: how many were answered, how fast; processor time of each part for one."""

    rate: float
    p50_ms: float
    p99_ms: float
    mean_ms: float
    forward_ms: float
    """Means of what the answers tell of themselves, this one and the next two."""
    queue_ms: float
    total_ms: float
    busy: dict[str, float]
    """Seconds of a core for one request: `loop`, `engine`, `door`, `client`."""

    def record(self) -> dict[str, float]:
        """For the report."""
        figures = asdict(self)
        del figures["busy"]
        return {key: round(value, 2) for key, value in figures.items()}


@contextmanager
def serving(store: Store, setting: Setting) -> Iterator["Measuring"]:
    """A server of its own with this store, ready."""
    port = free_port()
    command = [sys.executable, "-m", "taskbone", "serve", "--store", str(store.root)]
    command += ["--port", str(port), "--replicas", str(setting.replicas)]
    command += ["--engine-threads", str(setting.threads)]
    command += ["--max-batch-tokens", str(setting.batch_tokens), *setting.options]
    with running(command, port, {"TASKBONE_TOKEN": TOKEN}):
        yield Measuring(Server(port, TOKEN), setting)


def start_s(store: Store, batch_tokens: int) -> float:
    """How long a server with this store takes from the command until it answers for all tasks."""
    began = time.perf_counter()
    with serving(store, Setting("start", 1, 2, batch_tokens)):
        return time.perf_counter() - began


class Measuring:
    """Asks a running server, and looks at its processes meanwhile."""

    def __init__(self, server: Server, setting: Setting) -> None:
        self._server = server
        self._setting = setting
        children = psutil.Process().children(recursive=True)
        self._replicas = [one for one in children if one.name().startswith("ray::ServeRep")]
        self._doors = [one for one in children if "haproxy" in one.name()]
        assert len(self._replicas) == setting.replicas, children

    def closed(self, questions: Sequence[Question], at_once: int, seconds: float) -> Seen:
        """So many clients, each of which waits for its answer."""
        return asyncio.run(self._watched(questions, seconds, at_once=at_once))

    def by_chance(self, questions: Sequence[Question], rate: float, seconds: float) -> Seen:
        """Requests at a rate, at moments that do not depend on each other."""
        return asyncio.run(self._watched(questions, seconds, rate=rate))

    async def _watched(
        self, questions: Sequence[Question], seconds: float, at_once: int = 0, rate: float = 0.0
    ) -> Seen:
        requests = itertools.cycle([as_bytes(self._server, question) for question in questions])
        client = Client(self._server)
        before, began = self._used(), time.perf_counter()
        outcomes: list[Outcome] = []
        if rate:
            outcomes = await poisson(client, requests, rate, seconds)
        else:
            await closed(client, requests, at_once, seconds, outcomes.append)
        taken = time.perf_counter() - began
        after = self._used()
        client.close()
        return seen(outcomes, taken, self._shares(before, after, len(outcomes)))

    def _used(self) -> "_Used":
        """Seconds of a core since each began."""
        return _Used(
            [_by_thread(replica) for replica in self._replicas],
            sum(_by_process(door) for door in self._doors),
            _by_process(psutil.Process()),
        )

    def _shares(self, before: "_Used", after: "_Used", requests: int) -> dict[str, float]:
        """What each part has done meanwhile, for one request."""
        engine = loop = 0.0
        for then, now in zip(before.threads, after.threads, strict=True):
            # The engine's threads have done most; nearly all of the rest is the event loop's.
            times = sorted((now[key] - then.get(key, 0.0) for key in now), reverse=True)
            engine += sum(times[: self._setting.threads])
            loop += sum(times[self._setting.threads :])
        parts = {
            "engine": engine,
            "loop": loop,
            "door": after.doors - before.doors,
            "client": after.client - before.client,
        }
        return {name: seconds / requests for name, seconds in parts.items()}


@dataclass(frozen=True)
class _Used:
    """Seconds of a core: of each replica's threads, by their numbers; of doors; of the client."""

    threads: list[dict[int, float]]
    doors: float
    client: float


def _by_thread(process: psutil.Process) -> dict[int, float]:
    return {one.id: one.user_time + one.system_time for one in process.threads()}


def _by_process(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def poisson(
    client: Client, requests: Iterator[bytes], rate: float, seconds: float, seed: int = 0
) -> list[Outcome]:
    """Requests at moments drawn by chance; all are waited for."""
    chance, started, due = random.Random(seed), time.perf_counter(), 0.0
    under_way = []
    while (due := due + chance.expovariate(rate)) < seconds:
        if (wait := started + due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        under_way.append(asyncio.create_task(client.send(next(requests), started + due)))
    return await asyncio.gather(*under_way)


def seen(outcomes: Sequence[Outcome], seconds: float, busy: dict[str, float]) -> Seen:
    """Figures of outcomes, all of which must be answers."""
    if wrong := {one.status for one in outcomes} - {200}:
        raise SystemExit(f"the server answered {sorted(wrong)}; it should not be overloaded")
    latencies = sorted(1000 * one.latency_s for one in outcomes)
    cuts = statistics.quantiles(latencies, n=100)
    told = [json.loads(one.body)["timings_ms"] for one in outcomes]
    forward, queue, total = (statistics.mean(one[f"{part}_ms"] for one in told) for part in _TOLD)
    rate, mean = len(outcomes) / seconds, statistics.mean(latencies)
    return Seen(rate, cuts[49], cuts[98], mean, forward, queue, total, busy)


def request_cost(many: Seen, one: Seen, batch_s: float) -> RequestCost:
    """What a request costs around the forward: threads' time where many are under way; and of one
    alone, what is left of its latency."""
    around = RequestCost(many.busy["loop"], many.busy["door"], many.busy["client"])
    known = around.loop_s + around.door_s + around.client_s + batch_s
    return RequestCost(
        around.loop_s, around.door_s, around.client_s, max(0.0, one.mean_ms / 1000 - known)
    )


def with_inputs(questions: Sequence[Question], inputs: int) -> list[Question]:
    """The same, each with its input so many times."""
    return [
        Question(one.path, json.dumps({"inputs": json.loads(one.body)["inputs"] * inputs}))
        for one in questions
    ]


def measure(
    measuring: Measuring,
    questions: Sequence[Question],
    seconds: float,
    around: RequestCost | None = None,
) -> dict[str, Any]:
    """One server: what its requests cost around the forward, unless that is known, and every load
    with what came out."""
    measuring.closed(questions, AT_ONCE, seconds)  # plans become warm
    one = measuring.closed(questions, 1, seconds)
    many = measuring.closed(questions, AT_ONCE, seconds)
    if around is None:
        several = measuring.closed(with_inputs(questions, SEVERAL), AT_ONCE // SEVERAL, seconds)
        around = request_cost(many, one, one.forward_ms / 1000)
        further_s = (several.busy["loop"] - around.loop_s) / (SEVERAL - 1)
        around = replace(around, input_s=max(0.0, further_s))
    runs: dict[str, Any] = {
        "one at a time": one.record() | {"clients": 1},
        f"{AT_ONCE} at a time": many.record() | {"clients": AT_ONCE},
    }
    for load in LOADS:
        rate = load * many.rate
        found = measuring.by_chance(questions, rate, seconds)
        runs[f"{load:.0%} by chance"] = found.record() | {"offered": round(rate, 2)}
    return {
        "request": as_record(around),
        "engine_core_us": round(1e6 * many.busy["engine"], 1),
        "runs": runs,
    }
