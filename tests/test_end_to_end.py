"""The real `taskbone serve` with the real backbone and the ready-made overlays, start to end."""

import re
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from examples.ready_made import OVERLAYS, prepare
from model_store import artifact
from model_store.manifest import Manifest, read_header
from model_store.store import Store
from tests.running import TOKEN, Server, free_port, running
from tests.serving.test_api import error_of
from tests.waiting import wait_until

BF16_TOLERANCE = 0.06
"""How far a probability may be from its fp32 value, on a processor that computes in bf16."""


@pytest.fixture(scope="module")
def overlays() -> dict[str, bytes]:
    """The ready-made artifacts' bytes, by task."""
    files = {path.stem: path.read_bytes() for path in sorted(OVERLAYS.glob("*.safetensors"))}
    assert files, f"{OVERLAYS} holds no .safetensors file: nothing to serve"
    return files


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with the backbone and the ready-made overlays."""
    prepare(Store(tmp_path / "store"))
    return tmp_path / "store"


@contextmanager
def taskbone_serve(store: Path, *options: str) -> Iterator[Server]:
    """The command, on a free port."""
    port = free_port()
    command = ["-m", "taskbone", "serve", "--store", str(store), "--port", str(port), *options]
    with running(command, port, store.parent / "log") as server:
        yield server


def manifest_of(data: bytes) -> Manifest:
    """An artifact's manifest."""
    return read_header(data)[0]


def check_answers(server: Server, task: str, manifest: Manifest) -> None:
    """The golden inputs are answered, as one request and one by one, as the artifact promises."""
    inputs = [golden.input for golden in manifest.golden]
    together = server.predict(task, inputs)
    assert together.status_code == 200, together.text
    body = together.json()
    assert body["task"] == task
    assert len(body["predictions"]) == len(inputs)
    for golden, prediction in zip(manifest.golden, body["predictions"], strict=True):
        expected = dict(zip(manifest.labels, golden.scores, strict=True))
        assert prediction["scores"] == pytest.approx(expected, abs=BF16_TOLERANCE)
        assert prediction["label"] == max(prediction["scores"], key=prediction["scores"].get)
        assert prediction["score"] == prediction["scores"][prediction["label"]]
    alone = server.predict(task, inputs[:1]).json()["predictions"][0]
    assert alone["scores"] == pytest.approx(body["predictions"][0]["scores"], abs=BF16_TOLERANCE)


def check_protocols(server: Server, task: str) -> None:
    """One text is answered alike by every protocol, alone and among many tasks."""
    text = "a film that I did not want to end"
    alone = server.predict(task, text).json()["predictions"][0]
    many = server.ask("POST", "/v1/predict", json={"tasks": "*", "inputs": text}).json()
    assert many["results"][task]["predictions"][0]["scores"] == pytest.approx(
        alone["scores"], abs=BF16_TOLERANCE
    )
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}
    infer = server.ask("POST", f"/v2/models/{task}/infer", json={"inputs": [tensor]}).json()
    assert infer["outputs"][0]["data"] == [alone["label"]]
    classified = server.ask("POST", "/classify", json={"model": task, "input": text}).json()
    assert classified["data"][0]["label"] == alone["label"]
    key = {"authorization": f"Bearer {TOKEN}"}
    sent = {"json": {"inputs": text}, "headers": key | {"x-task": task}}
    assert server.ask("POST", "/predict", **sent).json()[0]["label"] == alone["label"]
    (model, *_) = server.ask("GET", "/v1/models").json()["data"]
    assert model["parent"] == "all-MiniLM-L6-v2"


def check_errors(server: Server, task: str) -> None:
    """What a client does wrong is said in one shape."""
    path = f"/v1/tasks/{task}/predict"
    error_of(server.ask("POST", path, headers={}, json={"inputs": "a"}), 401)
    error_of(server.predict("no-such-task", "a"), 404)
    error_of(server.ask("GET", path), 405)
    error_of(server.ask("POST", path, content=b" " * (3 * 1024 * 1024)), 413)
    error_of(server.predict(task, ["a"] * 129), 413)
    error_of(server.ask("POST", path, content=b'{"inputs": '), 422)
    error_of(server.predict(task, [["a", "b", "c"]]), 422)
    error_of(server.admin("POST", f"/v1/tasks/{task}/versions", content=b"not an artifact"), 422)


def test_one_server_from_start_to_end(store: Path, overlays: dict[str, bytes]) -> None:
    with taskbone_serve(store) as server:
        described = server.ask("GET", "/v1/tasks").json()["tasks"]
        assert {task["task"] for task in described} == set(overlays)
        for task, data in overlays.items():
            check_answers(server, task, manifest_of(data))

        source = next(iter(overlays))
        seventh = artifact.rename(overlays[source], "seventh")
        first = server.admin("POST", "/v1/tasks/seventh/versions", content=seventh)
        assert (first.status_code, first.json()["version"]) == (201, 1), first.text
        again = server.admin("POST", "/v1/tasks/seventh/versions", content=seventh)
        assert (again.status_code, again.json()["digest"]) == (200, first.json()["digest"])
        assert (first.json()["status"], again.json()["created"]) == ("ready 1/1", False)
        check_answers(server, "seventh", manifest_of(seventh))
        # Two predictions, and the second upload.
        assert server.metric("taskbone_requests_total", task="seventh", code="200") == 3
        assert server.metric("taskbone_registrations_total", result="created") == 1
        assert server.metric("taskbone_queue_duration_seconds_count", task="seventh") == 2
        assert server.metric("taskbone_batch_sequences_sum") >= 2

        wrong_name = server.admin("POST", "/v1/tasks/eighth/versions", content=seventh)
        assert "seventh" in error_of(wrong_name, 422)["message"]
        check_protocols(server, "sst2")
        check_errors(server, "seventh")
        assert server.predict(source, "text" if not _pairs(overlays[source]) else [["a", "b"]])
        folder = server.folder
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, "nobody else may look in"
        assert server.stop(signal.SIGINT) == []
    assert server.process.returncode == 0
    assert not folder.exists()
    assert "seventh" in Store(store).tasks()


def test_every_replica_answers_with_a_new_version_at_once(
    store: Path, overlays: dict[str, bytes]
) -> None:
    single = [task for task, data in overlays.items() if not _pairs(data)]
    task, other = single[0], single[1]
    replacement = artifact.rename(overlays[other], task)
    with taskbone_serve(store, "--replicas", "2") as server:
        replicas = [item for item in server.descendants() if "ServeReplica" in item.name()]
        assert len(replicas) == 2
        during: list[tuple[int, int]] = []
        done = threading.Event()

        def keep_asking() -> None:
            while not done.is_set():
                answer = server.predict(task, "what is this about?")
                during.append((answer.status_code, answer.json()["version"]))

        asking = threading.Thread(target=keep_asking)
        asking.start()
        try:
            upload = server.admin("POST", f"/v1/tasks/{task}/versions", content=replacement)
        finally:
            done.set()
            asking.join()
        assert (upload.status_code, upload.json()["version"]) == (201, 2), upload.text
        assert set(during) <= {(200, 1), (200, 2)}

        answers = [server.predict(task, "what is this about?").json() for _ in range(40)]
        assert {answer["version"] for answer in answers} == {2}
        labels = set(manifest_of(overlays[other]).labels)
        assert all(set(answer["predictions"][0]["scores"]) == labels for answer in answers)
        # The upload itself is answered 201.
        asked = float(len(during) + 40)
        wait_until(lambda: server.metric("taskbone_requests_total", task=task, code="200") == asked)
        counted = {
            server.metric("taskbone_requests_total", task=task, code="200") for _ in range(10)
        }
        assert counted == {asked}
        new = server.metric("taskbone_requests_total", task=task, version="2", code="200")
        assert new == 40 + during.count((200, 2))
        assert server.stop(signal.SIGTERM) == []


def _pairs(data: bytes) -> bool:
    return manifest_of(data).takes_pairs


def test_the_demo_shows_every_task_answering(tmp_path: Path, overlays: dict[str, bytes]) -> None:
    """What `make run` starts."""
    port = free_port()
    settings = {"TASKBONE_STORE": str(tmp_path / "store"), "TASKBONE_PORT": str(port)}
    with running(["examples/demo.py"], port, tmp_path / "log", settings, "Ctrl-C stops") as server:
        table = server.output.split("Every task, answered from one backbone")[1]
        for task, data in overlays.items():
            (line,) = (line for line in table.splitlines() if f" {task} " in line)
            assert any(label in line for label in manifest_of(data).labels), line
        (key,) = re.findall(f"^{server.address}/#token=(\\S+)$", table, re.MULTILINE)
        headers = {"authorization": f"Bearer {key}"}
        assert server.ask("GET", "/v1/tasks", headers=headers).status_code == 200
        assert server.stop(signal.SIGINT) == []
    assert server.process.returncode == 0
