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
from tests.abuse.traffic import Timeline, traffic
from tests.abuse.variants import Variant, make_variants
from tests.deploy.contained import TASK, USER, contained, make_place
from tests.deploy.image import last_stage
from tests.running import Server, free_port

CLIENTS = 4


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
    flags = {line.split()[1]: line.split()[3].split(",") for line in mounts}
    assert {flags[path][0] for path in ("/", "/srv")} == {"ro"}
    assert "noexec" in flags["/tmp"]  # noqa: S108 - compared
    # Its own folder in /tmp, and nothing beside it.
    assert {path.name.rpartition("-")[0] for path in (root / "tmp").iterdir()} == {"taskbone"}


def test_the_check_of_the_image_tells_a_server_from_none(old: Server) -> None:
    assert is_healthy(old.port)
    assert not is_healthy(free_port())


def test_requests_move_to_a_new_server_and_back_without_one_lost(
    old: Server, place: Path, tiny: tuple[Store, Backbone], tmp_path: Path
) -> None:
    variants = make_variants(tiny[1], "moving", 2, seed=21)
    register(old, variants[0])
    with contained(place, free_port(), tmp_path / "new") as new:
        move(old, new, variants, version=1)
        # What is registered at one is in the store, and so there for all that follow.
        register(new, variants[1])
        with contained(place, old.port, tmp_path / "old-again") as old_again:
            move(new, old_again, variants, version=2)


def register(server: Server, variant: Variant) -> None:
    answer = server.admin("POST", "/v1/tasks/moving/versions", content=variant.data)
    assert answer.status_code == 201, answer.text
    assert answer.json()["version"] == variant.number + 1


def move(going: Server, coming: Server, variants: list[Variant], version: int) -> None:
    """Stop one server while clients ask it who know the other, too."""
    others = [(coming.host, coming.port)]
    with traffic(going.port, CLIENTS, {"moving": variants}, others=others) as seen:
        seen.wait_for(50)
        assert going.stop(signal.SIGTERM) == []
        seen.wait_for(50)
    assert seen.failed() == []
    right = {"moving": Timeline(frozenset([version]))}
    assert seen.wrong(right, {("moving", version): version - 1}) == []
