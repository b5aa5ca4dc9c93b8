"""Closed loops: a number of connections, each of which waits for its answer before it asks again.

`wrk` sends where it is installed: it takes a tenth of a Python client's time, which client and
server on the same cores would otherwise share. Knows no route and no task.
"""

import asyncio
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

from serving.load import Client, Outcome, Question, Server, as_bytes, closed

# Requests of one file in turn, over all connections; at the end one line of JSON. A body that is
# JSON has no line break.
_SCRIPT = """
local requests, at = {{}}, 0
init = function()
  for line in io.lines("{file}") do
    local path, body = line:match("^(%S+) (.*)$")
    requests[#requests + 1] = wrk.format("POST", path, {headers}, body)
  end
end
request = function()
  at = at % #requests + 1
  return requests[at]
end
done = function(summary, latency)
  local e = summary.errors
  io.write(string.format(
    '{{"requests": %d, "microseconds": %d, "p50": %f, "p99": %f, "failed": %d}}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


@dataclass(frozen=True)
class Load:
    """What a closed loop measured."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float

    def rounded(self) -> dict[str, float]:
        """For a report."""
        return {key: round(value, 2) for key, value in asdict(self).items()}


def client() -> str:
    """What will send: `wrk` or `python`."""
    return "wrk" if shutil.which("wrk") else "python"


def measure(
    server: Server, questions: Sequence[Question], connections: int, seconds: float
) -> Load:
    """Ask for `seconds`. Raises `SystemExit` where anything but 200 is answered."""
    if client() == "wrk":
        return _wrk(server, questions, connections, seconds)
    return asyncio.run(_python(server, questions, connections, seconds))


def median(loads: Sequence[Load]) -> Load:
    """Of each figure, over several rounds."""
    return Load(
        *(statistics.median(values) for values in zip(*(_values(x) for x in loads), strict=True))
    )


def _values(load: Load) -> tuple[float, float, float]:
    return load.requests_per_s, load.p50_ms, load.p99_ms


def _wrk(server: Server, questions: Sequence[Question], connections: int, seconds: float) -> Load:
    with tempfile.TemporaryDirectory() as folder:
        file, script = Path(folder) / "requests", Path(folder) / "script.lua"
        file.write_text("".join(f"{one.path} {one.body}\n" for one in questions))
        headers = ", ".join(f'["{key}"]="{value}"' for key, value in server.headers.items())
        script.write_text(_SCRIPT.format(file=file, headers=f"{{{headers}}}"))
        size = ["--threads", "1", "--connections", str(connections)]
        time_s = ["--duration", f"{max(1, round(seconds))}s", "--timeout", "60s"]
        address = f"http://127.0.0.1:{server.port}/"
        done = subprocess.run(
            ["wrk", *size, *time_s, "--script", str(script), address],
            capture_output=True,
            text=True,
            check=True,
        )
    found = json.loads(done.stdout.splitlines()[-1])
    if found["failed"] or not found["requests"]:
        raise SystemExit(f"{found['failed']} requests of {found['requests']} failed")
    return Load(
        found["requests"] / (found["microseconds"] / 1e6), found["p50"] / 1000, found["p99"] / 1000
    )


async def _python(
    server: Server, questions: Sequence[Question], connections: int, seconds: float
) -> Load:
    requests = cycle([as_bytes(server, question) for question in questions])
    outcomes: list[Outcome] = []
    client, started = Client(server), time.perf_counter()
    await closed(client, requests, connections, seconds, outcomes.append)
    client.close()
    if failed := [one.status for one in outcomes if one.status != 200]:
        raise SystemExit(
            f"{len(failed)} requests of {len(outcomes)} failed; statuses {set(failed)}"
        )
    taken = max(one.ended for one in outcomes) - started
    cuts = statistics.quantiles((one.latency_s for one in outcomes), n=100)
    return Load(len(outcomes) / taken, 1000 * cuts[49], 1000 * cuts[98])
