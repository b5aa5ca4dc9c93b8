"""Asking a running server over HTTP, as the commands do. Knows the routes and the error bodies, and
nothing of what is behind them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx
from pydantic import ValidationError

from model_store.manifest import TextInput, describe
from serving.errors import ServingError
from serving.statistics import Sample

ANSWER_WITHIN_S = 60.0
INPUTS_PER_REQUEST = 64
BUSY = (429, 502, 503, 504)
"""What a server says that could answer the same request at another moment."""


class ClientError(ServingError):
    """A server that was asked refuses, or gives no usable answer."""


class UnreachableError(ClientError):
    """Nobody answers now, or not in time; a moment later somebody may."""


def is_local(url: str) -> bool:
    """Whether a URL names this machine, whose store's token may be shown to it."""
    try:
        return httpx.URL(url).host in ("localhost", "127.0.0.1", "::1")
    except httpx.InvalidURL:
        return False


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Have what goes wrong between here and the server at a URL be an `UnreachableError`."""
    try:
        yield
    except httpx.ConnectError:
        raise UnreachableError(
            f"no server answers at {url}; start one with: taskbone serve, or name it with --url"
        ) from None
    except httpx.TimeoutException:
        raise UnreachableError(
            f"the server at {url} did not answer within {ANSWER_WITHIN_S:g} s; it may be busy"
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeEncodeError) as error:
        raise UnreachableError(f"{url} cannot be asked: {error or type(error).__name__}") from None


@contextmanager
def connected(url: str, token: str | None) -> Iterator[httpx.Client]:
    """A client of the server at a URL; errors are explained as long as the block runs."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with (
        explained(url),
        # A proxy of the environment is for other machines.
        httpx.Client(
            base_url=url, headers=headers, timeout=ANSWER_WITHIN_S, trust_env=not is_local(url)
        ) as client,
    ):
        yield client


def predict(url: str, task: str, inputs: Sequence[TextInput], token: str | None) -> dict[str, Any]:
    """The server's answer: task, version, predictions in the order of the inputs, timings in ms.

    More inputs than fit one request are asked in turn, and their timings added up. Raises
    `ClientError`.
    """
    with connected(url, token) as client:
        parts = [
            _predict(client, task, inputs[start : start + INPUTS_PER_REQUEST])
            for start in range(0, len(inputs), INPUTS_PER_REQUEST)
        ]
    return {
        "task": task,
        "version": parts[-1]["version"],
        "predictions": [item for part in parts for item in part["predictions"]],
        "timings_ms": {
            name: sum(part["timings_ms"][name] for part in parts) for name in parts[0]["timings_ms"]
        },
    }


def tasks(client: httpx.Client) -> dict[str, dict[str, Any]]:
    """What the server says of each task that the key is for, by name. Raises `ClientError`."""
    status, found = _tasks(client)
    if status != 200:
        raise _refusal(status, found, "predict")
    return found


def tasks_if_allowed(client: httpx.Client) -> dict[str, dict[str, Any]]:
    """The same; none where the key does not open the list."""
    status, found = _tasks(client)
    if status not in (200, 403):
        raise _refusal(status, found, "predict")
    return found if status == 200 else {}


def _tasks(client: httpx.Client) -> tuple[int, dict[str, dict[str, Any]]]:
    status, body = _json(client, client.get("/v1/tasks"), {"tasks"})
    return status, {info["task"]: info for info in body["tasks"]} if status == 200 else body


def check(client: httpx.Client, path: str, body: str) -> None:
    """Send a request once. Raises `ClientError` where it would never be answered; a server that has
    too much to do may refuse it."""
    headers = {"content-type": "application/json"}
    answer = client.post(path, content=body, headers=headers)
    status, found = _json(client, answer, {"predictions"})
    if status not in (200, *BUSY):
        raise _refusal(status, found, "predict")


def sample(client: httpx.Client) -> Sample:
    """What the server has counted. Raises `ClientError`, which says how to get the right key."""
    status, body = _json(client, client.get("/v1/stats"), {"at", "tasks"})
    if status == 404:
        raise ClientError(
            f"the server at {client.base_url} has no /v1/stats: it is an older Taskbone than this "
            "command; start it again in the same version"
        )
    if status != 200:
        raise _refusal(status, body, "metrics")
    try:
        return Sample.model_validate(body)
    except ValidationError as error:
        raise ClientError(
            f"the server at {client.base_url} counts in another way than this command reads "
            f"({describe(error)}); use both in the same version"
        ) from None


def unknown_task(task: str, there: Sequence[str]) -> ClientError:
    """The error for a task that a server does not have."""
    names = ", ".join(there) or "none yet"
    return ClientError(f"the server has no task {task[:80]!r}; it has: {names}")


def _predict(client: httpx.Client, task: str, inputs: Sequence[TextInput]) -> dict[str, Any]:
    path = f"/v1/tasks/{quote(task, safe='')}/predict"
    wanted = {"predictions", "timings_ms", "version"}
    status, body = _json(client, client.post(path, json={"inputs": inputs}), wanted)
    if status == 200:
        return body
    if body["error"].get("type") == "unknown_task":
        raise unknown_task(task, list(tasks(client)))
    raise _refusal(status, body, "predict")


def _refusal(status: int, body: dict[str, Any], scope: str) -> ClientError:
    message = f"{body['error']['message']} (HTTP status {status})"
    if status == 403 and scope in message:
        message += (
            f"; make a key that may with: taskbone keys add NAME --scope {scope}, and give it with "
            "--token"
        )
    return UnreachableError(message) if status in BUSY else ClientError(message)


def _json(
    client: httpx.Client, response: httpx.Response, wanted: set[str]
) -> tuple[int, dict[str, Any]]:
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
    if not isinstance(body, dict) or not (
        wanted <= body.keys() if response.status_code == 200 else _is_error(body)
    ):
        # A front door that stands alone for a moment answers for itself.
        kind = UnreachableError if response.status_code in BUSY else ClientError
        raise kind(
            f"what answers at {client.base_url} is no Taskbone server (HTTP status "
            f"{response.status_code}); name the right one with --url"
        )
    return response.status_code, body


def _is_error(body: dict[str, Any]) -> bool:
    return isinstance(body.get("error"), dict) and "message" in body["error"]
