"""Projects beyond this machine from what was measured on it: tasks, skew, memory, nodes, GPUs."""

from typing import Any

from benchmarks import scaling_gpu
from benchmarks.scaling_costs import (
    Replica,
    RequestCost,
    Work,
    capacity,
    expected_batch,
    hit_share,
    popularity,
)
from benchmarks.scaling_engine import cost_of
from benchmarks.scaling_simulation import Asked, System, simulate
from benchmarks.scaling_validation import around_of, plans_of
from serving.config import GIB

TASKS = (1, 10, 100, 1_000, 10_000)
SKEWS = (0.7, 1.0, 1.3)
BUDGETS_GIB = (1, 4, 16)
NODES = (1, 4, 16, 64)
LOAD = 0.7
"""Of its capacity, that a projected server is asked for."""
CORES = 4
"""Of a projected node: two for the engine, and two for all around it."""


def projection(report: dict[str, Any], quick: bool) -> dict[str, Any]:
    """All of it, from the measured parts of a report."""
    return {
        "tasks": _by_tasks(report),
        "nodes": _by_nodes(report, quick),
        "gpu_nodes": _on_gpus(report, quick),
    }


def _elsewhere(record: dict[str, Any]) -> RequestCost:
    found = around_of(record)
    return RequestCost(found.loop_s, found.door_s, 0.0, found.wait_s, found.input_s)


def _by_tasks(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One replica, by the formulas: tasks, skew and memory for plans."""
    kind, tokens = report["engine"]["drawn"], report["engine"]["batch_tokens"]
    cost, around = cost_of(kind), _elsewhere(report["server"]["one replica"])
    found = []
    for skew in SKEWS:
        for gib in BUDGETS_GIB:
            room = plans_of(kind, gib * GIB).room
            for tasks in TASKS:
                work = Work(tasks, skew, kind["tokens"])
                replica = Replica(tokens, room, threads=2)
                best = capacity(cost, around, work, replica)
                shares = popularity(tasks, skew)
                batch = expected_batch(shares, room, best.sequences, kind["tokens"])
                found.append(
                    {
                        "tasks": tasks,
                        "skew": skew,
                        "plans_gib": gib,
                        "warm": min(room, tasks),
                        "hits": round(hit_share(shares, room), 4),
                        "tasks_a_batch": round(batch.warm_tasks + batch.cold_tasks, 1),
                        "requests_per_s": round(best.requests_per_s, 1),
                        "core_us": round(1e6 * best.core_s, 1),
                        "limit": best.limit,
                    }
                )
    return found


def _by_nodes(report: dict[str, Any], quick: bool) -> list[dict[str, Any]]:
    """Simulated: nodes that each have a replica and a front door, all asked for 1,000 tasks."""
    kind, tokens = report["engine"]["drawn"], report["engine"]["batch_tokens"]
    cost, around = cost_of(kind), _elsewhere(report["server"]["one replica"])
    plans = plans_of(kind, GIB)
    work = Work(1_000, 1.0, kind["tokens"])
    most = capacity(cost, around, work, Replica(tokens, plans.room, 2)).requests_per_s
    found = []
    for nodes in NODES[:2] if quick else NODES:
        for doors in sorted({1, nodes}):
            # One front door for all has a machine's cores to itself.
            given = around if doors == nodes else RequestCost(
                around.loop_s, 0.0, 0.0, around.wait_s, around.input_s
            )  # fmt: skip
            seconds = max(1.0, 8.0 / nodes)
            result = simulate(
                System(nodes=nodes, cores=CORES, batch_tokens=tokens, plans=plans, doors=doors),
                cost,
                given,
                Asked(tasks=1_000, lengths=(round(kind["tokens"]),), rate=LOAD * most * nodes),
                seconds=seconds,
                warm_up_s=1.0,
            )
            found.append(
                {
                    "nodes": nodes,
                    "doors": doors,
                    "offered_per_s": round(LOAD * most * nodes),
                    "answered_per_s": round(result.answered_per_s),
                    "p50_ms": round(result.quantile_ms(0.5), 2),
                    "p99_ms": round(result.quantile_ms(0.99), 2),
                    "misses": round(result.miss_share, 4),
                    "sequences_a_batch": round(result.batch_sequences / result.batches, 2),
                }
            )
    return found


def _on_gpus(report: dict[str, Any], quick: bool) -> list[dict[str, Any]]:
    """Simulated by assumption: XLM-R-large on H100s, 10,000 tasks, 16 inputs a request."""
    around = _elsewhere(report["server"]["one replica"])
    shape = scaling_gpu.SHAPES[-1]
    cost = scaling_gpu.batch_cost(scaling_gpu.GPUS[-1], shape)
    tokens, inputs, tasks = scaling_gpu.BATCH_TOKENS, 16, 10_000
    work = Work(tasks, 1.0, scaling_gpu.TOKENS, inputs)
    most = capacity(cost, around, work, Replica(tokens, tasks, 1))
    found = []
    for gpus in (1, 10) if quick else (1, 10, 100):
        result = simulate(
            System(nodes=gpus, cores=8, engine_threads=1, batch_tokens=tokens, doors=gpus),
            cost,
            around,
            Asked(
                tasks=tasks,
                lengths=(round(scaling_gpu.TOKENS),),
                inputs=inputs,
                rate=LOAD * most.requests_per_s * gpus,
            ),
            seconds=max(0.5, 5.0 / gpus),
            warm_up_s=0.3,
        )
        found.append(
            {
                "gpus": gpus,
                "limit": most.limit,
                "sequences_per_s": round(inputs * result.answered_per_s),
                "p50_ms": round(result.quantile_ms(0.5), 2),
                "p99_ms": round(result.quantile_ms(0.99), 2),
                "gpu_used": round(result.engine_busy_s / result.seconds / gpus, 3),
                "tasks_a_batch": round(result.batch_tasks / result.batches, 1),
            }
        )
    return found
