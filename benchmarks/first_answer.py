"""The time from `git clone` to the first answer, as someone has it who has never seen the project.

    python -m benchmarks.first_answer [--source URL_OR_FOLDER]

Clones into a new folder, runs `make setup` and `make run` there, and asks a task until it answers.
What pip has in its cache is not downloaded again: the figure is with the cache as it is, and the
table says what setting up alone took. The last line of output is one JSON object.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.server_running import free_port

ROOT = Path(__file__).parents[1]
TASK, TEXT = "sst2", "A warm, funny film that I did not want to end."


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default=str(ROOT), help="what is cloned  [this checkout]")
    source = parser.parse_args().source
    console = Console(stderr=True)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "taskbone"
        for step, command in {
            "git clone": ["git", "clone", "--quiet", source, str(place)],
            "make setup": ["make", "--directory", str(place), "setup"],
        }.items():
            with console.status(f"{step} ..."):
                began = time.perf_counter()
                subprocess.run(command, env=_environment(), check=True, stdout=subprocess.DEVNULL)
                seconds[step] = time.perf_counter() - began
        with console.status("make run ..."):
            seconds["make run, until the first answer"] = first_answer(place)
    seconds["all"] = sum(seconds.values())
    show(seconds)
    rounded = {step: round(taken, 1) for step, taken in seconds.items()}
    print(json.dumps({"seconds": rounded, "machine": machine.facts()}))
    return 0


def first_answer(place: Path) -> float:
    """Seconds from starting `make run` to a 200 from the predict route."""
    port = free_port()
    began = time.perf_counter()
    process = subprocess.Popen(
        ["make", "run"],
        cwd=place,
        env=_environment() | {"TASKBONE_PORT": str(port)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while process.poll() is None:
            if _answers(port, place / ".taskbone" / "token"):
                return time.perf_counter() - began
            time.sleep(0.05)
        raise SystemExit(f"make run ended with status {process.returncode}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait()


def _answers(port: int, token: Path) -> bool:
    try:
        headers = {"Authorization": f"Bearer {token.read_text().strip()}"}
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/tasks/{TASK}/predict",
            json={"inputs": TEXT},
            headers=headers,
            timeout=10,
        )
    except (OSError, httpx.TransportError):
        return False
    return answer.status_code == 200


def _environment() -> dict[str, str]:
    """A new user's: nothing of this project's settings."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("TASKBONE") and name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }


def show(seconds: dict[str, float]) -> None:
    """The table for people."""
    table = Table(title="From nothing to the first answer")
    table.add_column("step")
    table.add_column("seconds", justify="right")
    for step, taken in seconds.items():
        table.add_row(step, f"{taken:.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
