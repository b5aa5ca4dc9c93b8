"""The files in `deploy/monitoring`: what Prometheus' and Grafana's own tools say of them, and that
they agree with each other and with the documentation."""

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.deploy.monitoring import dashboard, metrics_of, panels, queries, rules
from tests.deploy.prometheus import MONITORING, needs_prometheus

ROOT = Path(__file__).parents[2]
CONFIGS = ("prometheus.yaml", "prometheus-static.yaml", "prometheus-kubernetes.yaml")
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def promtool(*arguments: str, folder: Path = MONITORING) -> str:
    done = subprocess.run(
        ["promtool", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def pod(address: str, name: str, app: str, port: str, phase: str) -> dict[str, Any]:
    """A container's port as Prometheus describes it."""
    labels = {
        "namespace": "models",
        "pod_name": name,
        "pod_label_app_kubernetes_io_name": app,
        "pod_container_port_name": port,
        "pod_phase": phase,
    }
    return {
        "targets": [address],
        "labels": {f"__meta_kubernetes_{key}": value for key, value in labels.items()},
    }


def config(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((MONITORING / name).read_text())
    return found


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub and MkDocs make them of headings."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-") for line in lines}


@needs_prometheus
class TestPromtool:
    @pytest.mark.parametrize("name", ["prometheus.yaml", "prometheus-static.yaml"])
    def test_configurations_are_right(self, name: str, tmp_path: Path) -> None:
        folder = tmp_path / "monitoring"
        shutil.copytree(MONITORING, folder)
        (folder / "taskbone-key").write_text("a key")
        assert "SUCCESS" in promtool("check", "config", name, folder=folder)

    def test_of_pods_those_that_serve_are_targets(self, tmp_path: Path) -> None:
        """What Kubernetes would say of pods is written out: Debian's build does not ask it."""
        found = config("prometheus-kubernetes.yaml")
        del found["rule_files"]
        (job,) = found["scrape_configs"]
        assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
        job["authorization"]["credentials_file"] = str(tmp_path / "key")
        (tmp_path / "key").write_text("a key")
        job["static_configs"] = [
            pod("10.0.0.1:8000", "taskbone-a", "taskbone", "serve", "Running"),
            pod("10.0.0.1:6379", "taskbone-a", "taskbone", "gcs", "Running"),
            pod("10.0.0.2:8000", "taskbone-b", "taskbone", "serve", "Pending"),
            pod("10.0.0.3:8000", "shop-a", "shop", "serve", "Running"),
        ]
        (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(found))
        # It waits for so long, whatever has come.
        command = ("check", "service-discovery", "--timeout=3s")
        said = promtool(*command, str(tmp_path / "prometheus.yaml"), "taskbone")
        kept = [one["labels"] for one in json.loads(said) if one["labels"]]
        assert kept == [
            {
                "__address__": "10.0.0.1:8000",
                "__metrics_path__": "/metrics",
                "__scheme__": "http",
                "__scrape_interval__": "15s",
                "__scrape_timeout__": "10s",
                "instance": "10.0.0.1:8000",
                "job": "taskbone",
                "namespace": "models",
                "pod": "taskbone-a",
            }
        ]

    def test_rules_are_right(self) -> None:
        found = promtool("check", "rules", "rules.yaml")
        assert f"{len(rules('record')) + len(rules('alert'))} rules found" in found

    def test_rules_compute_and_fire_as_they_should(self) -> None:
        assert "SUCCESS" in promtool("test", "rules", "rules_test.yaml")


class TestConfigurations:
    def test_they_differ_in_how_nodes_are_found_alone(self) -> None:
        first, *others = map(config, CONFIGS)
        for other in others:
            assert {key: other[key] for key in ("global", "rule_files")} == {
                key: first[key] for key in ("global", "rule_files")
            }
            (job,) = other["scrape_configs"]
            assert job["job_name"] == "taskbone"
            assert "credentials_file" in job["authorization"]


class TestRules:
    @pytest.mark.parametrize("alert", rules("alert"), ids=lambda alert: str(alert["alert"]))
    def test_an_alert_says_what_to_do_and_where_more_stands(self, alert: dict[str, Any]) -> None:
        said = alert["annotations"]
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        assert said["summary"]
        assert len(said["description"].split()) > 15
        page, _, anchor = said["runbook"].partition("#")
        assert anchor == alert["alert"].lower()
        assert anchor in headings(ROOT / page)

    @pytest.mark.parametrize("alert", rules("alert"), ids=lambda alert: str(alert["alert"]))
    def test_its_section_names_its_severity(self, alert: dict[str, Any]) -> None:
        page = (ROOT / "docs" / "monitoring.md").read_text()
        section = page.split(f"### {alert['alert']}\n")[1]
        assert section.strip().lower().startswith(alert["labels"]["severity"])

    def test_every_rule_has_a_case(self) -> None:
        tests = (MONITORING / "rules_test.yaml").read_text()
        alerts = {rule["alert"] for rule in rules("alert")}
        fired = set(re.findall(r'labels: ALERTS\{alertname="(\w+)", alertstate="firing"', tests))
        assert fired == alerts
        recorded = {rule["record"] for rule in rules("record")}
        assert {name for name in recorded if not re.search(f"expr: .*{name}", tests)} == set()

    def test_only_documented_metrics_are_read(self) -> None:
        used = set().union(*(metrics_of(rule["expr"]) for kind in KINDS for rule in rules(kind)))
        assert used - documented() == set()


KINDS = ("record", "alert")


def documented() -> set[str]:
    return set(re.findall(r"taskbone_[a-z_]+", (ROOT / "docs" / "metrics.md").read_text()))


class TestDashboard:
    def test_grafanas_own_types_know_every_field(self) -> None:
        """What they do not know would be lost."""
        register_default_plugins()
        read = JSONEncoder().encode(Dashboard.from_json(dashboard()))
        assert list(lost(dashboard(), json.loads(read))) == []

    def test_ids_are_given_once(self) -> None:
        numbers = [panel["id"] for panel in dashboard()["panels"]]
        assert len(set(numbers)) == len(numbers)

    def test_panels_lie_beside_each_other(self) -> None:
        places = [panel["gridPos"] for panel in dashboard()["panels"]]
        for one, other in itertools.combinations(places, 2):
            assert (
                one["x"] + one["w"] <= other["x"]
                or other["x"] + other["w"] <= one["x"]
                or one["y"] + one["h"] <= other["y"]
                or other["y"] + other["h"] <= one["y"]
            ), (one, other)
        assert all(place["x"] + place["w"] <= 24 for place in places)

    def test_rows_are_those_that_are_promised(self) -> None:
        rows = [panel["title"] for panel in dashboard()["panels"] if panel["type"] == "row"]
        assert rows == [
            *("Overview", "Latency", "Batches", "Refusals", "Plan cache", "Memory", "Lifecycle")
        ]

    @pytest.mark.parametrize("panel", panels(), ids=lambda panel: str(panel["title"]))
    def test_a_panel_says_what_it_shows(self, panel: dict[str, Any]) -> None:
        assert len(panel["description"].split()) >= 5
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]

    def test_every_datasource_is_the_chosen_one(self) -> None:
        found = list(datasources(dashboard()))
        assert len(found) > len(panels())
        assert [one for one in found if one != DATASOURCE] == []

    def test_every_variable_is_used_and_there(self) -> None:
        names = {variable["name"] for variable in dashboard()["templating"]["list"]}
        asked = {name for _, query in queries() for name in re.findall(r"\$([a-z]+)\b", query)} | {
            "datasource"
        }
        assert asked == names

    def test_only_documented_metrics_are_read(self) -> None:
        used = set().union(*(metrics_of(query) for _, query in queries()))
        assert used - documented() == set()

    def test_only_recorded_figures_are_read(self) -> None:
        recorded = {rule["record"] for rule in rules("record")}
        read = {name for _, query in queries() for name in re.findall(r"\w+:\w+:\w+", query)}
        assert read - recorded == set()
        assert read


def datasources(part: Any) -> Iterator[Any]:
    """Everything that stands under that name, anywhere."""
    if isinstance(part, list):
        for item in part:
            yield from datasources(item)
    elif isinstance(part, dict):
        for key, value in part.items():
            if key == "datasource":
                yield value
            else:
                yield from datasources(value)


def lost(given: Any, found: Any, place: str = "") -> Iterator[str]:
    """Where `found` lacks something of `given`, or has something else; it may have more."""
    if isinstance(given, dict) and isinstance(found, dict):
        for key, value in given.items():
            if key in found:
                yield from lost(value, found[key], f"{place}.{key}")
            elif value not in (None, "", [], {}):
                yield f"{place}.{key}"
    elif isinstance(given, list) and isinstance(found, list) and len(given) == len(found):
        for number, pair in enumerate(zip(given, found, strict=True)):
            yield from lost(*pair, f"{place}[{number}]")
    elif given != found:
        yield f"{place}: {given!r} became {found!r}"
