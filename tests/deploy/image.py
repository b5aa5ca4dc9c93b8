"""The image's Dockerfile, taken apart, and what is built from it without a container engine."""

import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"


@dataclass(frozen=True)
class Instruction:
    """One instruction, and the number of its stage; before the first stage: -1."""

    stage: int
    name: str
    value: str


def instructions() -> list[Instruction]:
    """All of the Dockerfile, continued lines joined."""
    parser = DockerfileParser(fileobj=BytesIO(DOCKERFILE.read_bytes()))
    stage, found = -1, []
    for one in parser.structure:
        if one["instruction"] == "COMMENT":
            continue
        stage += one["instruction"] == "FROM"
        found.append(Instruction(stage, one["instruction"], one["value"]))
    return found


def last_stage(name: str) -> list[str]:
    """The values of one kind of instruction in the stage that runs."""
    all_of_it = instructions()
    last = all_of_it[-1].stage
    return [one.value for one in all_of_it if (one.stage, one.name) == (last, name)]


def environment() -> dict[str, str]:
    """The variables of what runs."""
    pairs = (pair for value in last_stage("ENV") for pair in value.split())
    return dict(pair.split("=", 1) for pair in pairs)


def sources() -> list[str]:
    """What is copied from the checkout."""
    copied = [one.value.split() for one in instructions() if one.name == "COPY"]
    return [name for words in copied if not words[0].startswith("--") for name in words[:-1]]


def make_context(folder: Path) -> None:
    """Put what an engine would be given into `folder`: what is tracked of the sources."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--", *sources()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in tracked.stdout.split("\0")[:-1]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def build_wheel(folder: Path) -> Path:
    """The wheel, as the image's first stage builds it from its context.

    The native forward is not compiled again: the compiler would find its own output of the
    checkout in its place, and leave it.
    """
    make_context(folder)
    kind = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    built = folder / "build" / kind / "model_store"
    built.mkdir(parents=True)
    for library in (ROOT / "model_store").glob("_native*.so"):
        shutil.copyfile(library, built / library.name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "..", "."],
        cwd=folder,
        check=True,
    )
    (wheel,) = folder.parent.glob("taskbone-*.whl")
    return wheel
