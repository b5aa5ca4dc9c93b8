"""The GPU's operations against plain torch: in Triton's interpreter here, on a GPU in `tests/gpu`.

The interpreter must be chosen before Triton is imported, and stays chosen in its process: where it
is not, this file runs itself in another one.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if find_spec("triton") is None:
    pytest.skip("Triton is not installed: make setup installs it", allow_module_level=True)


@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_in_tritons_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


if INTERPRETED:
    from tests.gpu_laws import *  # noqa: F403
