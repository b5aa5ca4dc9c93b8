"""What the operator sees of a starting server, and how its first answers are got.

Knows the address and the routes; nothing of Ray or of what is behind the routes.
"""

import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from serving.config import ServeConfig
from serving.errors import ServingError
from serving.local_key import TOKEN_FILE, local_token
from serving.logs import LogConsole

READY_WITHIN_S = 120


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str], None]]:
    """Show what is being done now: in place on a terminal, else one line a step."""
    if not console.is_terminal:
        yield lambda text: console.print(f"{text} ...", markup=False)
        return
    with console.status("starting") as status:
        yield lambda text: status.update(f"{text} ...")


def wait_until_ready(config: ServeConfig, token: str | None) -> list[dict[str, Any]] | None:
    """The tasks of the server, as it describes them, once it says that it is ready.

    None where it needs a key and none is at hand: then it is not asked.
    """
    deadline = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            _get(config, "/health/ready", None)
            if config.auth and token is None:
                return None
            tasks: list[dict[str, Any]] = _get(config, "/v1/tasks", token)["tasks"]
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                raise ServingError(f"not ready after {READY_WITHIN_S} s: {error}") from error
            time.sleep(0.1)
        else:
            return tasks


def _get(config: ServeConfig, path: str, token: str | None) -> dict[str, Any]:
    request = urllib.request.Request(_address(config) + path)  # noqa: S310 - always http
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    # Without the system's proxy settings: this is our own machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def _address(config: ServeConfig) -> str:
    return f"http://{_host(config)}:{config.port}"


def _host(config: ServeConfig) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)  # noqa: S104
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return host


def announce(
    console: Console,
    config: ServeConfig,
    token: str | None,
    tasks: list[dict[str, Any]] | None,
    as_json: bool,
) -> None:
    """Say that the server is ready: to people, or to a program by one line of JSON."""
    if as_json:
        sys.stdout.write(json.dumps(facts(config, token, tasks)) + "\n")
        sys.stdout.flush()
    else:
        show(console, config, token, tasks)


def facts(
    config: ServeConfig, token: str | None, tasks: list[dict[str, Any]] | None
) -> dict[str, Any]:
    """What a program must know to ask the server. Never the key: `token_file` is where it lies."""
    file = config.folder / TOKEN_FILE if config.folder else None
    has_it = file is not None and token is not None and token == local_token(config.folder, {})
    return {
        "url": _address(config),
        "grpc": f"{_host(config)}:{config.grpc_port}" if config.grpc_port else None,
        "store": str(config.store),
        "token_file": str(file) if has_it else None,
        "tasks": None if tasks is None else sorted(task["task"] for task in tasks),
        "pid": os.getpid(),
    }


def show(
    console: Console, config: ServeConfig, token: str | None, tasks: list[dict[str, Any]] | None
) -> None:
    """Where the server is and how to ask it: the one place where the key is printed.

    Printed, and not logged: a log is kept, and read by others.
    """
    if isinstance(console, LogConsole):
        token = None
    address = _address(config)
    lines = [f"Taskbone answers at {address}", ""]
    if tasks is None:
        lines.append(f"key    one of those in the store: taskbone keys list --store {config.store}")
    else:
        lines.append("tasks  " + (", ".join(task["task"] for task in tasks) or "none yet"))
    if config.grpc_port:
        lines.append(f"grpc   {_host(config)}:{config.grpc_port}")
    # Behind `#`, a key stays in the browser; the page takes it out of the address bar.
    lines.append(f"page   {address}/" + (f"#token={token}" if token else ""))
    lines.append(f"docs   {address}/docs" + (f"?token={token}" if token else ""))
    lines.append("stop   Ctrl-C")
    if tasks:
        task = min(tasks, key=lambda task: task["takes_pairs"])
        example: Any = "a text to classify"
        if task["takes_pairs"]:
            example = [["a first text", "a second text"]]
        header = f" -H 'Authorization: Bearer {token}'" if token else ""
        body = json.dumps({"inputs": example})
        lines += ["", f"curl {address}/v1/tasks/{task['task']}/predict{header} -d '{body}'"]
    console.print("\n".join(lines), markup=False, soft_wrap=True)
