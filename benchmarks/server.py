"""Measures a whole server over HTTP: requests per second and latency.

    python -m benchmarks.server --connections 1,64 [--data DIR] [--seconds 10]

Starts `taskbone serve` with the ready-made tasks on a free port and asks all of them in turn, one
sentence a request, over kept-alive connections that each wait for their answer. Sentences have the
lengths of SST-2's test sentences: with --data they are those sentences, without it they are made of
common words. The client runs in this process, on the same cores as the server, and its work is in
the figures. The last line of output is one JSON object.
"""

import argparse
import asyncio
import json
import os
import random
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from examples.ready_made import prepare
from model_store.manifest import read_header
from model_store.store import Store
from serving.local_key import TOKEN_VARIABLE

# Words a sentence: deciles of the lengths of SST-2's test sentences.
LENGTHS = (2, 9, 11, 14, 16, 19, 21, 24, 27, 32, 47)
WORDS = """
the a of and in to is it that this film story with for as but not its you one by about too more
than an on all has like good so funny little time never characters movie even still
""".split()
WARM_UP_S = 5.0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--connections", default="1,64", help="numbers, separated by commas")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    arguments = parser.parse_args()
    numbers = [int(number) for number in arguments.connections.split(",")]
    console = Console(stderr=True)
    results: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        with console.status("Preparing a store ..."):
            names = prepare(store)
        port = free_port()
        token = os.environ.setdefault(TOKEN_VARIABLE, secrets.token_urlsafe(32))
        requests = request_bytes(store, names, sentences(arguments.data), port, token)
        command = ["taskbone", "serve", "--store", folder, "--port", str(port)]
        server = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL)
        try:
            with console.status("Starting the server ..."):
                wait_until_ready(server, port)
            with console.status(f"Warming up for {WARM_UP_S:.0f} s ..."):
                asyncio.run(load(port, requests, max(numbers), WARM_UP_S))
            for number in numbers:
                with console.status(f"{number} connections, {arguments.seconds:.0f} s ..."):
                    latencies = asyncio.run(load(port, requests, number, arguments.seconds))
                results[number] = summary(latencies, arguments.seconds)
        finally:
            server.terminate()
            server.wait()
    show(results)
    report = {
        key: {str(number): row[key] for number, row in results.items()}
        for key in ("requests_per_s", "p50_ms", "p99_ms")
    }
    print(json.dumps(report | {"tasks": names, "machine": machine.facts()}))
    return 0


def sentences(data: Path | None) -> list[str]:
    """SST-2's test sentences, or as many of the same lengths."""
    if data is not None:
        lines = (data / "sst2" / "test.jsonl").read_text().splitlines()
        return [json.loads(line)["text"] for line in lines]
    generator = random.Random(0)
    return [
        " ".join(generator.choices(WORDS, k=round(generator.uniform(*pair))))
        for _ in range(80)
        for pair in pairwise(LENGTHS)
    ]


def request_bytes(
    store: Store, names: list[str], texts: list[str], port: int, token: str
) -> list[bytes]:
    """One HTTP request per sentence, tasks in turn."""
    pairs = {name: read_header(store.read(name)[1])[0].takes_pairs for name in names}
    requests = []
    for number, text in enumerate(texts):
        name = names[number % len(names)]
        # A pair of the same total length.
        words = text.split()
        half = len(words) // 2
        pair = [[" ".join(words[:half]), " ".join(words[half:])]]
        body = json.dumps({"inputs": pair if pairs[name] else text}).encode()
        head = (
            f"POST /v1/tasks/{name}/predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            f"Authorization: Bearer {token}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        requests.append(head.encode() + body)
    return requests


async def load(port: int, requests: list[bytes], connections: int, seconds: float) -> list[float]:
    """Ask for `seconds` over that many connections; the latency of every answer, in seconds."""
    end = time.perf_counter() + seconds
    latencies: list[float] = []
    # Each connection starts elsewhere, so that tasks are mixed at every moment.
    workers = [
        _connection(port, requests, number * len(requests) // connections, end, latencies)
        for number in range(connections)
    ]
    await asyncio.gather(*workers)
    return latencies


async def _connection(
    port: int, requests: list[bytes], start: int, end: float, latencies: list[float]
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    index = start
    while (begun := time.perf_counter()) < end:
        writer.write(requests[index % len(requests)])
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length:")
        )
        body = await reader.readexactly(length)
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"a request failed: {head.splitlines()[0]!r} {body[:300]!r}")
        latencies.append(time.perf_counter() - begun)
        index += 1
    writer.close()


def summary(latencies: list[float], seconds: float) -> dict[str, float]:
    """Requests per second, and percentiles in milliseconds."""
    cuts = statistics.quantiles(latencies, n=100)
    return {
        "requests_per_s": round(len(latencies) / seconds, 1),
        "p50_ms": round(1000 * cuts[49], 2),
        "p99_ms": round(1000 * cuts[98], 2),
    }


def show(results: dict[int, dict[str, float]]) -> None:
    """The table for people."""
    table = Table(title=f"One server, {os.cpu_count()} cores, client on the same machine")
    for head in ("connections", "requests/s", "p50 ms", "p99 ms"):
        table.add_column(head, justify="right")
    for number, row in results.items():
        table.add_row(str(number), *(f"{value:,.1f}" for value in row.values()))
    Console(width=100).print(table)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(server: "subprocess.Popen[bytes]", port: int) -> None:
    """Until `/health/ready` says so. Raises `SystemExit` if the server ends before."""
    while server.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"the server ended with status {server.returncode}")


if __name__ == "__main__":
    sys.exit(main())
