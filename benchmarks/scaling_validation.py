"""Has the simulation foretell what was measured of whole servers, from the costs in a report."""

from collections.abc import Mapping
from typing import Any

from benchmarks.scaling_costs import RequestCost
from benchmarks.scaling_engine import cost_of
from benchmarks.scaling_plans import PlanSizes
from benchmarks.scaling_simulation import Asked, Result, System, simulate

SIMULATED_S = 20.0
FIGURES = ("rate", "p50_ms", "p99_ms", "mean_ms")


def around_of(record: Mapping[str, Any]) -> RequestCost:
    """What a request costs around the forward, as a measured server's record has it."""
    given = record["request"]
    return RequestCost(
        loop_s=given["loop_us"] / 1e6,
        door_s=given["door_us"] / 1e6,
        client_s=given["client_us"] / 1e6,
        wait_s=given["wait_us"] / 1e6,
        input_s=given["input_us"] / 1e6,
    )


def plans_of(kind: Mapping[str, Any], budget_bytes: int) -> PlanSizes:
    """Sizes of a kind of tasks' plans, with a budget."""
    return PlanSizes(kind["ready_bytes"], kind["warm_bytes"], budget_bytes, kind["build_ms"] / 1000)


def validation(report: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    """Every load of every measured server: measured, simulated, and the error as a share of the
    measured."""
    return {
        name: {load: _beside(report, record, run, quick) for load, run in record["runs"].items()}
        for name, record in report["server"].items()
    }


def _beside(
    report: Mapping[str, Any], record: Mapping[str, Any], run: Mapping[str, Any], quick: bool
) -> dict[str, Any]:
    setup = record["setup"]
    kind = report["engine"][setup["kind"]]
    budget = setup["plan_bytes"]
    system = System(
        cores=setup["cores"],
        replicas_per_node=setup["replicas"],
        engine_threads=setup["threads"],
        batch_tokens=report["engine"]["batch_tokens"],
        plans=plans_of(kind, budget) if budget else None,
    )
    asked = Asked(
        tasks=setup["tasks"],
        skew=setup["skew"],
        lengths=tuple(setup["lengths"]),
        rate=run.get("offered", 0.0),
        clients=run.get("clients", 0),
    )
    seconds = SIMULATED_S / 4 if quick else SIMULATED_S
    found = simulate(
        system, cost_of(kind), around_of(record), asked, seconds=seconds, warm_up_s=2.0
    )
    simulated = (
        found.answered_per_s,
        found.quantile_ms(0.5),
        found.quantile_ms(0.99),
        found.mean_ms,
    )
    return {
        name: {
            "measured": run[name],
            "simulated": round(made_up, 2),
            "error": round(made_up / run[name] - 1, 3),
        }
        for name, made_up in zip(FIGURES, simulated, strict=True)
    } | {"misses": round(found.miss_share, 4), "sequences": round(_per_batch(found), 2)}


def _per_batch(found: Result) -> float:
    return found.batch_sequences / found.batches if found.batches else 0.0
