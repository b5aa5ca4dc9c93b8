"""Measures finished overlays: how fast their forwards are, and whether the server answers the same.

Both are done in this process, with nothing else running, on the operations that serve here. Results
are kept in the work folder under the overlays' digests and the machine. Knows nothing of trainings.
"""

import asyncio
import dataclasses
import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import machine
from benchmarks.quality_results import OVERLAYS
from benchmarks.recipes import DENSE_PROMPT, settings
from examples.ready_made import add_backbone
from localization.config import DataConfig
from localization.costs import ROWS, plan_of, time_forwards
from localization.data import Rows, load_rows
from localization.selection import Kept
from model_store import artifact
from model_store.artifact import Overlay
from model_store.backbone import Backbone
from model_store.backend import answer_all, choose
from model_store.encoder import Encoder
from model_store.ops import fast_bf16
from model_store.ops_onednn import fastest_ops
from model_store.plan import Plan
from model_store.store import Store
from model_store.tokenization import InputEncoder
from serving.board import Board
from serving.config import ServeConfig
from serving.metrics import Metrics
from serving.service import Service

MOST_INPUTS = 16
"""Inputs of one request."""
AT_ONCE = 16
"""Requests that wait for their answers at the same time."""

Measured = dict[str, dict[str, float]]
"""Set -> measure -> value."""


def measure(
    console: Console, work: Path, data: Path | None, sets: Sequence[str], again: bool
) -> Measured:
    """Speeds and the server's agreement for the overlays of seed 0 that are in `work`.

    Without `data` only what was measured before is given. `again`: measure all anew.
    """
    found: Measured = {name: {} for name in sets}
    files = {
        (name, part): work / "overlays" / part / f"{name}-0.safetensors"
        for part in OVERLAYS
        for name in sets
    }
    overlays = {key: file.read_bytes() for key, file in files.items() if file.is_file()}
    facts = machine.facts()
    here = {fact: facts[fact] for fact in ("processor", "cores", "torch")}
    here["threads"] = str(torch.get_num_threads())
    kept = _Kept(work / "measured", here, data is not None, again)
    meter = Meter(add_backbone(Store(work / "store"))) if overlays and data else None
    for (name, part), content in overlays.items():
        take = partial(_timed, console, meter, data, name, content)
        speeds = kept.get(f"speed-{part}-{name}", {name: content}, take)
        found[name] |= {f"{part}_{figure}": value for figure, value in speeds.items()}
    equal = [_asked(console, kept, data, part, overlays) for part in OVERLAYS]
    for name in sets:
        shares = [one[name] for one in equal if name in one]
        if len(shares) == len(OVERLAYS):
            found[name]["server_labels_equal"] = min(shares)
    return found


def _timed(
    console: Console, meter: "Meter | None", data: Path | None, name: str, content: bytes
) -> dict[str, float]:
    assert meter is not None, "nothing is measured without rows"
    assert data is not None, "nothing is measured without rows"
    with console.status(f"Timing {name} ..."):
        return meter.speeds(content, test_rows(data, name))


def _asked(
    console: Console,
    kept: "_Kept",
    data: Path | None,
    part: str,
    overlays: Mapping[tuple[str, str], bytes],
) -> dict[str, float]:
    contents = {name: content for (name, kind), content in overlays.items() if kind == part}

    def asked() -> dict[str, float]:
        assert data is not None, "nothing is measured without rows"
        rows = {name: test_rows(data, name) for name in contents}
        with console.status(f"Asking the server: {part} ..."), tempfile.TemporaryDirectory() as at:
            store = Store(Path(at))
            return labels_equal(store, add_backbone(store), contents, rows)

    return kept.get(f"server-{part}", contents, asked) if contents else {}


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Measurements on disk; without `may_measure` what is not there stays unknown."""

    folder: Path
    machine: Mapping[str, str]
    may_measure: bool
    again: bool

    def get(
        self, name: str, contents: Mapping[str, bytes], take: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        """What was measured of exactly these overlays on this machine, or is measured now."""
        of = {key: hashlib.sha256(content).hexdigest() for key, content in contents.items()}
        of |= self.machine
        file = self.folder / f"{name}.json"
        if not (self.again and self.may_measure) and file.is_file():
            known = json.loads(file.read_text())
            if known["of"] == of:
                return dict(known["figures"])
        if not self.may_measure:
            return {}
        figures = take()
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".part")
        temporary.write_text(json.dumps({"of": of, "figures": figures}, indent=1))
        temporary.replace(file)
        return figures


def test_rows(data: Path, name: str) -> Rows:
    """A set's test rows. Raises `DataError`."""
    config = DataConfig.model_validate_json(json.dumps(settings(name, "localized", 0)["data"]))
    assert config.test is not None, "every recipe has test rows"
    return load_rows(config.test, config, data, split="test")


class Meter:
    """Times overlays' forwards against the whole network's."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._encoder = serving_encoder(backbone)
        config = backbone.config
        whole = Kept((torch.arange(config.ffn, dtype=torch.int32),) * config.layers)
        self._whole = plan_of(self._encoder, whole)
        words = torch.arange(DENSE_PROMPT)
        prompt = self._encoder.word_embeddings(words)  # any will do: time depends on the length
        self._prompted: Plan = dataclasses.replace(
            self._whole, prompt=prompt, prompt_cache=self._encoder.prompt_cache(prompt)
        )

    def speeds(self, content: bytes, rows: Rows) -> dict[str, float]:
        """How many times as fast as the whole network, without and with a prompt, an overlay is."""
        overlay = artifact.read(content, self._backbone.config, self._backbone.fingerprint)
        sample = rows.sample(ROWS, 0).inputs
        plans = {
            "whole": self._whole,
            "prompted": self._prompted,
            "overlay": overlay.plan(self._encoder),
        }
        encodings = texts_of(self._backbone, overlay).encode(sample)
        seconds = time_forwards(self._encoder, plans, encodings)
        return {
            "speedup": round(seconds["whole"] / seconds["overlay"], 3),
            "speedup_over_prompt": round(seconds["prompted"] / seconds["overlay"], 3),
        }


def serving_encoder(backbone: Backbone) -> Encoder:
    """The encoder that a server on this machine has."""
    return Encoder(backbone.config, backbone.tensors, fastest_ops("cpu", bf16=fast_bf16("cpu")))


def texts_of(backbone: Backbone, overlay: Overlay) -> InputEncoder:
    """From an overlay's inputs to tokens."""
    manifest = overlay.manifest
    return InputEncoder(backbone.tokenizer, backbone.config, manifest.template, manifest.max_tokens)


def labels_equal(
    store: Store, backbone: Backbone, contents: Mapping[str, bytes], rows: Mapping[str, Rows]
) -> dict[str, float]:
    """Per cent of the rows to which the server gives the label that `taskbone evaluate` counts.

    Publishes the overlays in `store`, which must hold the backbone alone; sets are mixed.
    """
    backend = choose(
        backbone.config,
        backbone.tensors,
        device="cpu",
        precision=None,
        threads=torch.get_num_threads(),
    )
    expected: dict[str, list[str]] = {}
    for name, content in contents.items():
        overlay = artifact.read(content, backbone.config, backbone.fingerprint)
        encodings = texts_of(backbone, overlay).encode(rows[name].inputs)
        best = answer_all(backend, overlay, encodings).argmax(dim=1).tolist()
        expected[name] = [overlay.manifest.labels[number] for number in best]
        store.publish(artifact.verify(content, backbone.config, backbone.fingerprint))
    given = asyncio.run(_ask_all(store, {name: rows[name] for name in contents}))
    return {
        name: round(100 * sum(map(str.__eq__, labels, given[name])) / len(labels), 3)
        for name, labels in expected.items()
    }


async def _ask_all(store: Store, rows: Mapping[str, Rows]) -> dict[str, list[str]]:
    """The served labels of all rows, asked for in requests of 1 to `MOST_INPUTS`, sets mixed."""
    service = Service.open(ServeConfig.of(store=store.root, device="cpu"), Metrics(), Board())
    draw = random.Random(0)
    requests: list[tuple[str, list[int]]] = []
    for name, of_set in rows.items():
        order = list(range(len(of_set)))
        draw.shuffle(order)
        while order:
            count = draw.randint(1, MOST_INPUTS)
            requests.append((name, order[:count]))
            order = order[count:]
    draw.shuffle(requests)
    given = {name: [""] * len(of_set) for name, of_set in rows.items()}
    room = asyncio.Semaphore(AT_ONCE)

    async def ask(name: str, numbers: list[int]) -> None:
        async with room:
            inputs = [rows[name].inputs[number] for number in numbers]
            answer = await service.predict(name, inputs)
        for number, prediction in zip(numbers, answer.predictions, strict=True):
            given[name][number] = prediction.label

    try:
        await asyncio.gather(*(ask(*request) for request in requests))
    finally:
        service.close()
    return given
