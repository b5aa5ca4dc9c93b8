"""What stands in the files of `deploy/monitoring`: the rules, the dashboard's panels, and their
queries."""

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.deploy.prometheus import MONITORING

_COMPARISON = re.compile(r" (==|!=|>=|<=|>|<) (?!bool )")
_METRIC = re.compile(r"(?<![\w:$])taskbone_[a-z_]+")


def rules(kind: str) -> list[dict[str, Any]]:
    """All of a kind: `record` or `alert`."""
    groups = yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def as_values(alert: str) -> str:
    """An alert's expression that gives 0 or 1 where the alert's own gives nothing or something."""
    return _COMPARISON.sub(r" \1 bool ", alert)


def dashboard() -> dict[str, Any]:
    """As the file has it."""
    found: dict[str, Any] = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    return found


def panels() -> list[dict[str, Any]]:
    """All that show something: no rows."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str]]:
    """Every query of a panel, with the panel's title."""
    for panel in panels():
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", target["expr"]


def filled_in(expression: str) -> str:
    """A query with its variables, as Grafana fills them in where everything is chosen."""
    values = {"$job": "taskbone", "$node": ".+", "$task": ".+", "$__rate_interval": "1m"}
    for name, value in values.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def metrics_of(expression: str) -> set[str]:
    """The metrics of ours that an expression reads; those of a histogram by its own name."""
    return {_family(name) for name in _METRIC.findall(expression)}


def _family(name: str) -> str:
    histogram = re.sub(r"_(bucket|sum|count)$", "", name)
    return histogram if histogram.endswith(("_seconds", *_COUNTED)) else name


_COUNTED = ("_batch_requests", "_batch_sequences", "_batch_tokens", "_batch_tasks")
