"""Every command of docs/signing.md, in its order, as a reader would type it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from examples.ready_made import OVERLAYS, prepare
from model_store import artifact
from model_store.store import Store
from tests.running import ADMIN_TOKEN, free_port, running

TEXT = (Path(__file__).parents[1] / "docs" / "signing.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
WRONG = "b3RoZXI="


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the artifact, and a store with the backbone that it is for."""
    if shutil.which("openssl") is None:
        pytest.skip("the program openssl is not installed")
    prepare(Store(tmp_path / "store"))
    data = (OVERLAYS / "sst2.safetensors").read_bytes()
    (tmp_path / "mood.safetensors").write_bytes(artifact.rename(data, "mood"))
    return tmp_path


def type_in(folder: Path, command: str) -> str:
    """What a block of commands prints."""
    environment = os.environ | {
        "ADMIN": ADMIN_TOKEN,
        "TASKBONE_STORE": str(folder / "store"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    shell = ["bash", "-euc", command]
    done = subprocess.run(
        shell, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_do_what_is_said(folder: Path) -> None:
    make_keys, sign, publish, upload = BLOCKS
    type_in(folder, make_keys)
    type_in(folder, sign)
    assert "mood: version 1 (active)" in type_in(folder, publish)
    port = free_port()
    upload = upload.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    serve = ["-m", "taskbone", "serve", "--store", str(folder / "store"), "--port", str(port)]
    key = str(folder / "team.pub")
    with running([*serve, "--signature-key", key], port, folder / "log"):
        assert json.loads(type_in(folder, upload))["created"] is False
        for other in ("", WRONG):
            refused = json.loads(type_in(folder, upload.replace("$(base64 -w0 mood.sig)", other)))
            assert refused["error"]["type"] == "invalid_signature"
