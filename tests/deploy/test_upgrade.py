"""The image's server, run as the image would run it, and one that takes another's place: no request
is lost on the way there and back."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_store.backbone import Backbone
from model_store.store import Store
from tests.abuse.traffic import Timeline, Traffic, traffic
from tests.abuse.variants import make_variants
from tests.deploy.contained import TASK, USER, contained, make_place
from tests.deploy.image import last_stage
from tests.running import Server, free_port

CLIENTS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny: tuple[Store, Backbone]) -> Path:
    return make_place(tmp_path_factory.mktemp("image"), tiny)


@pytest.fixture(scope="module")
def old(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that is there."""
    with contained(place, free_port(), tmp_path_factory.mktemp("old") / "log") as server:
        yield server


def is_healthy(port: int) -> bool:
    """What the image's own check says of a server at that port."""
    (check,) = last_stage("HEALTHCHECK")
    command = json.loads(check.partition(" CMD ")[2])
    assert command[0] == "python"
    words = [word.replace(":8000/", f":{port}/") for word in command[1:]]
    done = subprocess.run([sys.executable, *words], capture_output=True, check=False)
    return done.returncode == 0


def test_it_answers_without_rights_and_writes_where_it_may(old: Server) -> None:
    assert old.predict(TASK, "the film was good").status_code == 200
    status = Path(f"/proc/{old.process.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert set(fields["Uid"].split()) == {str(USER)}
    assert int(fields["CapBnd"], 16) == int(fields["CapEff"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    root = Path(f"/proc/{old.process.pid}/root")
    mounts = Path(f"/proc/{old.process.pid}/mounts").read_text().splitlines()
    flags = {line.split()[1]: line.split()[3].split(",")[0] for line in mounts}
    assert {flags[path] for path in ("/", "/srv")} == {"ro"}
    # Its own folder in /tmp, and nothing beside it.
    assert {path.name.rpartition("-")[0] for path in (root / "tmp").iterdir()} == {"taskbone"}


def test_the_check_of_the_image_tells_a_server_from_none(old: Server) -> None:
    assert is_healthy(old.port)
    assert not is_healthy(free_port())


def test_requests_move_to_a_new_server_and_back_without_one_lost(
    old: Server, place: Path, tiny: tuple[Store, Backbone], tmp_path: Path
) -> None:
    backbone = tiny[1]
    variants = {"moving": make_variants(backbone, "moving", 2, seed=21)}
    first, second = variants["moving"]
    timelines = {"moving": Timeline(frozenset([1]))}
    register(old, first.data, 1)
    new_port = free_port()
    doors = [("127.0.0.1", new_port)]
    with traffic(old.port, CLIENTS, variants, others=doors) as seen:
        seen.wait_for(100)
        with contained(place, new_port, tmp_path / "new") as new:
            assert old.stop(signal.SIGTERM) == []
            seen.wait_for(100)
            # Both have the same store: what is registered at one is there for all that follow.
            timelines["moving"].changing(frozenset([2]))
            register(new, second.data, 2)
            timelines["moving"].changed(frozenset([2]))
            seen.wait_for(100)
            with contained(place, old.port, tmp_path / "old-again"):
                assert new.stop(signal.SIGTERM) == []
                seen.wait_for(100)
                end(seen)
    assert seen.failed() == []
    assert seen.wrong(timelines, {("moving", 1): 0, ("moving", 2): 1}) == []


def register(server: Server, data: bytes, version: int) -> None:
    answer = server.admin("POST", "/v1/tasks/moving/versions", content=data)
    assert answer.status_code == 201, answer.text
    assert answer.json()["version"] == version


def end(seen: Traffic) -> None:
    """Have the clients end before the last server does."""
    seen.ending.set()
