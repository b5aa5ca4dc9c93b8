"""The systemd unit, as far as systemd's own tools judge it without starting it."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from serving import deployment
from tests.deploy.image import ROOT
from tests.test_project import parse

UNIT = (ROOT / "deploy" / "taskbone.service").read_text()
MOST_EXPOSED = 45
"""Of 100, as systemd counts what a unit leaves open."""


def analyze(tmp_path: Path, *command: str) -> str:
    """What systemd says of the unit, once its program is one that is there."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    program = Path(sys.executable).parent / "taskbone"
    unit = tmp_path / "taskbone.service"
    unit.write_text(UNIT.replace("/opt/taskbone/.venv/bin/taskbone", str(program)))
    done = subprocess.run(
        ["systemd-analyze", *command, str(unit)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    assert analyze(tmp_path, "verify") == ""


def test_little_is_left_open(tmp_path: Path) -> None:
    analyze(tmp_path, "security", "--offline=true", "--no-pager", f"--threshold={MOST_EXPOSED}")


def test_it_starts_a_command_of_ours_and_waits_for_its_end() -> None:
    (line,) = re.findall(r"^ExecStart=(.*)$", UNIT, re.MULTILINE)
    parse(line[line.index("taskbone serve") :])
    assert shlex.split(line)[0] == "/opt/taskbone/.venv/bin/taskbone"
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)
    assert int(stop) > deployment.GRACE_S
