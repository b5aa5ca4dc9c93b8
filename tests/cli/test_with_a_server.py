"""The commands that start or ask a server, with the real one on a tiny backbone: one start."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import httpx
import pytest

from model_store.backbone import Backbone
from model_store.garbage import Rule, collect
from model_store.store import Store
from model_store.verification import check_artifact
from tests.cli.command_page import as_promised
from tests.cli.running import fail, succeed
from tests.cli.terminal import in_terminal
from tests.overlays import random_artifact
from tests.running import PATIENCE_S, free_port
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
SETTINGS = (
    *("--device", "cpu", "--precision", "fp32", "--engine-threads", "1"),
    *("--max-queue-ms", "60000"),
)


@dataclass(frozen=True)
class Place:
    """A server that a program has started, and what that program has read of it."""

    process: "subprocess.Popen[str]"
    line: str
    store: Store
    backbone: Backbone

    @property
    def facts(self) -> dict[str, Any]:
        """The line of JSON."""
        found: dict[str, Any] = json.loads(self.line)
        return found


@pytest.fixture(scope="module")
def place(
    tiny: tuple[Store, Backbone], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    there, backbone = tiny
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(there.root, folder / "store")
    store = Store(folder / "store")
    for task in ("mood", "topic"):
        store.publish(check_artifact(random_artifact(backbone, task), store))
    environment = {key: value for key, value in os.environ.items() if "TASKBONE" not in key}
    with (folder / "errors").open("wb") as errors:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "taskbone", "serve", "--json"),
                *("--store", str(store.root), "--port", str(free_port()), *SETTINGS),
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (folder / "errors").read_text()
        yield Place(process, line, store, backbone)
    finally:
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=PATIENCE_S)
        assert rest == "", "the standard output is for the one line"
        assert process.returncode == 0


@pytest.fixture
def here(store: Store, place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The same, with the environment of a user who has started it."""
    monkeypatch.setenv("TASKBONE_STORE", str(place.store.root))
    monkeypatch.setenv("TASKBONE_URL", place.facts["url"])
    return place


def test_a_program_reads_where_the_server_is(here: Place) -> None:
    found = as_promised("serve", here.line)
    assert here.line.count("\n") == 1
    assert found["pid"] == here.process.pid
    assert found["tasks"] == ["mood", "topic"]
    token = Path(found["token_file"]).read_text().strip()
    assert token not in here.line
    headers = {"authorization": f"Bearer {token}"}
    answer = httpx.get(found["url"] + "/v1/tasks", headers=headers, trust_env=False)
    assert [task["task"] for task in answer.json()["tasks"]] == found["tasks"]


def test_predict_prints_what_is_promised(here: Place) -> None:
    assert as_promised("predict", succeed("predict", "mood", "fine", "--json"))["task"] == "mood"


def test_a_load_is_answered_and_counted(here: Place) -> None:
    options = ("--connections", "1,8", "--seconds", "0.5", "--inputs", "2")
    found = as_promised("bench", succeed("bench", "--all", *options, "--json"))
    assert found["tasks"] == ["mood", "topic"]
    for load in found["loads"]:
        assert load["statuses"].keys() == {"200"}
        assert load["requests_per_s"] > 0
        assert 0 < load["server_ms"]["forward"] < load["latency_ms"]["mean"]
    (due,) = as_promised(
        "bench", succeed("bench", "mood", "--rate", "20", "--seconds", "1", "--json")
    )["loads"]
    assert due["statuses"] == {"200": 20}


def test_status_counts_what_was_asked(here: Place) -> None:
    with in_terminal(["status", "--interval", "0.2"], columns=100) as terminal:
        terminal.wait_for("1 of 1 replicas ready", times=2)
        loaded = succeed("bench", "mood", "--connections", "2", "--seconds", "2", "--json")
        found = as_promised("status", succeed("status", "--json"))
        assert terminal.interrupt() == 0
    (load,) = json.loads(loaded)["loads"]
    assert load["statuses"]["200"] > 0
    assert (found["replicas"], found["replicas_ready"]) == (1, 1)
    assert found["memory_bytes"] > 0
    assert {task["task"] for task in found["tasks"]} >= {"mood", "topic"}
    lines = [line.split() for line in terminal.text.splitlines() if line.startswith("mood")]
    assert any(float(line[3].replace(",", "")) > 0 for line in lines if len(line) > 3)


def test_what_was_collected_is_gone_from_the_server_too(here: Place) -> None:
    for number in range(2):
        data = random_artifact(here.backbone, "mood", seed=10 + number)
        here.store.publish(check_artifact(data, here.store), activate=False)
    path = f"{here.facts['url']}/v1/tasks/mood/versions"
    token = (here.store.root / "token").read_text().strip()

    def versions() -> list[int]:
        answer = httpx.get(path, headers={"authorization": f"Bearer {token}"}, trust_env=False)
        return [version["version"] for version in answer.json()["versions"]]

    wait_until(lambda: versions() == [1, 2, 3])
    assert "Nothing to delete" in succeed("store", "gc", "--keep", "0", "--yes")  # all are new
    gone = collect(here.store, Rule(keep=0, before=inf))
    assert [info.version for info in gone.versions] == [2, 3]
    wait_until(lambda: versions() == [1])
    assert as_promised("predict", succeed("predict", "mood", "fine", "--json"))["version"] == 1


def test_a_key_that_may_not_see_the_metrics(here: Place) -> None:
    key = json.loads(succeed("keys", "add", "asker", "--scope", "predict", "--json"))["key"]

    def message() -> str:
        return fail("status", "--token", key)

    wait_until(lambda: "wants a key" not in message())  # until the server has taken it up
    assert "taskbone keys add NAME --scope metrics" in message()
