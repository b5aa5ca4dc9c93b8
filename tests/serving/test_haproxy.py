"""The front door's configuration, as the launcher makes it of Ray's and HAProxy itself reads it."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from serving import haproxy

CONFIG = """\
global
    stats socket {ours}/admin.sock mode 666 level admin expose-fd listeners
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    errorfile 502 /nowhere/502.http
frontend http_frontend
    bind 127.0.0.1:18999
    default_backend taskbone
backend taskbone
    option httpchk GET /-/healthz
    http-check expect status 200
{servers}
"""
HERE = "    server here 127.0.0.1:30000 check"
THERE = "    server there 10.0.0.2:30000 check"
DENY = "    http-request deny deny_status 503 if { path /metrics /v1/stats }"


def start(given: Mapping[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Do as Ray does."""
    return subprocess.run(
        [given["RAY_SERVE_HAPROXY_BINARY_PATH"], *arguments],
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("servers", "chosen"),
    [([HERE], ["here"]), ([THERE, HERE], ["here"]), ([THERE], []), ([], [])],
)
def test_a_front_door_tells_of_its_own_machine_or_not_at_all(
    tmp_path: Path, servers: list[str], chosen: list[str]
) -> None:
    given = haproxy.environment(tmp_path, None)
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG.format(ours=tmp_path, servers="\n".join(servers)))
    done = start(given, "-db", "-f", str(config), "-c")
    assert done.returncode == 0, done.stderr
    lines = config.read_text().splitlines()
    rule = "if { path /metrics /v1/stats }"
    assert [line.split()[1] for line in lines if line.lstrip().startswith("use-server")] == chosen
    assert all(line.endswith(rule) for line in lines if "use-server" in line)
    assert (DENY in lines) == (not chosen)
    assert "    http-check expect rstring (success|DRAINING)" in lines
    # Nobody else may tell it what to do, and the one who drains it finds it in a folder of its own.
    sockets = [line.split()[2:] for line in lines if line.lstrip().startswith("stats socket")]
    assert sockets == [
        [f"{tmp_path}/admin.sock", *"mode 600 level admin expose-fd listeners".split()],
        [f"{tmp_path}/console.sock", *"mode 600 level user".split()],
    ]


@pytest.mark.parametrize(("servers", "code"), [([THERE], 0), ([], 1)])
def test_what_knows_no_replica_does_not_replace_what_runs(
    tmp_path: Path, servers: list[str], code: int
) -> None:
    given = haproxy.environment(tmp_path, None)
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG.format(ours=tmp_path, servers="\n".join(servers)))
    done = start(given, "-db", "-f", str(config), "-c", "-sf", "1")
    assert done.returncode == code, done.stderr
    assert ("no replica is named" in done.stderr) == (code == 1)


def test_nothing_is_started_from_the_folder_for_temporary_files(tmp_path: Path) -> None:
    """Some machines, and containers with `--tmpfs /tmp`, do not allow it."""
    given = haproxy.environment(tmp_path, None)
    assert not Path(given["RAY_SERVE_HAPROXY_BINARY_PATH"]).is_relative_to(tmp_path)
    assert [path for path in tmp_path.iterdir() if os.access(path, os.X_OK)] == []
