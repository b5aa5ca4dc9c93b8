"""What a new version goes through before it answers, over HTTP: refused where it is not what it
says, and then nothing has changed; else soon there, on every replica.

Long form: 50 versions timed instead of 5, 500 mutants uploaded instead of 40.
"""

import dataclasses
import re
import time
from statistics import median
from typing import Any

import httpx
import pytest

from model_store import artifact
from model_store.backbone import Backbone
from tests.abuse.mutations import mutant
from tests.abuse.place import Place
from tests.abuse.variants import TEXTS, Variant, make_variants, which
from tests.overlays import random_overlay
from tests.running import TOKEN
from tests.serving.test_api import error_of
from tests.soak import report, soak
from tests.waiting import wait_until

TIMED = 50 if soak() else 5
MUTANTS = 500 if soak() else 40
PROMISED_S = 1.0
FIRST, LAST = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)
SHOWN = re.compile(r"golden input \d gives (.*); the artifact promises (.*) \(tolerance")


def lying(backbone: Backbone, task: str) -> bytes:
    """An artifact that promises other answers than it gives."""
    overlay = random_overlay(backbone, task, seed=77)
    golden = tuple(
        one.model_copy(update={"scores": FIRST if one.scores[0] < 0.5 else LAST})
        for one in overlay.manifest.golden
    )
    manifest = overlay.manifest.model_copy(update={"golden": golden})
    return artifact.write(dataclasses.replace(overlay, manifest=manifest))


def given_by(place: Place, variants: list[Variant], task: str) -> tuple[int, int | None]:
    """Which version answers, and which artifact's answer it is."""
    found = place.server.predict(task, TEXTS[0]).json()
    return found["version"], which(variants, TEXTS[0], found["predictions"][0]["scores"])


@pytest.mark.parametrize("wait", [True, False])
def test_golden_inputs_that_disagree_change_nothing_and_the_error_shows_both(
    place: Place, wait: bool
) -> None:
    task = f"golden-{wait}".lower()
    variants = make_variants(place.backbone, task, 1, seed=3)
    place.register(task, variants[0].data)
    path = f"/v1/tasks/{task}/versions"
    before = place.server.ask("GET", path).json()
    data = lying(place.backbone, task)
    if wait:
        message = error_of(place.server.admin("POST", path, content=data), 422)["message"]
    else:
        begun = place.change("POST", f"{path}?wait=false", 202, content=data)
        operation = f"/v1/operations/{begun['operation']}"
        wait_until(lambda: place.change("GET", operation)["state"] != "running")
        ended = place.change("GET", operation)
        assert (ended["state"], ended["error"]["type"]) == ("failed", "golden_mismatch")
        message = ended["error"]["message"]
    shown = SHOWN.search(message)
    assert shown, message
    got, wanted = ([float(one) for one in re.findall(r"\d\.\d+", part)] for part in shown.groups())
    assert sum(got) == pytest.approx(1, abs=1e-3)
    assert sorted(wanted) == [0, 0, 1]
    assert given_by(place, variants, task) == (1, 0)
    assert place.server.ask("GET", path).json() == before
    assert not list((place.store.root / "tasks" / task).glob("2.*"))
    last = place.change("GET", "/v1/audit?limit=1")["entries"][-1]
    assert (last["task"], last["result"]) == (task, "golden_mismatch")


def test_mutated_uploads_are_refused_and_what_serves_goes_on(place: Place) -> None:
    """The same mutants as elsewhere, through HTTP, the replica and the store."""
    task = "mutated"
    variants = make_variants(place.backbone, task, 1, seed=4)
    place.register(task, variants[0].data)
    path = f"/v1/tasks/{task}/versions"
    count = {422: 0, 201: 0, 200: 0}
    for number in range(MUTANTS):
        made = mutant(variants[0].data, number)
        answer = place.server.admin("POST", f"{path}?activate=false", content=made.data)
        assert answer.status_code in count, f"{made.what}: {answer.text}"
        count[answer.status_code] += 1
        if answer.status_code == 422:
            message = error_of(answer, 422)["message"]
            assert any(name in message for name in (*made.names, "of task")), made.what
    assert count[422] > MUTANTS / 2
    assert given_by(place, variants, task) == (1, 0)
    kept = list((place.store.root / "tasks" / task).iterdir())
    assert len(kept) == len(place.server.ask("GET", path).json()["versions"]) == 1 + count[201]
    assert not list((place.store.root / "staging").iterdir())


def test_a_new_version_answers_from_every_replica_when_its_upload_ends(place: Place) -> None:
    task = "soon"
    ports = place.ports()
    took_s = []
    for number in range(1, TIMED + 1):
        overlay = random_overlay(place.backbone, task, seed=10_000 + number)
        began = time.monotonic()
        assert place.register(task, artifact.write(overlay)) == number
        for port in ports.values():
            assert ask_at(port, task)["version"] == number
        took_s.append(time.monotonic() - began)
    report(
        f"upload to the first answer from each of {len(ports)} replicas, {TIMED} times",
        f"{median(took_s):.2f} s (median), {max(took_s):.2f} s (most)",
    )
    assert len(ports) == len(place.server.replicas())
    if soak():
        assert max(took_s) <= PROMISED_S


def ask_at(port: int, task: str) -> dict[str, Any]:
    """One predict request to one replica."""
    answer = httpx.post(
        f"http://127.0.0.1:{port}/v1/tasks/{task}/predict",
        json={"inputs": TEXTS[0]},
        headers={"authorization": f"Bearer {TOKEN}"},
        timeout=60,
        trust_env=False,
    )
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found
