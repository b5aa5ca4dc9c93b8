"""The real server, asked by other people's clients, and by every example of docs/api.md."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.running import ADMIN_TOKEN, TOKEN, Server, free_port, running

DOCUMENT = (Path(__file__).parents[2] / "docs" / "api.md").read_text()


GRPC_PORT = free_port()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server around the fake service, and a folder to run commands in."""
    folder = tmp_path_factory.mktemp("clients")
    port = free_port()
    command = ["-m", "tests.serving.fake_server", str(folder / "store"), str(port), "good"]
    command.append(str(GRPC_PORT))
    with running(command, port, folder / "log") as server:
        yield server, folder


def register(server: Server, task: str, content: bytes) -> int:
    """The status of a new version's upload."""
    return server.admin("POST", f"/v1/tasks/{task}/versions", content=content).status_code


# --- Triton's client ------------------------------------------------------------------------------


@pytest.fixture
def client(place: tuple[Server, Path]) -> Iterator["Triton"]:
    """Triton's client, with the keys of the tests."""
    with Triton(place[0]) as client:
        yield client


class Triton:
    """Triton's own client, which takes a key with each call."""

    def __init__(self, server: Server) -> None:
        self.calls = triton.InferenceServerClient(f"127.0.0.1:{server.port}")

    def __enter__(self) -> "Triton":
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.close()

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.calls, name)
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        return lambda *given, **named: call(*given, headers=headers, **named)


def texts(values: list[str], name: str = "text", binary: bool = True) -> Any:
    """An input."""
    tensor = triton.InferInput(name, [len(values)], "BYTES")
    tensor.set_data_from_numpy(np.array(values, dtype=object), binary_data=binary)
    return tensor


def test_triton_knows_the_server_and_its_models(client: Triton) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("parity")
    assert client.is_model_ready("parity", "1")
    assert not client.is_model_ready("nothing")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("pairs")
    assert [one["name"] for one in metadata["inputs"]] == ["text", "text_pair"]


@pytest.mark.parametrize("binary", [True, False])
def test_triton_asks_with_tensors_of_both_kinds(client: Triton, binary: bool) -> None:
    wishes = [
        triton.InferRequestedOutput(name, binary_data=binary)
        for name in ("label", "score", "probabilities")
    ]
    answer = client.infer(
        "parity",
        [texts(["abc", "ab", "\N{SNOWMAN}"], binary=binary)],
        outputs=wishes,
        request_id="42",
    )
    labels = [text.decode() if binary else text for text in answer.as_numpy("label")]
    assert labels == ["odd", "even", "odd"]
    np.testing.assert_array_equal(answer.as_numpy("score"), np.ones(3, np.float32))
    np.testing.assert_array_equal(answer.as_numpy("probabilities"), [[0, 1], [1, 0], [0, 1]])
    response = answer.get_response()
    assert (response["id"], response["model_version"]) == ("42", "1")


def test_triton_asks_without_naming_outputs_and_for_pairs(client: Triton) -> None:
    answer = client.infer("pairs", [texts(["a"]), texts(["bc"], "text_pair")], timeout=5_000_000)
    assert answer.as_numpy("label").tolist() == [b"odd"]


def test_triton_reads_what_is_wrong(client: Triton) -> None:
    with pytest.raises(InferenceServerException, match="no task 'nothing'") as raised:
        client.infer("nothing", [texts(["a"])])
    assert raised.value.status() == "404"
    with pytest.raises(InferenceServerException, match="expected 'text'"):
        client.infer("parity", [texts(["a"], "words")])


def test_triton_loads_and_unloads(place: tuple[Server, Path], client: Triton) -> None:
    for content in (b"one", b"two"):
        assert register(place[0], "loaded", content) == 201
    client.load_model("loaded")
    assert client.infer("loaded", [texts(["a"])]).get_response()["model_version"] == "2"
    client.unload_model("loaded")
    assert not client.is_model_ready("loaded")
    states = [one for one in client.get_model_repository_index() if one["name"] == "loaded"]
    assert [one["state"] for one in states] == ["UNAVAILABLE", "UNAVAILABLE"]
    client.load_model("loaded")
    assert client.is_model_ready("loaded")


# --- Triton's client over gRPC --------------------------------------------------------------------


@pytest.fixture
def caller(place: tuple[Server, Path]) -> Iterator[Any]:
    """Triton's client for gRPC."""
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{GRPC_PORT}") as client:
        yield client


def grpc_texts(values: list[str]) -> Any:
    """An input."""
    tensor = triton_grpc.InferInput("text", [len(values)], "BYTES")
    tensor.set_data_from_numpy(np.array(values, dtype=object))
    return tensor


KEY = {"authorization": f"Bearer {ADMIN_TOKEN}"}


def test_triton_asks_over_grpc(caller: Any) -> None:
    assert caller.is_server_live()
    assert caller.is_model_ready("parity", headers=KEY)
    metadata = caller.get_model_metadata("pairs", headers=KEY)
    assert [one.name for one in metadata.inputs] == ["text", "text_pair"]
    answer = caller.infer(
        "parity",
        [grpc_texts(["abc", "ab"])],
        outputs=[triton_grpc.InferRequestedOutput(name) for name in ("label", "probabilities")],
        request_id="42",
        headers=KEY,
        parameters={"truncate": False},
    )
    assert answer.as_numpy("label").tolist() == [b"odd", b"even"]
    np.testing.assert_array_equal(answer.as_numpy("probabilities"), [[0, 1], [1, 0]])
    assert answer.get_response().id == "42"


@pytest.mark.parametrize(
    ("task", "text", "headers", "code"),
    [
        ("parity", "a", {}, "UNAUTHENTICATED"),
        ("parity", "a", {"authorization": "Bearer wrong"}, "UNAUTHENTICATED"),
        ("nothing", "a", KEY, "NOT_FOUND"),
        ("parity", "overload", KEY, "UNAVAILABLE"),
        ("parity", "crash", KEY, "INTERNAL"),
        ("parity", "a" * (3 << 20), KEY, "INVALID_ARGUMENT"),
        ("parity", "a" * (5 << 20), KEY, "RESOURCE_EXHAUSTED"),
    ],
    ids=lambda given: str(given)[:10],
)
def test_triton_reads_what_is_wrong_over_grpc(
    caller: Any, task: str, text: str, headers: dict[str, str], code: str
) -> None:
    with pytest.raises(InferenceServerException) as raised:
        caller.infer(task, [grpc_texts([text])], headers=headers)
    assert code in raised.value.status()
    assert "secret" not in raised.value.message()


def test_a_call_that_takes_too_long_is_given_up_on_both_sides(caller: Any) -> None:
    with pytest.raises(InferenceServerException, match="Deadline"):
        caller.infer("parity", [grpc_texts(["wait"])], headers=KEY, client_timeout=0.5)
    assert caller.infer("parity", [grpc_texts(["a"])], headers=KEY)


def test_triton_loads_and_unloads_over_grpc(place: tuple[Server, Path], caller: Any) -> None:
    assert register(place[0], "carried", b"one") == 201
    caller.unload_model("carried", headers=KEY)
    assert not caller.is_model_ready("carried", headers=KEY)
    states = {one.name: one.state for one in caller.get_model_repository_index(headers=KEY).models}
    assert states["carried"] == "UNAVAILABLE"
    caller.load_model("carried", headers=KEY)
    assert caller.is_model_ready("carried", headers=KEY)


# --- the examples of the documentation ------------------------------------------------------------

BASH = re.findall(r"^```bash\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)[1:]
PYTHON = re.findall(r"^```python\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def reader(place: tuple[Server, Path]) -> dict[str, Any]:
    """How a reader's commands are run: with a server that has the tasks of the examples."""
    server, folder = place
    for task in ("sst2", "agnews"):
        assert register(server, task, task.encode()) == 201
    (folder / "sst2.safetensors").write_bytes(b"another version")
    variables = {
        "URL": server.address,
        "GRPC": f"127.0.0.1:{GRPC_PORT}",
        "TOKEN": TOKEN,
        "ADMIN": ADMIN_TOKEN,
    }
    return {
        "cwd": folder,
        "env": os.environ | variables,
        "capture_output": True,
        "text": True,
    }


def curl_lines(block: str) -> list[str]:
    """The commands of a block, one each."""
    return [line for line in re.split(r"\n(?=curl|#)", block) if line.startswith("curl")]


@pytest.mark.parametrize("block", BASH, ids=range(len(BASH)))
def test_every_curl_example_is_answered(reader: dict[str, Any], block: str) -> None:
    commands = curl_lines(block)
    assert commands
    for command in commands:
        # The answer, and behind it its status.
        shown = command.replace("curl -s", "curl -s -w '\\n%{http_code}'", 1)
        done = subprocess.run(["bash", "-euc", shown], check=True, **reader)
        body, _, status = done.stdout.rpartition("\n")
        assert status in ("200", "201"), command + body
        assert "error" not in json.loads(body) or json.loads(body)["error"] is None


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_every_python_example_prints_labels(reader: dict[str, Any], block: str) -> None:
    done = subprocess.run([sys.executable, "-c", block], check=True, **reader)
    assert "b'odd'" in done.stdout


def test_the_document_names_every_status_and_every_protocol() -> None:
    for word in ("408", "409", "429", "504", "/v2/models", "/classify", "/predict", "/v1/predict"):
        assert word in DOCUMENT
