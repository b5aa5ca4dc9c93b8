"""Every block of the README does what it says, and its map names every file."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.ready_made import OVERLAYS, prepare
from localization.config import TaskConfig
from model_store import artifact
from model_store.store import Store
from tests.running import ADMIN_TOKEN, TOKEN, Server, free_port, running

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server with the ready-made tasks, and the folder that a reader would be in."""
    folder = tmp_path_factory.mktemp("reader")
    store = Store(folder / ".taskbone")
    prepare(store)
    (folder / ".taskbone" / "token").write_text(TOKEN)
    artifact_file = folder / "runs" / "mood" / "mood.safetensors"
    artifact_file.parent.mkdir(parents=True)
    data = (OVERLAYS / "sst2.safetensors").read_bytes()
    artifact_file.write_bytes(artifact.rename(data, "mood"))
    port = free_port()
    command = ["-m", "taskbone", "serve", "--store", str(store.root), "--port", str(port)]
    with running(command, port, folder / "log") as server:
        yield server, folder
        assert server.stop(signal.SIGINT) == []


def run(place: tuple[Server, Path], *command: str) -> str:
    """What a command prints, run as the reader would, but for the port."""
    server, folder = place
    mended = [word.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}") for word in command]
    environment = os.environ | {"TOKEN": TOKEN, "ADMIN": ADMIN_TOKEN}
    done = subprocess.run(
        mended, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_curl_line_gives_the_answer_that_is_shown(place: tuple[Server, Path]) -> None:
    given: dict[str, Any] = json.loads(run(place, "bash", "-euc", blocks("bash")[0]))
    (shown,) = (json.loads(block) for block in blocks("json"))
    assert given.keys() == shown.keys()
    assert given["timings_ms"].keys() == shown["timings_ms"].keys()
    assert given["version"] == shown["version"]
    mine, theirs = given["predictions"][0], shown["predictions"][0]
    assert mine["label"] == theirs["label"]
    assert mine["scores"] == pytest.approx(theirs["scores"], abs=0.06)


def test_the_python_block_prints_a_label(place: tuple[Server, Path]) -> None:
    (block,) = blocks("python")
    assert run(place, sys.executable, "-c", block).strip() in ("equivalent", "not_equivalent")


def test_the_upload_is_taken(place: tuple[Server, Path]) -> None:
    answer = json.loads(run(place, "bash", "-euc", blocks("bash")[1]))
    assert (answer["task"], answer["version"]) == ("mood", 1)


def example(place: tuple[Server, Path], name: str, *arguments: str) -> list[str]:
    """The lines that an example prints."""
    file = str(ROOT / "examples" / f"{name}.py")
    return run(place, sys.executable, file, *arguments, "--url", place[0].address).splitlines()


def test_one_text_for_all_tasks(place: tuple[Server, Path]) -> None:
    *lines, total = example(place, "many_tasks", "A warm, funny film.", "--key", TOKEN)
    answers = dict(line.split()[:2] for line in lines)
    assert answers["sst2"] == "positive"
    assert {"agnews", "banking77", "trec6"} <= answers.keys()
    assert "mrpc" not in answers  # it takes pairs
    assert total.startswith(f"{len(lines)} tasks in ")


def noted(data: bytes, note: str) -> bytes:
    """The same overlay as another file: with a note that no reader looks at."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["note"] = note
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + data[8 + size :]


def test_an_artifact_is_registered_tried_and_taken_back(place: tuple[Server, Path]) -> None:
    first = artifact.rename((OVERLAYS / "sst2.safetensors").read_bytes(), "tone")
    file = place[1] / "tone.safetensors"
    file.write_bytes(first)
    lines = example(place, "register_and_ask", str(file), "--key", ADMIN_TOKEN)
    assert lines == ["tone: version 1 is there, ready 1/1", "tone: version 1 answers"]
    file.write_bytes(noted(first, "the second"))
    _, canary, active, back = example(place, "register_and_ask", str(file), "--key", ADMIN_TOKEN)
    (asked,) = re.findall(r"version 2 as a canary answered (\d+) of 100 requests", canary)
    assert 10 <= int(asked) <= 45
    assert active == "tone: version 2 answers"
    assert back == "tone: rolled back, version 1 answers"


def test_the_task_file_is_valid() -> None:
    (block,) = blocks("yaml")
    config = TaskConfig.model_validate(yaml.safe_load(block))
    assert config.task == "mood"
    assert config.budget.margin == 0.5
    for verbalized in re.findall(r"`(template: .*?)`", README):
        assert TaskConfig.model_validate(
            yaml.safe_load(block)
            | yaml.safe_load(verbalized)
            | yaml.safe_load("verbalizer: {good: great, bad: terrible}")
        )


def test_the_map_names_every_file() -> None:
    packages = ("model_store", "localization", "serving")
    files = [
        file
        for package in packages
        for file in sorted((ROOT / package).rglob("*.py"))
        if file.name != "__init__.py"
    ]
    for package in packages:
        named = []
        for line in README[README.index(f"\n{package}/  ") + 1 :].splitlines()[1:]:
            if not line.startswith("  "):
                break
            named += re.findall(r"\w+\.py", line)
        there = {file.name for file in files if file.relative_to(ROOT).parts[0] == package}
        assert set(named) == there, package


def test_its_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
