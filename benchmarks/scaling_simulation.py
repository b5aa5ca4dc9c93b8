"""A server in made-up time: machines, front doors, replicas, and requests that come by chance.

Who is let in, and what goes into a batch, is decided by the server's own `serving.admission`, and
which plans are warm by its own `serving.plans`. How long a batch and the work around it take comes
from `scaling_costs`. Threads of one machine share its cores.
"""

import itertools
import random
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np

from benchmarks.scaling_costs import Batch, BatchCost, Numbers, RequestCost, popularity
from benchmarks.scaling_machine import Call, Clock, Cores, Thread
from benchmarks.scaling_plans import PlanSizes, VirtualPlans
from serving.admission import Admission, Limits
from serving.batching import Part, Request
from serving.errors import ServingError


@dataclass(frozen=True)
class System:
    """How many machines there are, and what is on each."""

    nodes: int = 1
    cores: int = 2
    """Of each node."""
    replicas_per_node: int = 1
    engine_threads: int = 2
    batch_tokens: int = 2048
    queued_tokens: int = 65536
    queued_s: float = 2.0
    plans: PlanSizes | None = None
    """None: every task is warm at all times."""
    doors: int = 1
    """Front doors; each sends to the replica with the fewest of its own requests under way."""


@dataclass(frozen=True)
class Asked:
    """What comes: at a rate, or from clients that each wait for their answer."""

    tasks: int = 1
    skew: float = 1.0
    lengths: tuple[int, ...] = (35,)
    """Tokens of a sequence, each as likely."""
    inputs: int = 1
    rate: float = 0.0
    """Requests a second, by chance; 0: from `clients`."""
    clients: int = 0


@dataclass
class Result:
    """What came out, of the time after the warm-up."""

    seconds: float
    latencies: list[float] = field(default_factory=list)
    arrived: int = 0
    refused: int = 0
    under_way: int = 0
    """At the end."""
    batches: int = 0
    batch_sequences: int = 0
    batch_tasks: int = 0
    lookups: int = 0
    misses: int = 0
    engine_busy_s: float = 0.0
    """Of all replicas."""

    @property
    def answered_per_s(self) -> float:
        """Requests."""
        return len(self.latencies) / self.seconds

    def quantile_ms(self, share: float) -> float:
        """Of the latencies."""
        return 1000 * float(np.quantile(self.latencies, share))

    @property
    def mean_ms(self) -> float:
        """Of the latencies."""
        return 1000 * float(np.mean(self.latencies))

    @property
    def miss_share(self) -> float:
        """Of the lookups of plans."""
        return self.misses / self.lookups if self.lookups else 0.0


@dataclass(eq=False, slots=True)
class _Asking:
    """A request on its way."""

    came: float
    task: int
    lengths: list[int]
    missing: int
    answered: Call
    refused: Call


class _Replica:
    """An event loop, and an engine with its queue and its plans."""

    def __init__(self, run: "_Run", cores: Cores) -> None:
        self._run = run
        self._cores = cores
        self.loop = Thread(cores)
        system = run.system
        limits = Limits(system.batch_tokens, system.queued_tokens, system.queued_s)
        self._admission: Admission[_Asking] = Admission(limits)
        self._computing = False
        self._plans = VirtualPlans(system.plans) if system.plans else None
        self._building = False

    def close(self) -> None:
        if self._plans:
            self._plans.close()

    def warm(self, tasks: int) -> None:
        """Begin with the plans that are asked for most, as after a long time."""
        if self._plans:
            self._plans.prefill(tasks, self._run.shares)

    def ask(self, asking: _Asking) -> None:
        now = self._run.clock.now
        part = Part(Request("", 1.0, now), str(asking.task), asking.lengths, asking)
        try:
            refused = self._admission.admit([part], now)
        except ServingError:
            asking.refused()
            return
        for one in refused:
            one.parts[0].work.refused()
        if not self._computing:
            self._next()

    def _next(self) -> None:
        now = self._run.clock.now
        self._admission.answered(now)
        taken, refused = self._admission.take(now) if self._admission.tokens else ([], [])
        for one in refused:
            one.parts[0].work.refused()
        self._computing = bool(taken)
        if not taken:
            return
        sequences = [(part.work, part.lengths[index]) for part, index in taken]
        seconds = self._run.cost.seconds(self._look_up(sequences))
        threads = self._run.system.engine_threads
        began = now
        self._cores.run(seconds, threads, lambda: self._answer(sequences, began))

    def _look_up(self, sequences: list[tuple[_Asking, int]]) -> Batch:
        tokens = sum(length for _, length in sequences)
        tasks = dict.fromkeys(asking.task for asking, _ in sequences)
        plans = self._plans
        cold = {task for task in tasks if plans and not plans.is_warm(task)}
        cold_tokens = sum(length for asking, length in sequences if asking.task in cold)
        self._run.note_batch(len(sequences), len(tasks), len(cold))
        if plans and not self._building:
            self._build()
        return Batch(tokens, len(sequences), len(tasks) - len(cold), len(cold), cold_tokens)

    def _build(self) -> None:
        """Make the next plan warm, beside the engine."""
        plans = self._plans
        assert plans is not None
        self._building = plans.begin()
        if self._building:
            self._cores.run(plans.sizes.build_s, 1, self._built)

    def _built(self) -> None:
        assert self._plans is not None
        self._plans.finish()
        self._build()

    def _answer(self, sequences: list[tuple[_Asking, int]], began: float) -> None:
        self._run.note_busy(self._run.clock.now - began)
        self._next()
        for asking, _ in sequences:
            asking.missing -= 1
            if not asking.missing:
                asking.answered()


class _Door:
    """Sends each request to the replica with the fewest of its own under way; of equal ones, to the
    one that got none for longest."""

    def __init__(self, cores: Cores, replicas: list[_Replica], first: int) -> None:
        """`first`: the replica that gets its first request; doors that began alike would all send
        to the same one at a time."""
        self.thread = Thread(cores)
        self._replicas = replicas
        self._under_way = [0] * len(replicas)
        count = len(replicas)
        self._order = [(0, (number - first) % count, number) for number in range(count)]
        heapify(self._order)
        self._turn = itertools.count(len(replicas))

    def choose(self) -> int:
        while True:
            under_way, _, number = heappop(self._order)
            if under_way == self._under_way[number]:
                break  # others are of earlier
        self._count(number, 1)
        return number

    def leave(self, number: int) -> None:
        self._count(number, -1)

    def replica(self, number: int) -> _Replica:
        return self._replicas[number]

    def _count(self, number: int, change: int) -> None:
        self._under_way[number] += change
        heappush(self._order, (self._under_way[number], next(self._turn), number))


class _Run:
    """Everything of one simulation."""

    def __init__(
        self, system: System, cost: BatchCost, around: RequestCost, asked: Asked, seed: int
    ) -> None:
        self.system, self.cost, self.around, self.asked = system, cost, around, asked
        self.clock = Clock()
        self.shares: Numbers = popularity(asked.tasks, asked.skew)
        self.result = Result(0.0)
        self._chance = np.random.default_rng(seed)
        self._cumulative = self.shares.cumsum()
        nodes = [Cores(self.clock, system.cores) for _ in range(system.nodes)]
        self.replicas = [
            _Replica(self, cores) for cores in nodes for _ in range(system.replicas_per_node)
        ]
        self._doors = [
            _Door(nodes[number % len(nodes)], self.replicas, number % len(self.replicas))
            for number in range(system.doors)
        ]
        self._client = Thread(nodes[0])
        self._drawn = 0
        self._tasks: Any = ()
        self._lengths: Any = ()
        self._at = 0
        self._door_chance = random.Random(seed)

    def note_batch(self, sequences: int, tasks: int, cold: int) -> None:
        result = self.result
        result.batches += 1
        result.batch_sequences += sequences
        result.batch_tasks += tasks
        result.lookups += tasks
        result.misses += cold

    def note_busy(self, seconds: float) -> None:
        self.result.engine_busy_s += seconds

    def go(self, seconds: float, warm_up_s: float) -> Result:
        for replica in self.replicas:
            replica.warm(self.asked.tasks)
        if self.asked.rate:
            self._arrive_later()
        else:
            for _ in range(self.asked.clients):
                self._send(again=True)
        self.clock.run(warm_up_s)
        # Counted from here on, with what is under way.
        waiting = self.result.under_way
        self.result = Result(seconds, arrived=waiting, under_way=waiting)
        self.clock.run(warm_up_s + seconds)
        for replica in self.replicas:
            replica.close()
        return self.result

    def _arrive_later(self) -> None:
        wait = self._chance.exponential(1 / self.asked.rate)
        self.clock.at(self.clock.now + wait, self._arrive)

    def _arrive(self) -> None:
        self._send(again=False)
        self._arrive_later()

    def _send(self, *, again: bool) -> None:
        task, lengths = self._draw()
        self.result.arrived += 1
        self.result.under_way += 1
        around, clock = self.around, self.clock
        loop_s = around.loop_of(len(lengths))
        door = self._door_chance.choice(self._doors)
        came = clock.now

        def to_door() -> None:
            door.thread.do(around.door_s / 2, to_replica)

        def to_replica() -> None:
            number = door.choose()
            replica = door.replica(number)

            def back(*, well: bool) -> None:
                door.leave(number)
                door.thread.do(
                    around.door_s / 2,
                    lambda: self._client.do(
                        around.client_s / 2, lambda: self._end(came, well, again)
                    ),
                )

            def answered() -> None:
                replica.loop.do(loop_s / 2, lambda: back(well=True))

            asking = _Asking(came, task, lengths, len(lengths), answered, lambda: back(well=False))
            # The wait in sockets, and for threads to wake, once for both ways.
            clock.at(
                clock.now + around.wait_s,
                lambda: replica.loop.do(loop_s / 2, lambda: replica.ask(asking)),
            )

        self._client.do(around.client_s / 2, to_door)

    def _end(self, came: float, well: bool, again: bool) -> None:
        self.result.under_way -= 1
        if well:
            self.result.latencies.append(self.clock.now - came)
        else:
            self.result.refused += 1
        if again:
            self._send(again=True)

    def _draw(self) -> tuple[int, list[int]]:
        """The next request's task and the tokens of its sequences; drawn many at once."""
        asked = self.asked
        if self._at == self._drawn:
            self._drawn, self._at = 10_000, 0
            self._tasks = np.searchsorted(
                self._cumulative, self._chance.random(self._drawn) * self._cumulative[-1]
            ).tolist()
            shape = (self._drawn, asked.inputs)
            self._lengths = self._chance.choice(asked.lengths, shape).tolist()
        self._at += 1
        return self._tasks[self._at - 1], self._lengths[self._at - 1]


def simulate(
    system: System,
    cost: BatchCost,
    around: RequestCost,
    asked: Asked,
    *,
    seconds: float,
    warm_up_s: float = 0.0,
    seed: int = 0,
) -> Result:
    """Run a server for so long. The same seed brings the same requests to any system."""
    return _Run(system, cost, around, asked, seed).go(seconds, warm_up_s)
