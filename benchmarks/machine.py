"""What a figure was measured on: written beside every figure."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def facts() -> dict[str, str]:
    """Commit, hardware and versions."""
    return {
        "commit": commit(),
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "bf16": "native" if torch.cpu._is_avx512_bf16_supported() else "emulated",
        "python": platform.python_version(),
        "torch": version("torch"),
        "ray": version("ray"),
    }


def commit() -> str:
    """The checkout's commit, with a + where files are changed."""
    root = Path(__file__).parents[1]
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
