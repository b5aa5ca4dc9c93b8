"""Where Prometheus is told to look: addresses that it can reach, and each node once."""

import socket
from pathlib import Path
from typing import Any

import pytest

from serving import targets
from serving.config import ServeConfig
from tests.serving.conftest import PREDICT_TOKEN, Served


def found(config: ServeConfig) -> list[str]:
    return [address for target in targets.targets(config) for address in target.targets]


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1:8000"),
        ("server.example", "server.example:8000"),
        ("::1", "[::1]:8000"),
        ("[::1]", "[::1]:8000"),
    ],
)
def test_a_server_alone_is_where_it_was_told_to_listen(
    host: str, address: str, tmp_path: Path
) -> None:
    assert found(ServeConfig(store=tmp_path, host=host)) == [address]


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_one_that_listens_everywhere_is_at_this_machines_address(host: str, tmp_path: Path) -> None:
    (address,) = found(ServeConfig(store=tmp_path, host=host, port=9000))
    name, _, port = address.rpartition(":")
    assert port == "9000"
    assert name not in ("0.0.0.0", "[::]", "")
    if name != socket.gethostname():
        with socket.socket() as probe:
            probe.bind((name, 0))  # which only an address of this machine can be


def test_without_a_network_it_is_at_this_machines_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut(socket.socket):
        def connect(self, address: Any) -> None:
            raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "socket", Cut)
    config = ServeConfig(store=tmp_path, host="0.0.0.0")
    assert found(config) == [f"{socket.gethostname()}:8000"]


def test_every_node_is_at_its_own_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[dict[str, Any]] = [
        {
            "NodeManagerAddress": "10.0.0.1",
            "NodeManagerHostname": "one",
            "Labels": {"taskbone-port": "8001"},
        },
        # Started by hand: its front door is where the server was told to listen.
        {"NodeManagerAddress": "10.0.0.2", "NodeManagerHostname": "two", "Labels": {}},
    ]
    monkeypatch.setattr(targets, "front_doors", lambda: nodes)
    config = ServeConfig(store=tmp_path, ray_address="10.0.0.1:6379", port=8080)
    assert targets.targets(config) == [
        targets.Target(("10.0.0.1:8001",), {"node": "one"}),
        targets.Target(("10.0.0.2:8080",), {"node": "two"}),
    ]


def test_the_route_tells_what_prometheus_takes(served: Served) -> None:
    answer = served.ask("GET", "/metrics/targets", token=PREDICT_TOKEN)
    assert answer.headers["content-type"] == "application/json"
    expected = [{"targets": ["127.0.0.1:8000"], "labels": {"node": socket.gethostname()}}]
    assert answer.json() == expected
