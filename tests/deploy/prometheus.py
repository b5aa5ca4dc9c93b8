"""A real Prometheus that scrapes a server, started from what stands in `deploy/monitoring`."""

import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.running import PATIENCE_S, free_port

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="needs prometheus and promtool: apt-get install prometheus",
)


@dataclass(frozen=True)
class Prometheus:
    """A running one."""

    address: str

    def get(self, path: str, **parameters: str) -> Any:
        """What an API call gives. Fails on an error, which Prometheus puts into words."""
        answer = httpx.get(
            f"{self.address}/api/v1/{path}", params=parameters, timeout=30, trust_env=False
        )
        found = answer.json()
        assert found["status"] == "success", f"{path} {parameters}: {found}"
        return found["data"]

    def query(self, expression: str) -> list[float]:
        """The values of an instant vector, those that are numbers."""
        found = self.get("query", query=expression)
        assert found["resultType"] == "vector", expression
        values = [float(one["value"][1]) for one in found["result"]]
        return [value for value in values if not math.isnan(value)]

    def wait_for(self, expression: str, holds: Callable[[list[float]], bool]) -> None:
        """Wait until the expression's values are so."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds(values := self.query(expression)):
            assert time.monotonic() < deadline, f"{expression} is still {values}"
            time.sleep(0.2)

    def next_scrapes(self, count: int) -> None:
        """Wait until every target has been asked so many times more."""
        scrapes = 'min(count_over_time(up{job="taskbone"}[1h]))'
        before = self.query(scrapes)
        target = (before[0] if before else 0) + count
        self.wait_for(scrapes, lambda values: bool(values) and values[0] >= target)


@contextmanager
def prometheus(folder: Path, server: str, token: str) -> Iterator[Prometheus]:
    """Scrape a server every second as `prometheus.yaml` says; `server`: its URL's beginning."""
    shutil.copytree(MONITORING, folder)
    (folder / "taskbone-key").write_text(token)
    file = folder / "prometheus.yaml"
    config = yaml.safe_load(file.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (discovery,) = config["scrape_configs"][0]["http_sd_configs"]
    discovery["url"] = f"{server}/metrics/targets"
    file.write_text(json.dumps(config))
    port = free_port()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={file}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_ready(process, port, folder / "log")
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def _wait_until_ready(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert process.poll() is None, f"Prometheus ended:\n{log.read_text()}"
        try:
            if httpx.get(f"http://127.0.0.1:{port}/-/ready", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, f"Prometheus is not ready:\n{log.read_text()}"
        time.sleep(0.1)
