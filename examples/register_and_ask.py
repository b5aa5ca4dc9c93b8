"""Registers an artifact at a running server, tries it as a canary, has it answer, and goes back.

python examples/register_and_ask.py mood.safetensors --url http://127.0.0.1:8000 --key KEY

The key needs the scopes predict and admin.
"""

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

ASKED = 100
PERCENT = 25


def main() -> None:
    """All steps, each printed with what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the server is")
    parser.add_argument(
        "--key",
        default=os.environ.get("TASKBONE_ADMIN_TOKEN", ""),
        help="one that may predict, and change what is served",
    )
    arguments = parser.parse_args()
    data = arguments.artifact.read_bytes()
    manifest = manifest_of(data)
    task, question = manifest["task"], manifest["golden"][0]["input"]

    with httpx.Client(
        base_url=arguments.url, headers={"Authorization": f"Bearer {arguments.key}"}, timeout=60
    ) as server:
        # Checked, and tried on its golden inputs by every replica; it does not answer yet.
        taken = call(server, "POST", f"/v1/tasks/{task}/versions?activate=false", content=data)
        version = taken["version"]
        print(f"{task}: version {version} is there, {taken['status']}")

        versions = call(server, "GET", f"/v1/tasks/{task}/versions")["versions"]
        before = next((one["version"] for one in versions if one["active"]), None)
        if before == version:
            raise SystemExit(f"{task}: these very bytes are the active version; nothing to try")
        if before is not None:
            try_as_canary(server, task, version, question)

        call(server, "POST", f"/v1/tasks/{task}/activate", json={"version": version})
        print(f"{task}: version {ask(server, task, question)} answers")
        if before is not None:
            call(server, "POST", f"/v1/tasks/{task}/rollback")
            print(f"{task}: rolled back, version {ask(server, task, question)} answers")


def try_as_canary(server: httpx.Client, task: str, version: int, question: Any) -> None:
    """Let it answer a share of the requests, and count whose answers came."""
    call(server, "PUT", f"/v1/tasks/{task}/canary", json={"version": version, "percent": PERCENT})
    # The request id decides: the same id gets the same version from every replica.
    seen = Counter(ask(server, task, question, str(number)) for number in range(ASKED))
    call(server, "DELETE", f"/v1/tasks/{task}/canary")
    print(f"{task}: version {version} as a canary answered {seen[version]} of {ASKED} requests")


def ask(server: httpx.Client, task: str, question: Any, request_id: str = "") -> int:
    """The version that answers."""
    headers = {"x-request-id": request_id} if request_id else {}
    path = f"/v1/tasks/{task}/predict"
    version: int = call(server, "POST", path, json={"inputs": [question]}, headers=headers)[
        "version"
    ]
    return version


def call(server: httpx.Client, method: str, path: str, **request: Any) -> dict[str, Any]:
    """An answer's body; a refusal ends the program with the server's own words."""
    answer = server.request(method, path, **request)
    body: dict[str, Any] = answer.json()
    if answer.is_error:
        raise SystemExit(f"{answer.status_code}: {body['error']['message']}")
    return body


def manifest_of(data: bytes) -> dict[str, Any]:
    """What an artifact says of itself: a safetensors file begins with its header in JSON."""
    size = int.from_bytes(data[:8], "little")
    found: dict[str, Any] = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["taskbone"])
    return found


if __name__ == "__main__":
    main()
