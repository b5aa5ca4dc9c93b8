"""Asking a running server over HTTP, as `taskbone predict` does. Knows the routes and the error
bodies, and nothing of what is behind them.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import httpx

from model_store.manifest import TextInput
from serving.errors import ServingError

ANSWER_WITHIN_S = 60.0
INPUTS_PER_REQUEST = 64


class ClientError(ServingError):
    """A server that was asked is not there, refuses, or gives no usable answer."""


def is_local(url: str) -> bool:
    """Whether a URL names this machine, whose store's token may be shown to it."""
    try:
        return httpx.URL(url).host in ("localhost", "127.0.0.1", "::1")
    except httpx.InvalidURL:
        return False


def predict(url: str, task: str, inputs: Sequence[TextInput], token: str | None) -> dict[str, Any]:
    """The server's answer: task, version, predictions in the order of the inputs, timings in ms.

    More inputs than fit one request are asked in turn, and their timings added up. Raises
    `ClientError`.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        # A proxy of the environment is for other machines.
        with httpx.Client(
            base_url=url, headers=headers, timeout=ANSWER_WITHIN_S, trust_env=not is_local(url)
        ) as client:
            parts = [
                _predict(client, task, inputs[start : start + INPUTS_PER_REQUEST])
                for start in range(0, len(inputs), INPUTS_PER_REQUEST)
            ]
    except httpx.ConnectError:
        raise ClientError(
            f"no server answers at {url}; start one with: taskbone serve, or name it with --url"
        ) from None
    except httpx.TimeoutException:
        raise ClientError(
            f"the server at {url} did not answer within {ANSWER_WITHIN_S:g} s; it may be busy"
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeEncodeError) as error:
        raise ClientError(f"{url} cannot be asked: {error or type(error).__name__}") from None
    return {
        "task": task,
        "version": parts[-1]["version"],
        "predictions": [item for part in parts for item in part["predictions"]],
        "timings_ms": {
            name: sum(part["timings_ms"][name] for part in parts) for name in parts[0]["timings_ms"]
        },
    }


def _predict(client: httpx.Client, task: str, inputs: Sequence[TextInput]) -> dict[str, Any]:
    path = f"/v1/tasks/{quote(task, safe='')}/predict"
    status, body = _json(client, client.post(path, json={"inputs": inputs}))
    if status == 200:
        return body
    if body["error"].get("type") == "unknown_task":
        tasks = ", ".join(
            info["task"] for info in _json(client, client.get("/v1/tasks"))[1]["tasks"]
        )
        raise ClientError(f"the server has no task {task[:80]!r}; it has: {tasks or 'none yet'}")
    raise ClientError(f"{body['error']['message']} (HTTP status {status})")


def _json(client: httpx.Client, response: httpx.Response) -> tuple[int, dict[str, Any]]:
    """Status and body of an answer that one of our servers may give; any other is an error."""
    if response.status_code == 401:
        raise ClientError(
            f"the server at {client.base_url} wants a key: give --token or set TASKBONE_TOKEN, "
            f"or for a server on this machine name its store with --store"
        )
    try:
        body = response.json()
    except ValueError:
        body = None
    wanted = (
        {"predictions", "timings_ms", "version"} if response.request.method == "POST" else {"tasks"}
    )
    if not isinstance(body, dict) or not (
        wanted <= body.keys() if response.status_code == 200 else _is_error(body)
    ):
        raise ClientError(
            f"what answers at {client.base_url} is no Taskbone server (HTTP status "
            f"{response.status_code}); name the right one with --url"
        )
    return response.status_code, body


def _is_error(body: dict[str, Any]) -> bool:
    return isinstance(body.get("error"), dict) and "message" in body["error"]
