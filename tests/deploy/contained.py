"""A server run as the image would: another user, no capabilities, a root that is only read."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from model_store import artifact
from model_store.backbone import Backbone
from model_store.store import Store
from tests.deploy import image
from tests.overlays import random_artifact
from tests.running import Server, running

TASK = "mood"
USER = 10001
_WHO_MAY = "only root may make the namespace in which the root is read-only"


def make_place(folder: Path, tiny: tuple[Store, Backbone]) -> Path:
    """A folder with the application installed from its wheel, and a store with one task.

    Skips the test where the system lets no namespace be made.
    """
    probe = ["unshare", "--mount", "mount", "--make-rprivate", "/"]
    if shutil.which("unshare") is None or subprocess.run(probe, check=False).returncode:
        pytest.skip(_WHO_MAY)
    wheel = image.build_wheel(folder / "build" / "source")
    place = folder / "place"
    for name in ("app", "cache", "packages", "python"):
        (place / name).mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--target", place / "app", wheel], check=True)
    original, backbone = tiny
    shutil.copytree(original.root, place / "store")
    store = Store(place / "store")
    store.publish(
        artifact.verify(random_artifact(backbone, TASK), backbone.config, backbone.fingerprint)
    )
    for path in (place / "store", place / "cache", *(place / "store").rglob("*")):
        os.chown(path, USER, USER)
    return place


@contextmanager
def contained(place: Path, port: int, log: Path) -> Iterator[Server]:
    """Start `taskbone serve` in that place, as the image starts it."""
    settings = {
        **image.environment(),
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/srv/cache",
        "TASKBONE_CACHE": "/srv/cache",
        "TASKBONE_STORE": "/srv/store",
        "PYTHONPATH": "/srv/app:/srv/packages",
        "LD_LIBRARY_PATH": "/srv/python/lib",
    }
    script = Path(__file__).with_name("contained.sh")
    python = f"/srv/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    command = [
        *("unshare", "--mount", "--", script, place),
        *(sys.base_prefix, sysconfig.get_path("purelib")),
        *(python, "/srv/app/bin/taskbone", "serve", "--port", port),
        # The answers are compared with fp32, and on a busy machine nothing shall be refused.
        *("--precision", "fp32", "--engine-threads", 1, "--max-queue-ms", 60_000),
    ]
    words = [str(word) for word in command]
    with running(words, port, log, settings, program=[]) as server:
        yield server
