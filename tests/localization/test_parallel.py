"""Many tasks at once on a real Ray, and that nothing of it stays."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from localization.parallel import localize_at_once
from model_store.manifest import read_header
from model_store.store import Store
from tests.cli.running import fail
from tests.localization.test_batch import TASK, write_task

ENDLESS = {"tuning": TASK["tuning"] | {"epochs": 100_000, "patience": 100_000}}


@contextmanager
def localizing(place: Path, *files: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command with --parallel, in a process group of its own; never left running."""
    command = [sys.executable, "-m", "taskbone", "localize", *files, "--parallel"]
    with subprocess.Popen(
        command,
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.communicate()


def read_until(process: subprocess.Popen[str], *lines: str) -> list[str]:
    """What the command prints, until it has printed all these lines."""
    assert process.stdout is not None
    missing = set(lines)
    seen: list[str] = []
    while missing:
        line = process.stdout.readline()
        assert line, f"it ended without {missing}: {seen}"
        seen.append(line.rstrip())
        missing.discard(seen[-1])
    return seen


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def folder_of(processes: list[psutil.Process]) -> Path:
    """The private folder that Ray's processes were told of."""
    words = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            words += process.cmdline()
    (folder,) = set(re.findall(r"(?<![^=])/[\w/]+/taskbone-\w+(?=/)", "=".join(words)))
    return Path(folder)


def running(processes: list[psutil.Process]) -> list[str]:
    names = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                names.append(process.name())
    return names


def test_good_tasks_are_published_beside_a_bad_one(place: Path) -> None:
    write_task(place, "one")
    write_task(place, "two", seed=3)
    write_task(place, "absent", data={"train": "absent.jsonl"})
    with localizing(place, "one.yaml", "absent.yaml", "two.yaml") as process:
        lines = read_until(process, "one: reading")
        processes = descendants(process)
        folder = folder_of(processes)
        assert folder.stat().st_mode & 0o077 == 0
        rest, _ = process.communicate()
    lines += rest.splitlines()
    assert process.returncode == 1
    assert {"one: inject", "two: inject", "one: done", "two: done"} <= set(lines)
    (reason,) = (line for line in lines if line.startswith("absent.yaml: failed: "))
    assert reason.endswith("absent.jsonl: no such file")
    assert lines[-1] == "Error: 1 of 3 tasks failed: absent.yaml"
    table = [line.split()[0] for line in lines if line.startswith("  ") and line.strip()]
    assert table == ["task", "one", "absent", "two"]
    store = Store(place / "store")
    assert sorted(store.tasks()) == ["one", "two"]
    manifest, _ = read_header(store.read("two")[1])
    assert manifest.provenance.hardware.endswith("1 threads")
    assert running(processes) == []
    assert not folder.exists()


def test_a_killed_worker_fails_its_task_alone(place: Path) -> None:
    write_task(place, "one")
    write_task(place, "endless", **ENDLESS)
    with localizing(place, "endless.yaml", "one.yaml") as process:
        read_until(process, "endless: inject")
        (worker,) = (item for item in descendants(process) if "localize endless" in item.name())
        worker.kill()
        output, _ = process.communicate()
    assert process.returncode == 1
    assert "endless.yaml: failed: its process was killed" in output
    assert output.splitlines()[-1] == "Error: 1 of 2 tasks failed: endless.yaml"
    assert "one: done" in output
    assert list(Store(place / "store").tasks()) == ["one"]


def test_ctrl_c_ends_all_and_keeps_what_is_finished(place: Path) -> None:
    write_task(place, "one")
    write_task(place, "endless", **ENDLESS)
    with localizing(place, "one.yaml", "endless.yaml") as process:
        read_until(process, "one: done", "endless: inject")
        processes = descendants(process)
        folder = folder_of(processes)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate()
    assert process.returncode == 130
    assert output.strip() == "Interrupted."
    assert running(processes) == []
    assert not folder.exists()
    assert len(list((place / "runs" / "one").glob("inject-*"))) == 1
    assert list(Store(place / "store").tasks()) == ["one"]


CLUSTER = """
import ray, sys
context = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
                   object_store_memory=80 * 2**20, _node_ip_address="127.0.0.1",
                   logging_level="ERROR", _temp_dir=sys.argv[1])
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
print("still here:", ray.get(ray.remote(lambda: 7).remote()))
"""
GUARDED = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}


@pytest.fixture
def cluster() -> Iterator[subprocess.Popen[str]]:
    """A process that prints its Ray's address, and a line more once its input is closed."""
    # The paths of Ray's Unix sockets must be short.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, folder],
            env={**os.environ, **GUARDED, "RAY_USAGE_STATS_ENABLED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.communicate("")


def test_a_cluster_is_joined_and_left_as_it_was(
    place: Path, cluster: subprocess.Popen[str]
) -> None:
    write_task(place, "one")
    write_task(place, "endless", **ENDLESS)
    assert cluster.stdout is not None
    address = cluster.stdout.readline().strip()
    files = ["one.yaml", "endless.yaml"]
    with localizing(place, *files, RAY_ADDRESS=address, **GUARDED) as process:
        read_until(process, "one: done", "endless: inject")
        assert descendants(process) == []
        workers = [item for item in descendants(cluster) if "localize" in item.name()]
        assert len(workers) == 1
        process.terminate()
        output, _ = process.communicate()
    assert process.returncode == 130
    assert output.strip() == "Interrupted."
    psutil.wait_procs(workers)
    assert list(Store(place / "store").tasks()) == ["one"]
    assert cluster.communicate("")[0].strip() == "still here: 7"


def test_a_cluster_that_does_not_answer_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    text = fail("localize", write_task(place, "one"), "--parallel")
    assert text.startswith("RAY_ADDRESS 127.0.0.1:1: cannot be joined: Connection refused")


def test_more_cpus_than_there_are_is_said_before_ray_is_started(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = psutil.Process().children()
    text = fail("localize", write_task(place, "one"), "--parallel", "--cpus-per-task", "4096")
    assert text.startswith("a task is to take 4096 CPUs, and this machine has ")
    assert psutil.Process().children() == before


def test_nothing_to_do_starts_no_ray() -> None:
    from rich.console import Console

    before = psutil.Process().children()
    assert localize_at_once([], 1, Console()) == []
    assert psutil.Process().children() == before
