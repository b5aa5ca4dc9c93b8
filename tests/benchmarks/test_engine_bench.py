"""The engine benchmark: its batches, its arithmetic, its report, and that all run the same network.

Networks are tiny and rounds few, so no figure here says anything of speed.
"""

import json
import random
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import engine, engine_isa, engine_peers, engine_tasks
from benchmarks.engine_contest import Settings, calibration_sentences, difference
from benchmarks.engine_models import (
    Model,
    classifier,
    model_of,
    random_overlay,
    useful_operations,
    zipf_tasks,
)
from benchmarks.engine_ours import Ours
from benchmarks.engine_peers import Peer, fastest
from benchmarks.engine_report import add_shares, other_targets, row, table, target_of, verdict
from benchmarks.engine_timing import interleaved
from benchmarks.engine_works import (
    PRECISIONS,
    TARGETS,
    WORKS,
    Sentences,
    Work,
    batches,
    read_lengths,
    scaled_to_mean,
    sentence_sets,
    sentences_of,
)
from model_store.artifact import probabilities
from model_store.encoder import Encoder
from model_store.native import builds
from model_store.native_weights import Precision
from model_store.ops import TorchOps
from model_store.tokenization import Encoding
from tests.reference import small_checkpoint

ROOT = Path(__file__).parents[2]
LENGTHS = {"long": [300, 200], "short": [4, 9, 12, 30], "middle": [20, 25, 40]}
KEYS = {"work", "precision", "keep", "ours_ms", "peer", "peer_ms", "ratio", "share_of_ceiling"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("bench")
    checkpoint = small_checkpoint(folder / "checkpoint", "bert", mlm=False)
    return model_of("tiny", checkpoint.folder, folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, texts in {
        "sst2": [{"text": "a film"}] * 40,
        "rte": [{"text1": "a", "text2": "b"}],
    }.items():
        (folder / name).mkdir()
        lines = "".join(json.dumps(row | {"label": "x"}) + "\n" for row in texts)
        (folder / name / "test.jsonl").write_text(lines)
    return folder


def sentences(tiny: Model, *lengths: int) -> Sentences:
    return sentences_of(lengths, tiny.config.vocabulary, random.Random(0))


class TestWorks:
    def test_batches_have_the_mean_and_stay_the_same(self) -> None:
        work = Work("some", "tiny", 32)
        first = batches(work, LENGTHS, 3, 100, 512, 1)
        assert [batch.lengths for batch in first] == [
            batch.lengths for batch in batches(work, LENGTHS, 3, 100, 512, 1)
        ]
        for batch in first:
            assert sum(batch.lengths) == 32 * 32
            assert batch.token_ids.shape == (32, max(batch.lengths))
            assert batch.mask.sum(axis=1).tolist() == batch.lengths
            for number, encoding in enumerate(batch.encodings):
                count = len(encoding.token_ids)
                assert batch.token_ids[number, :count].tolist() == encoding.token_ids
        assert len({tuple(batch.lengths) for batch in first}) == 3

    def test_one_sentence_has_32_tokens(self) -> None:
        (batch,) = batches(Work("some", "tiny", 1), LENGTHS, 1, 100, 512, 0)
        assert batch.lengths == [32]

    def test_scaling_keeps_order_and_limits(self) -> None:
        scaled = scaled_to_mean([10, 20, 400], 32, 70, random.Random(0))
        assert sum(scaled) == 96
        assert sorted(scaled) == scaled
        assert max(scaled) <= 70

    def test_documents_are_left_out_unless_there_is_nothing_else(self) -> None:
        assert set(sentence_sets(LENGTHS)) == {"short", "middle"}
        assert set(sentence_sets({"long": [300]})) == {"long"}

    def test_lengths_are_those_of_the_texts_and_pairs(self, data: Path, tiny: Model) -> None:
        tokenizer = tiny.backbone.tokenizer
        lengths = read_lengths(data, tokenizer)
        assert lengths["sst2"] == [len(tokenizer.encode("a film").ids)] * 40
        assert lengths["rte"] == [len(tokenizer.encode("a", "b").ids)]

    def test_a_folder_without_data_is_refused(self, tmp_path: Path, tiny: Model) -> None:
        with pytest.raises(SystemExit, match="no data set"):
            read_lengths(tmp_path, tiny.backbone.tokenizer)

    def test_targets_are_of_works_that_there_are(self) -> None:
        assert {work for work, _, _ in TARGETS} <= {work.name for work in WORKS}


class TestModels:
    def test_useful_operations_are_counted_one_by_one(self, tiny: Model) -> None:
        config, lengths = tiny.config, [3, 5]
        kept = round(0.5 * config.ffn)
        expected = 0
        for layer in range(config.layers):
            for length in lengths:
                queries = 1 if layer == config.layers - 1 else length
                expected += 2 * length * config.hidden * config.hidden  # k, v
                expected += 2 * queries * config.hidden * config.hidden  # q, o
                expected += 2 * queries * config.hidden * kept
                expected += 2 * queries * length * config.hidden
        assert useful_operations(config, lengths, 0.5) == 2 * expected

    def test_zipf_asks_for_the_first_task_twice_as_often_as_for_the_second(self) -> None:
        drawn = zipf_tasks(1000, 20_000, 0)
        assert drawn.count(0) / drawn.count(1) == pytest.approx(2, rel=0.15)
        assert max(drawn) > 500

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_ours_answers_as_the_reference_does(self, tiny: Model, precision: Precision) -> None:
        if precision == "int8" and not set(builds()) - {"avx2"}:
            pytest.skip("int8 needs a native build for AVX-512")
        overlays = [random_overlay(tiny, number, 0.5, prompt_tokens=2) for number in range(3)]
        texts = ["the film was good", "no", "my bank card is lost", "film"]
        tasks = [2, 0, 2, 1]
        tokenizer = tiny.backbone.tokenizer
        rows = [tokenizer.encode(text).ids for text in texts]
        encodings = [Encoding(ids, [0] * len(ids), 0) for ids in rows]
        given = Ours(tiny.backbone, precision, overlays).answer(encodings, tasks)
        reference = Encoder(tiny.config, tiny.backbone.tensors, TorchOps())
        for text, task, answer in zip(texts, tasks, given, strict=True):
            expected = probabilities(reference, tiny.backbone, overlays[task], [text])[0]
            tolerance = 1e-5 if precision == "fp32" else 0.03
            torch.testing.assert_close(answer.float(), expected, atol=tolerance, rtol=0)


class TestPeers:
    def test_transformers_runs_the_same_network(self, tiny: Model) -> None:
        batch = sentences(tiny, 3, 12, 7)
        network = classifier(tiny, torch.float32)
        peer = Peer("transformers", engine_peers._torch_answer(network), "sdpa")
        ours = Ours(tiny.backbone, "fp32", [random_overlay(tiny, 0, 1.0)])
        assert difference(ours, peer, batch) < 1e-5
        pruned = Ours(tiny.backbone, "fp32", [random_overlay(tiny, 0, 0.5)])
        assert difference(pruned, peer, batch) > 1e-3

    @pytest.mark.parametrize(
        ("name", "precision"), [key for key, packages in engine_peers.PEERS.items() if packages]
    )
    def test_other_engines_run_the_same_network(
        self, tiny: Model, tmp_path: Path, name: str, precision: str
    ) -> None:
        if missing := engine_peers.missing_packages(name, precision):
            pytest.skip(f"not installed: {', '.join(missing)}")
        calibration = calibration_sentences({"some": [3, 5, 9, 12]}, tiny.config.vocabulary, 64, 0)
        batch = sentences(tiny, 3, 12, 7)
        peer = engine_peers.start(name, precision, tiny, tmp_path, 1, calibration, [batch])
        ours = Ours(tiny.backbone, "fp32", [random_overlay(tiny, 0, 1.0)])
        assert difference(ours, peer, batch) < {"fp32": 1e-4, "bf16": 0.05, "int8": 0.1}[precision]

    def test_the_batch_is_dealt_out_and_put_together_again(self, tiny: Model) -> None:
        network = engine_peers._torch_answer(classifier(tiny, torch.float32))
        batch = sentences(tiny, 30, 3, 12, 7, 4)
        dealt = engine_peers._split_requests(_Compiled(network), 2)
        np.testing.assert_allclose(dealt(batch), network(batch), atol=1e-5)

    def test_the_fastest_way_is_taken(self, tiny: Model) -> None:
        calls: list[str] = []

        def way(name: str, cost: int) -> engine_peers.Answer:
            def answer(batch: Sentences) -> Any:
                calls.append(name)
                return sum(range(cost))

            return answer

        ways = {"slow": way("slow", 300_000), "fast": way("fast", 1)}
        assert fastest(ways, [sentences(tiny, 3)]) == "fast"
        assert calls.count("slow") == calls.count("fast")

    def test_unknown_peers_are_refused(self, tiny: Model, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="nobody"):
            engine_peers.start("nobody", "fp32", tiny, tmp_path, 1, [], [])


class _Compiled:
    """OpenVINO's compiled model, as far as dealing out goes."""

    def __init__(self, network: engine_peers.Answer) -> None:
        self._network = network
        self.data: Any = None
        self.partial_shape = [None, self]

    def get_length(self) -> int:
        return 2

    def output(self, number: int) -> "_Compiled":
        return self

    def create_infer_request(self) -> "_Compiled":
        return _Compiled(self._network)

    def start_async(self, inputs: dict[str, Any]) -> None:
        assert inputs["attention_mask"].sum(axis=1).max() == inputs["input_ids"].shape[1]
        batch = Sentences((), inputs["input_ids"], inputs["attention_mask"])
        self.data = self._network(batch)

    def wait(self) -> None:
        assert self.data is not None

    def get_output_tensor(self, number: int) -> "_Compiled":
        return self


class TestTiming:
    def test_everyone_gets_every_batch_as_often(self) -> None:
        calls: dict[str, list[int]] = {"a": [], "b": []}
        done: list[None] = []
        seconds = interleaved(
            {name: calls[name].append for name in calls}, 2, 4, lambda: done.append(None)
        )
        assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4}
        assert all(set(numbers) == {0, 1} for numbers in calls.values())
        assert len(done) == 8


class TestReport:
    def test_a_row_has_medians_and_their_ratio(self) -> None:
        entry = row("bert-base-32", "bf16", 0.5, [0.001, 0.003, 9.0], "openvino", [0.012])
        assert (entry["ours_ms"], entry["peer_ms"], entry["ratio"]) == (3.0, 12.0, 0.25)
        assert target_of(entry) == 0.36
        assert target_of(entry | {"peer": "onnxruntime"}) is None
        without = row("bert-base-32", "int8", 0.5, None, "openvino", [0.012])
        assert (without["ours_ms"], without["ratio"]) == (None, None)

    def test_the_share_is_operations_a_second_over_the_ceiling(self) -> None:
        entry = {"precision": "bf16", "ours_ms": 10.0, "useful_gflop": 2.0}
        without = {"precision": "int8", "ours_ms": None, "useful_gflop": 2.0}
        add_shares([entry, without], {"bf16": 400.0, "int8": 800.0})
        assert entry["share_of_ceiling"] == 0.5
        assert without["share_of_ceiling"] is None

    def test_the_table_says_what_is_met(self) -> None:
        rows = [
            row("bert-base-32", "bf16", 0.5, [0.003], "openvino", [0.012]),
            row("bert-base-32", "bf16", 0.5, [0.003], "transformers", [0.1234]),
            row("bert-base-32", "int8", 0.5, [0.009], "openvino", [0.012]),
        ]
        console = Console(width=140, file=(out := StringIO()))
        console.print(table(rows))
        lines = [line for line in out.getvalue().splitlines() if "bert-base-32" in line]
        assert len(lines) == 2
        assert "0.25" in lines[0]
        assert "123" in lines[0]
        assert "yes" in lines[0]
        assert "no" in lines[1]

    def test_verdicts(self) -> None:
        assert verdict(0.97, 0.97, smaller=False) == "yes"
        assert verdict(1.2, 1.1, smaller=True) == "no"
        assert verdict(None, 1.1, smaller=True) == ""
        assert verdict(1.2, None, smaller=True) == ""

    def test_a_small_run_has_all_keys(self, tiny: Model, data: Path, tmp_path: Path) -> None:
        settings = Settings(
            data,
            tmp_path,
            rounds=1,
            parts=("minilm-l6-1", "tasks16", "sst2", "memory"),
            precisions=("bf16", "fp32", "int8"),
            peers=("transformers",),
        )
        report = engine.run(settings, Console(quiet=True), lambda name, work: tiny)
        assert json.loads(json.dumps(report))["rows"] == report["rows"]
        assert set(report) >= {
            "ceiling_gflops",
            "share_of_ceiling",
            "tasks16_over_one",
            "zipf_1000_over_one",
            "sentences_per_second",
            "cold_task_bytes",
            "versions",
            "machine",
        }
        contests = {(entry["precision"], entry["keep"]) for entry in report["rows"]}
        assert contests == {(name, keep) for name in ("bf16", "fp32") for keep in (0.5, 1.0)}
        for entry in report["rows"]:
            assert set(entry) >= KEYS
            assert entry["ratio"] == pytest.approx(entry["ours_ms"] / entry["peer_ms"], rel=0.02)
            assert entry.get("difference", 0.0) < 0.05
        assert set(report["ceiling_gflops"]) >= {"bf16", "fp32"}
        assert all(value > 0 for value in report["sentences_per_second"].values())
        assert set(report["tasks16_over_one"]) == set(PRECISIONS)
        console = Console(width=120, file=(out := StringIO()))
        console.print(other_targets(report))
        assert "16 tasks" in out.getvalue()

    def test_missing_packages_are_named(
        self, tiny: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine_peers, "installed", set)
        settings = Settings(
            data, tmp_path, rounds=1, parts=("minilm-l6-1",), peers=("openvino", "onnxruntime")
        )
        report = engine.run(settings, Console(quiet=True), lambda name, work: tiny)
        assert report["rows"] == []
        assert report["left_out"]["openvino int8"] == "not installed: openvino, nncf"
        assert report["left_out"]["onnxruntime fp32"] == "not installed: onnx, onnxruntime"

    def test_many_tasks_by_zipfs_law(self, tiny: Model) -> None:
        ratio = engine_tasks.zipf_over_one(
            tiny,
            "fp32",
            [sentences(tiny, 3, 12, 7)],
            1,
            0,
            lambda: None,
            registered=5,
            batches_a_round=2,
        )
        assert ratio > 0

    def test_a_cold_task_takes_at_least_its_tensors(self, tiny: Model) -> None:
        overlay = random_overlay(tiny, 0, 0.5, prompt_tokens=4)
        assert overlay.prompt is not None
        neurons = sum(rows.nbytes for rows in overlay.neurons)
        measured = engine_tasks.cold_task_bytes(tiny, 4)
        assert neurons + overlay.prompt.nbytes < measured < 100_000


class TestCommand:
    def test_parts_are_chosen_by_name(self, data: Path) -> None:
        given = ["--data", str(data), "--only", "sst2,zipf", "--precision", "int8", "--without-amx"]
        settings, without_amx = engine.parse(given)
        assert (settings.parts, settings.precisions) == (("sst2", "zipf"), ("int8",))
        assert without_amx
        assert engine.parse(["--data", str(data)])[0].peers[-1] == "openvino"

    @pytest.mark.parametrize("given", [["--only", "bert"], ["--rounds", "0"], ["--peers", "x"]])
    def test_unknown_names_are_refused(
        self, data: Path, given: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            engine.parse(["--data", str(data), *given])
        assert "error" in capsys.readouterr().err

    @pytest.mark.skipif(
        "amx_bf16" not in engine_isa.flags(), reason="this processor has no AMX to refuse"
    )
    def test_a_process_can_do_without_amx(self) -> None:
        # A process of its own: there is no way back.
        program = (
            "import torch\n"
            "from benchmarks.engine_isa import amx_granted, refuse_amx\n"
            "{refuse}\n"
            "x = torch.randn(64, 64, dtype=torch.bfloat16)\n"
            "packed = torch.ops.mkldnn._reorder_linear_weight(x, 64)\n"
            "torch.ops.mkldnn._linear_pointwise(x, packed, None, 'none', [], '')\n"
            "print(amx_granted())\n"
        )
        answers = [
            subprocess.run(
                [sys.executable, "-c", program.format(refuse=refuse)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            for refuse in ("", "refuse_amx()")
        ]
        assert answers == ["True", "False"]
