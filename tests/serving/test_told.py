"""The real server, traced, logging JSON at DEBUG: what it tells of each request, and that it tells
nothing of what was sent."""

import itertools
import json
import shutil
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest

from model_store import artifact
from model_store.backbone import Backbone
from model_store.store import Store
from serving.protocols.grpc_messages import MESSAGES
from tests.overlays import random_overlay
from tests.running import ADMIN_TOKEN, TOKEN, Server, free_port, running
from tests.serving.collector import Collector, attributes_of, collecting
from tests.serving.told_server import CRASH, ENGINE
from tests.waiting import wait_until

MARK = "Zebrafink"
"""Stands in everything that a client says."""
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
MOOD = "/v1/tasks/mood/predict"


@dataclass(frozen=True)
class Told:
    """A running server, its gRPC port, and where its spans go."""

    server: Server
    grpc_port: int
    collector: Collector

    def lines(self, request_id: str = "") -> list[dict[str, Any]]:
        """What it has logged, or what of it is about one request."""
        whole = self.server.output.rpartition("\n")[0]
        found: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]
        return [one for one in found if not request_id or one.get("request_id") == request_id]

    def spans(self, trace_id: str) -> list[Any]:
        """What has come of one trace."""
        return [span for span in self.collector.spans if span.trace_id.hex() == trace_id]


def publish(store: Store, backbone: Backbone, task: str, **settings: Any) -> None:
    data = artifact.write(random_overlay(backbone, task, **settings))
    store.publish(artifact.verify(data, backbone.config, backbone.fingerprint))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, tiny: tuple[Store, Backbone]) -> Iterator[Told]:
    """A server with two replicas. It must end well, with every line whole."""
    folder = tmp_path_factory.mktemp("told")
    shutil.copytree(tiny[0].root, folder / "store")
    store = Store(folder / "store")
    publish(store, tiny[1], "mood")
    publish(store, tiny[1], "same", pairs=True, labels=("no", "yes"))
    port, grpc_port = free_port(), free_port()
    with collecting() as collector:
        settings = {
            "log_format": "json",
            "otlp_endpoint": collector.url,
            "replicas": 2,
            "grpc_port": grpc_port,
            "max_queue_ms": 60_000,
        }
        command = ["-m", "tests.serving.told_server", str(store.root), str(port)]
        command.append(json.dumps(settings))
        environment = {"OTEL_BSP_SCHEDULE_DELAY": "50", "NO_PROXY": "127.0.0.1"}
        with running(command, port, folder / "log", environment) as server:
            yield Told(server, grpc_port, collector)
            assert server.stop(signal.SIGINT) == []
            said = Told(server, grpc_port, collector).lines()
            assert any(line["message"].startswith("SIGINT") for line in said)


def ask(told: Told, method: str, path: str, **request: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {TOKEN}"} | request.pop("headers", {})
    return told.server.ask(method, path, headers=headers, **request)


def test_a_request_is_a_tree_of_spans_in_its_callers_trace(told: Told) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "traced"}
    inputs = [f"{MARK} is good", f"{MARK} is bad"]
    answer = ask(told, "POST", MOOD, json={"inputs": inputs}, headers=headers)
    assert answer.status_code == 200
    wait_until(lambda: len(told.spans(TRACE)) == 4)
    named = {span.name: span for span in told.spans(TRACE)}
    request = named["POST /v1/tasks/{task}/predict"]
    assert request.parent_span_id.hex() == PARENT
    about = attributes_of(request)
    assert about["taskbone.request_id"] == "traced"
    assert (about["taskbone.task"], about["taskbone.version"]) == ("mood", 1)
    assert (about["taskbone.sequences"], about["http.response.status_code"]) == (2, 200)
    assert about["taskbone.tokens"] == answer.json()["tokens"]
    for name in ("tokenize", "queue", "forward"):
        assert named[name].parent_span_id == request.span_id
    in_turn = [named[name] for name in ("tokenize", "queue", "forward")]
    assert request.start_time_unix_nano <= in_turn[0].start_time_unix_nano
    for before, after in itertools.pairwise(in_turn):
        assert before.start_time_unix_nano <= before.end_time_unix_nano
        assert before.end_time_unix_nano <= after.start_time_unix_nano
    assert in_turn[-1].end_time_unix_nano <= request.end_time_unix_nano
    (link,) = named["forward"].links

    def batch() -> Any:
        (span,) = told.spans(link.trace_id.hex()) or [None]
        return span

    wait_until(lambda: batch() is not None)
    assert (batch().name, batch().span_id, batch().parent_span_id) == ("batch", link.span_id, b"")
    assert {one.span_id for one in batch().links} == {request.span_id}
    assert attributes_of(batch())["taskbone.batch.sequences"] == 2
    assert attributes_of(batch())["taskbone.batch.tokens"] == answer.json()["tokens"]
    forward_ns = named["forward"].end_time_unix_nano - named["forward"].start_time_unix_nano
    assert abs(forward_ns / 1e6 - answer.json()["timings_ms"]["forward_ms"]) < 0.1


def test_all_that_is_logged_of_a_request_says_so(told: Told) -> None:
    headers = {"traceparent": f"00-{'1' * 32}-{PARENT}-01", "x-request-id": "failing"}
    text = f"{CRASH} {MARK}"
    assert ask(told, "POST", MOOD, json={"inputs": text}, headers=headers).status_code == 500
    wait_until(lambda: len(told.lines("failing")) == 2)
    failure, access = told.lines("failing")
    assert (failure["level"], failure["message"]) == ("ERROR", "request failing failed")
    assert "KeyError: (not shown" in failure["exception"]
    assert "ValueError: (not shown" in failure["exception"]
    assert "told_server.py" in failure["exception"]
    assert (access["logger"], access["status"], access["task"]) == ("taskbone.access", 500, "mood")
    for line in (failure, access):
        assert line["trace_id"] == "1" * 32
    processes = {one["pid"] for one in told.lines() if one["logger"] == "taskbone.access"}
    assert processes <= {process.pid for process in told.server.replicas()}


def test_what_a_batch_failed_of_is_under_the_id_of_its_request(told: Told) -> None:
    headers = {"x-request-id": "no-forward"}
    text = f"{ENGINE} {MARK}"
    assert ask(told, "POST", MOOD, json={"inputs": text}, headers=headers).status_code == 500
    wait_until(lambda: len(told.lines("no-forward")) == 2)
    exception = told.lines("no-forward")[0]["exception"]
    assert "RuntimeError: the forward has failed as it was told" in exception
    assert "EngineError: the forward failed: RuntimeError" in exception


def speak(told: Told) -> int:
    """Say the mark in every way, to everybody: well, wrongly, and so that it fails. Counts."""
    said = 0
    texts = [f"{MARK} is good", f"{CRASH} {MARK}", f"{ENGINE} {MARK}", MARK * 2000]
    bodies: list[tuple[str, Any]] = []
    for text in texts:
        oip = [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [text]}]
        bodies += [
            (MOOD, {"inputs": text}),
            (MOOD, {"inputs": [text, text], "truncate": False}),
            ("/v1/tasks/mood/versions/1/predict", {"inputs": text}),
            ("/v1/tasks/mood/versions/9/predict", {"inputs": text}),
            ("/v1/tasks/same/predict", {"inputs": [[text, text]]}),
            ("/v1/tasks/same/predict", {"inputs": text}),
            (f"/v1/tasks/{MARK}/predict", {"inputs": text}),
            (MOOD, {"inputs": text, MARK: MARK}),
            (MOOD, {MARK: text}),
            (MOOD, [text]),
            ("/v1/predict", {"tasks": ["mood"], "inputs": text}),
            ("/v1/predict", {"tasks": "*", "inputs": [[text, text]]}),
            ("/v1/predict", {"tasks": [MARK], "inputs": text}),
            ("/v2/models/mood/infer", {"inputs": oip}),
            ("/v2/models/mood/infer", {"inputs": [{**oip[0], "datatype": MARK}]}),
            (f"/v2/models/{MARK}/infer", {"inputs": oip}),
            ("/classify", {"model": "mood", "input": text}),
            ("/classify", {"model": MARK, "input": text, "truncate_prompt_tokens": -1}),
            ("/predict", {"inputs": text}),
            ("/predict", {"inputs": [[text, text]], MARK: 1}),
            (f"/{MARK}", {"inputs": text}),
        ]
    ways: tuple[dict[str, str], ...] = (
        {},
        {"x-task": "mood"},
        {"x-task": MARK},
        {"x-deadline-ms": "1"},
        {"x-deadline-ms": MARK},
    )
    with httpx.Client(base_url=told.server.address, trust_env=False, timeout=60) as client:
        client.headers["authorization"] = f"Bearer {ADMIN_TOKEN}"
        client.headers["user-agent"] = MARK
        for path, body in bodies:
            said += bool(client.post(path, json=body))
        for way in ways:
            said += bool(client.post("/predict", json={"inputs": texts[0]}, headers=way))
            said += bool(client.post(MOOD, json={"inputs": texts[0]}, headers=way))
        for content in (f'{{"inputs": "{MARK}', f'"{MARK}"', f'{{"inputs": "{MARK}\ud800"}}'):
            said += bool(client.post(MOOD, content=content.encode(errors="surrogatepass")))
        said += bool(client.get("/v1/tasks", headers={"authorization": f"Bearer {MARK}"}))
        for query in (f"token={MARK}", f"{MARK}=1"):
            said += bool(client.get(f"/docs?{query}", headers={"authorization": ""}))
            said += bool(client.get(f"/v1/tasks/mood?{query}"))
            said += bool(client.post(f"{MOOD}?{query}", json={"inputs": MARK}))
        said += bool(client.request(MARK.upper(), "/v1/tasks"))
        said += bool(client.patch("/v1/tasks/mood", json=MARK))
        said += bool(client.post(f"/v1/tasks/{MARK}/versions", content=MARK.encode()))
        said += bool(client.post("/v1/tasks/mood/versions", content=MARK.encode()))
        said += bool(client.put("/v1/tasks/mood/shadow", json={"version": MARK}))
        said += bool(client.get("/metrics", headers={"traceparent": MARK}))
        tracestate = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": f"a=b,=,{MARK}"}
        said += bool(client.get("/v1/tasks", headers=tracestate))
    return said


def hang_up(told: Told) -> None:
    """Break off in the middle of a body, and before its answer."""
    body = json.dumps({"inputs": MARK}).encode()
    for length in (len(body), 1000):
        with socket.create_connection(("127.0.0.1", told.server.port)) as one:
            head = (
                f"POST {MOOD} HTTP/1.1\r\nhost: here\r\nauthorization: Bearer {TOKEN}\r\n"
                f"content-length: {length}\r\n\r\n"
            )
            one.sendall(head.encode() + body)


def call(told: Told) -> list[grpc.StatusCode]:
    """The same over gRPC."""
    found = []
    with grpc.insecure_channel(f"127.0.0.1:{told.grpc_port}") as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=MESSAGES["ModelInferRequest"].SerializeToString,
            response_deserializer=MESSAGES["ModelInferResponse"].FromString,
        )
        for text in (MARK, f"{CRASH} {MARK}", f"{ENGINE} {MARK}"):
            for task in ("mood", "same", MARK):
                tensor = {"name": "text", "datatype": "BYTES", "shape": [1]}
                request = MESSAGES["ModelInferRequest"](
                    model_name=task,
                    inputs=[tensor | {"contents": {"bytes_contents": [text.encode()]}}],
                )
                metadata = (("authorization", f"Bearer {TOKEN}"), ("traceparent", MARK))
                try:
                    infer(request, metadata=metadata, timeout=60)
                    found.append(grpc.StatusCode.OK)
                except grpc.RpcError as error:
                    found.append(error.code())
    return found


def test_nothing_that_a_client_says_is_told(told: Told) -> None:
    """In no line, no span and no file, whatever it says, wherever, and whatever comes of it."""
    before = len(told.lines())
    speak(told)
    hang_up(told)
    codes = call(told)
    assert {grpc.StatusCode.OK, grpc.StatusCode.INTERNAL, grpc.StatusCode.NOT_FOUND} <= set(codes)
    last = {"x-request-id": "last", "traceparent": f"00-{'2' * 32}-{PARENT}-01"}
    for _ in range(8):  # both replicas
        ask(told, "GET", "/v1/tasks", headers=last)
    wait_until(lambda: len(told.spans("2" * 32)) == 8)
    wait_until(lambda: len(told.lines("last")) == 8)
    access = [one for one in told.lines()[before:] if one["logger"] == "taskbone.access"]
    statuses = {one["status"] for one in access}
    assert {200, 401, 404, 405, 422, 500} <= statuses
    assert len(access) > 110
    routes = {one["route"] for one in access}
    assert {"/predict", "/classify", "/v2/models/{task}/infer", "/v1/predict"} <= routes
    assert MARK.lower() not in told.server.output.lower()
    for secret in (TOKEN, ADMIN_TOKEN, ENGINE + " "):
        assert secret not in told.server.output
    assert len(told.collector.spans) > 200
    for body in told.collector.bodies:
        assert MARK.lower().encode() not in body.lower()
        assert TOKEN.encode() not in body
    files = [path for path in told.server.folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if MARK.lower().encode() in path.read_bytes().lower()] == []


def test_processes_are_told_apart(told: Told) -> None:
    for _ in range(20):
        ask(told, "GET", "/v1/tasks")
    wait_until(lambda: len(told.collector.resources) > 0)
    for one in told.collector.resources:
        assert one["service.name"] == "taskbone"
        assert one["service.instance.id"]


def test_the_server_itself_says_where_it_is_without_its_key(told: Told) -> None:
    message = next(one for one in told.lines() if "Taskbone answers at" in one["message"])
    assert (message["logger"], message["level"]) == ("taskbone.server", "INFO")
    assert TOKEN not in message["message"]


def test_no_file_takes_up_what_is_logged(told: Told) -> None:
    """Lines go to the main process through a socket."""
    size = sum(path.stat().st_size for path in told.server.folder.rglob("*") if path.is_file())
    lines = len(told.lines())
    with httpx.Client(base_url=told.server.address, trust_env=False) as client:
        client.headers["authorization"] = f"Bearer {TOKEN}"
        for _ in range(500):
            client.get("/v1/tasks")
    wait_until(lambda: len(told.lines()) >= lines + 500)
    written = len(told.server.output)
    grown = sum(path.stat().st_size for path in told.server.folder.rglob("*") if path.is_file())
    assert written > 100_000
    assert grown - size < 50_000
