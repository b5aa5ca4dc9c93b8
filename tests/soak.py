"""Whether tests run in their long form, and what becomes of the figures of long runs.

`make soak` sets `TASKBONE_SOAK`; then every `report` also goes into `docs/results/abuse.md`.
"""

import json
import os
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "docs" / "results"

_HEAD = """\
# What was done to it, and what came out

Written by the tests in `tests/abuse/` when `make soak` runs them in their long form; `make test`
runs a short form of each.

| abuse | what came out |
|---|---|
"""


def soak() -> bool:
    """Whether this is the long run."""
    return os.environ.get("TASKBONE_SOAK", "") not in ("", "0")


def report(abuse: str, came_out: str) -> None:
    """Say what a test found; the long run's figures are kept, each in the place of its last."""
    print(f"{abuse}: {came_out}")  # noqa: T201 - shown by `pytest -s` and with every failure
    if not soak():
        return
    file = RESULTS / "abuse.json"
    found: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    found[abuse] = came_out
    file.write_text(json.dumps(found, indent=1) + "\n")
    rows = "".join(f"| {name} | {text} |\n" for name, text in found.items())
    (RESULTS / "abuse.md").write_text(_HEAD + rows)
