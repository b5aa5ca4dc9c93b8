"""The scaling model: its formulas, the laws that its simulation keeps, and that the simulation's
plan cache is the server's."""

import json
import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from benchmarks import scaling_page
from benchmarks.engine_ours import Silent
from benchmarks.scaling_costs import (
    Batch,
    BatchCost,
    Replica,
    RequestCost,
    Work,
    capacity,
    expected_batch,
    fit,
    mean_wait_of_md1,
    popularity,
)
from benchmarks.scaling_gpu import scenarios
from benchmarks.scaling_machine import Clock, Cores
from benchmarks.scaling_plans import PlanSizes, Sizes, VirtualPlans
from benchmarks.scaling_simulation import Asked, System, simulate
from serving.plans import PlanCache

COST = BatchCost(0.002, token_s=1e-5, sequence_s=1e-4, warm_task_s=2e-4, cold_task_s=1e-3)
AROUND = RequestCost(loop_s=0.0004, door_s=0.00005, client_s=0.0001, wait_s=0.0003)
NOTHING = RequestCost(loop_s=0.0)
PLANS = PlanSizes(ready_bytes=1, warm_bytes=99, budget_bytes=2_000, build_s=0.001)


class TestFit:
    def test_finds_the_coefficients_that_the_times_were_made_of(self) -> None:
        cost = BatchCost(0.002, 1e-5, 1e-4, 2e-4, 1e-3, 3e-6)
        chance = random.Random(0)
        batches = [
            Batch(chance.randint(30, 3000), chance.randint(1, 64), *more)
            for more in ((3, 0, 0), (1, 0, 0), (0, 5, 90), (0, 2, 500), (2, 2, 40), (7, 1, 20))
            for _ in range(5)
        ]
        found = fit(batches, [cost.seconds(batch) for batch in batches])
        assert found.cost.coefficients() == pytest.approx(cost.coefficients(), rel=1e-6)
        assert found.worst_error < 1e-6

    def test_nothing_costs_less_than_nothing(self) -> None:
        """More sequences of equal tokens that take less time: the noise of a measurement."""
        batches = [Batch(tokens, count, 1, 0, 0) for tokens in (64, 512) for count in (1, 8)]
        seconds = [0.001 + 1e-5 * one.tokens - 1e-5 * one.sequences for one in batches]
        found = fit(batches, seconds)
        assert found.cost.sequence_s == 0
        assert min(found.cost.coefficients()) >= 0
        assert 0 < found.mean_error < 0.05


class TestFormulas:
    def test_shares_follow_zipf(self) -> None:
        shares = popularity(4, 1.0)
        assert shares.sum() == pytest.approx(1)
        assert shares[0] / shares[3] == pytest.approx(4)
        assert popularity(4, 0.0) == pytest.approx([0.25] * 4)

    @pytest.mark.parametrize(("tasks", "skew", "warm"), [(1, 1.0, 1), (50, 1.0, 10), (9, 0.0, 0)])
    def test_expected_batch_is_the_mean_of_drawn_ones(
        self, tasks: int, skew: float, warm: int
    ) -> None:
        shares, chance = popularity(tasks, skew), np.random.default_rng(0)
        drawn = [np.unique(chance.choice(tasks, 32, p=shares)) for _ in range(3_000)]
        found = expected_batch(shares, warm, 32, 35.0)
        assert found.warm_tasks == pytest.approx(
            np.mean([(one < warm).sum() for one in drawn]), rel=0.03
        )
        cold = np.mean([(one >= warm).sum() for one in drawn])
        assert found.cold_tasks == pytest.approx(cold, rel=0.03, abs=1e-9)

    def test_capacity_names_what_sets_it(self) -> None:
        work, replica = Work(1, 1.0, 35), Replica(batch_tokens=2048, warm=1, threads=2)
        engine = capacity(COST, AROUND, work, replica)
        assert engine.limit == "engine"
        assert engine.requests_per_s == pytest.approx(58 / engine.batch_s)
        slow = replace(AROUND, loop_s=0.01)
        assert capacity(COST, slow, work, replica).limit == "event loop"
        assert capacity(COST, slow, work, replica).requests_per_s == pytest.approx(100)

    def test_more_tasks_and_less_skew_cost_more(self) -> None:
        replica = Replica(batch_tokens=2048, warm=20, threads=1)
        costs = [
            capacity(COST, AROUND, Work(tasks, skew, 35), replica).core_s
            for tasks, skew in ((1, 1.0), (10, 1.0), (100, 1.0), (1000, 1.0), (1000, 0.5))
        ]
        assert costs == sorted(costs)


class TestSimulation:
    def test_is_an_md1_queue_where_it_is_one(self) -> None:
        """One replica, one sequence a batch, nothing around: the textbook's mean wait."""
        system = System(batch_tokens=35, cores=8)
        service_s, rate = 0.01, 70.0
        found = simulate(
            system, BatchCost(service_s), NOTHING, Asked(rate=rate), seconds=600, warm_up_s=20
        )
        expected = 1000 * (service_s + mean_wait_of_md1(rate, service_s))
        assert found.mean_ms == pytest.approx(expected, rel=0.05)
        assert found.engine_busy_s / found.seconds == pytest.approx(rate * service_s, rel=0.02)

    @pytest.mark.parametrize(
        "asked",
        [
            Asked(rate=300, tasks=50),
            Asked(rate=3_000, tasks=50),
            Asked(rate=60, tasks=5, inputs=12),
            Asked(clients=40, tasks=50),
        ],
        ids=["half", "too much", "many inputs", "closed"],
    )
    def test_whoever_comes_goes_or_is_there(self, asked: Asked) -> None:
        system = System(replicas_per_node=2, engine_threads=1, plans=PLANS, queued_s=0.1)
        found = simulate(system, COST, AROUND, asked, seconds=3)
        assert found.arrived == len(found.latencies) + found.refused + found.under_way
        assert found.lookups == found.batch_tasks
        # Whatever one does with them, there are two cores.
        assert found.engine_busy_s <= system.replicas_per_node * found.seconds
        assert (found.refused > 0) == (asked.rate == 3_000)

    def test_below_its_capacity_it_keeps_up_and_above_it_refuses(self) -> None:
        system = System(cores=4, engine_threads=1)
        most = capacity(COST, NOTHING, Work(1, 1.0, 35), Replica(2048, 1, 1)).requests_per_s
        below, above = (
            simulate(system, COST, NOTHING, Asked(rate=share * most), seconds=5, warm_up_s=1)
            for share in (0.9, 1.5)
        )
        assert below.refused == 0
        assert below.answered_per_s == pytest.approx(0.9 * most, rel=0.06)
        assert below.quantile_ms(0.99) < 1000
        assert above.refused > 0
        assert above.answered_per_s == pytest.approx(most, rel=0.05)

    def test_more_replicas_never_make_it_slower(self) -> None:
        """Each with a machine of its own; the same requests."""
        asked = Asked(rate=900, tasks=20)
        means = [
            simulate(System(nodes=nodes), COST, AROUND, asked, seconds=5, warm_up_s=1).mean_ms
            for nodes in (1, 2, 4, 8)
        ]
        assert all(later <= 1.02 * earlier for earlier, later in pairwise(means))
        assert means[-1] < means[0]

    def test_threads_share_the_cores(self) -> None:
        """Two engines that always compute: on one core each takes twice as long."""
        asked = Asked(clients=2)
        one, two = (
            simulate(
                System(cores=cores, replicas_per_node=2, engine_threads=1),
                COST, NOTHING, asked, seconds=10,
            )
            for cores in (1, 2)
        )  # fmt: skip
        assert two.answered_per_s == pytest.approx(2 * one.answered_per_s, rel=0.01)

    def test_a_team_stands_still_while_a_core_is_wanted_elsewhere(self) -> None:
        """Three threads on two cores: the two that meet at barriers both run a third of the time,
        the other one two thirds. It ends after 1.5 s; then they go on undisturbed."""
        clock, ended = Clock(), dict[str, float]()
        cores = Cores(clock, 2)
        cores.run(1.0, 2, lambda: ended.update(team=clock.now))
        cores.run(1.0, 1, lambda: ended.update(other=clock.now))
        clock.run(10.0)
        assert ended == pytest.approx({"other": 1.5, "team": 2.0})

    def test_doors_do_not_all_begin_with_the_same_replica(self) -> None:
        """Fifty front doors, none of which knows of the others' requests: else the first of each
        would meet at one replica, and wait for 0.15 s."""
        system = System(nodes=50, doors=50, engine_threads=1, batch_tokens=35)
        asked = Asked(rate=0.3 * 50 / 0.003)
        found = simulate(system, BatchCost(0.003), NOTHING, asked, seconds=0.3, warm_up_s=0.1)
        assert found.quantile_ms(0.99) < 20

    def test_door_sends_to_the_fewest_under_way(self) -> None:
        """With twice as many front doors, each of which sees less, waits become longer."""
        asked = Asked(rate=2_200, tasks=1)
        system = System(nodes=8, engine_threads=1, batch_tokens=35)
        cost = BatchCost(0.003)
        few, many = (
            simulate(replace(system, doors=doors), cost, NOTHING, asked, seconds=4, warm_up_s=1)
            for doors in (1, 8)
        )
        assert few.quantile_ms(0.99) < many.quantile_ms(0.99)

    def test_fewer_warm_plans_cost_time(self) -> None:
        asked = Asked(clients=32, tasks=200)
        rates, misses = zip(
            *(
                (found.answered_per_s, found.miss_share)
                for budget in (200, 2_000, 20_000)
                for found in [
                    simulate(
                        System(plans=replace(PLANS, budget_bytes=budget)),
                        COST, AROUND, asked, seconds=3, warm_up_s=1,
                    )
                ]
            ),
            strict=True,
        )  # fmt: skip
        assert list(rates) == sorted(rates)
        assert list(misses) == sorted(misses, reverse=True)
        assert misses[-1] == 0


class TestPlans:
    def test_are_warm_where_the_servers_cache_has_them_warm(self) -> None:
        """The same lookups in the real cache, which is given the time to build after each."""
        real = PlanCache(Sizes(PLANS), PLANS.budget_bytes, Silent())
        made_up = VirtualPlans(PLANS)
        shares, chance = popularity(80, 1.0), np.random.default_rng(1)
        try:
            for task in chance.choice(80, 3_000, p=shares).tolist():
                plan = real.get(str(task), None)  # type: ignore[arg-type]
                assert made_up.is_warm(task) == (len(plan.parts) > 1)
                real.settle()
                while made_up.begin():
                    made_up.finish()
                assert made_up.bytes == real.bytes
        finally:
            real.close()
            made_up.close()

    def test_begins_with_the_most_asked(self) -> None:
        plans = VirtualPlans(PLANS)
        plans.prefill(100, popularity(100, 1.0))
        assert [plans.is_warm(task) for task in range(PLANS.room)] == [True] * PLANS.room
        assert not plans.is_warm(99)
        plans.close()


class TestPage:
    def test_its_tables_are_those_of_the_report(self) -> None:
        report = json.loads((scaling_page.DOCS / "results" / "scaling.json").read_text())
        page = scaling_page.PAGE.read_text()
        assert scaling_page.with_tables(page, report) == page

    def test_its_plots_are_those_of_the_report(self) -> None:
        folder = scaling_page.DOCS / "results"
        report = json.loads((folder / "scaling.json").read_text())
        for name, svg in scaling_page.plots(report).items():
            assert (folder / name).read_text() == svg
            assert f"results/{name}" in scaling_page.PAGE.read_text()

    def test_a_page_without_a_place_for_a_table_is_refused(self) -> None:
        with pytest.raises(ValueError, match="scaling-machine:begin"):
            scaling_page.with_tables("nothing", {"machine": _facts()})


def _facts() -> dict[str, object]:
    names = ("cores", "processor", "python", "torch", "ray", "commit")
    return dict.fromkeys(names, "some") | {"quick": False}


class TestScenarios:
    def test_a_gpu_is_never_faster_than_its_parts(self) -> None:
        for row in scenarios(AROUND, tasks=10_000, skew=1.0, gpus=100):
            assert row["through_loop_per_s"] <= 1 / AROUND.loop_s + 1
            assert row["all_gpus_per_s"] == pytest.approx(
                100 * row["through_loop_64_per_s"], rel=0.01
            )
            assert row["gpu_used"] <= 1.001
