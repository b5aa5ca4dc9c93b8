"""A real Prometheus over a real server under load: every query of the dashboard and every rule
gives figures. What a healthy server does not have is made to happen before."""

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from model_store.backbone import Backbone
from model_store.store import Store
from tests.abuse.traffic import traffic
from tests.abuse.variants import Variant, make_variants
from tests.deploy.monitoring import as_values, dashboard, filled_in, queries, rules
from tests.deploy.prometheus import Prometheus, needs_prometheus, prometheus
from tests.running import TOKEN, Server, free_port, running

pytestmark = needs_prometheus

TASKS = ("mood", "topic", "spam")
TOO_MUCH = ("overloaded", "rate_limited")
RECORDED = rules("record")
ALERTS = rules("alert")
QUERIES = dict(queries())


@pytest.fixture(scope="module")
def watched(
    tmp_path_factory: pytest.TempPathFactory, tiny: tuple[Store, Backbone]
) -> Iterator[Prometheus]:
    """A Prometheus that has seen a server at work, and all that may happen to it."""
    folder = tmp_path_factory.mktemp("watched")
    store, backbone = tiny
    shutil.copytree(store.root, folder / "store")
    port = free_port()
    command = ["-m", "tests.deploy.slow_server", str(folder / "store"), str(port)]
    versions = {
        task: make_variants(backbone, task, 2, seed) for seed, task in enumerate(TASKS, start=40)
    }
    with (
        running(command, port, folder / "log") as server,
        prometheus(folder / "prometheus", server.address, TOKEN) as found,
    ):
        # Before anything happens, so that all of it is an increase.
        found.wait_for("up", lambda values: values == [1])
        register(server, versions)
        with traffic(port, 3, versions) as seen:
            seen.wait_for(50)
            refuse(server)
            found.next_scrapes(5)
        yield found


def register(server: Server, versions: dict[str, list[Variant]]) -> None:
    """Two versions of each task; the second of one is its shadow, of another its canary."""
    for task, (first, second) in versions.items():
        path = f"/v1/tasks/{task}/versions"
        assert server.admin("POST", path, content=first.data).status_code == 201
        assert server.admin("POST", f"{path}?activate=false", content=second.data).is_success
    shadow, canary = {"version": 2}, {"version": 2, "percent": 20}
    assert server.admin("PUT", "/v1/tasks/mood/shadow", json=shadow).is_success
    assert server.admin("PUT", "/v1/tasks/topic/canary", json=canary).is_success
    assert server.admin("POST", "/v1/tasks/mood/versions", content=b"nothing").status_code == 422


def refuse(server: Server) -> None:
    """Have requests refused: without a key, for no task, too much in one, too much at once."""
    assert server.ask("GET", "/v1/tasks", headers={}).status_code == 401
    assert server.predict("nothing", "a text").status_code == 404
    assert server.predict("mood", ["a text"] * 1000).status_code == 413
    # Half of what may wait, eight times at once.
    large = ["the film was good"] * 80
    with ThreadPoolExecutor(8) as clients:
        # 429 where the shadow has something waiting, too, else 503.
        while not any(server.metric("taskbone_rejected_total", reason=why) for why in TOO_MUCH):
            answers = clients.map(lambda task: server.predict(task, large), TASKS * 8)
            assert {answer.status_code for answer in answers} <= {200, 429, 503}


class TestDashboard:
    @pytest.mark.parametrize("name", QUERIES)
    def test_every_query_gives_figures(self, watched: Prometheus, name: str) -> None:
        assert watched.query(filled_in(QUERIES[name]))

    def test_annotations_are_there(self, watched: Prometheus) -> None:
        (changes,) = dashboard()["annotations"]["list"]
        assert watched.query(filled_in(changes["expr"]))

    @pytest.mark.parametrize(
        "variable",
        [one for one in dashboard()["templating"]["list"] if one["type"] == "query"],
        ids=lambda variable: str(variable["name"]),
    )
    def test_every_variable_has_choices(
        self, watched: Prometheus, variable: dict[str, Any]
    ) -> None:
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert asked
        matching, label = filled_in(asked[1]), asked[2]
        assert watched.get(f"label/{label}/values", **{"match[]": matching})


class TestRules:
    def test_prometheus_has_no_fault_to_find(self, watched: Prometheus) -> None:
        found = [rule for group in watched.get("rules")["groups"] for rule in group["rules"]]
        assert len(found) == len(RECORDED) + len(ALERTS)
        assert [rule for rule in found if rule["health"] != "ok"] == []

    @pytest.mark.parametrize("rule", RECORDED, ids=lambda rule: str(rule["record"]))
    def test_every_recorded_figure_is_there(
        self, watched: Prometheus, rule: dict[str, Any]
    ) -> None:
        assert watched.query(rule["expr"])
        labels = ",".join(f'{name}="{value}"' for name, value in rule.get("labels", {}).items())
        assert watched.query(f"{rule['record']}{{{labels}}}")

    @pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: str(rule["alert"]))
    def test_every_alert_compares_something(
        self, watched: Prometheus, rule: dict[str, Any]
    ) -> None:
        assert set(watched.query(as_values(rule["expr"]))) <= {0.0, 1.0}
        assert watched.query(as_values(rule["expr"]))

    def test_the_alert_that_must_fire_does_and_says_so(self, watched: Prometheus) -> None:
        alerts = watched.get("alerts")["alerts"]
        fired = {one["labels"]["alertname"]: one for one in alerts if one["state"] == "firing"}
        assert fired.keys() == {"TaskboneRegistrationRefused"}
        said = fired["TaskboneRegistrationRefused"]["annotations"]
        assert said["summary"] == "An artifact was refused"
        # What may fire later is worded by then.
        assert [one for one in alerts if "error expanding" in str(one["annotations"])] == []


class TestTargets:
    def test_the_node_was_found_through_the_server(self, watched: Prometheus) -> None:
        (target,) = watched.get("targets", state="active")["activeTargets"]
        assert target["health"] == "up"
        assert target["discoveredLabels"]["__meta_url"].endswith("/metrics/targets")
        assert target["labels"]["job"] == "taskbone"
