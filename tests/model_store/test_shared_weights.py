"""Weights that processes share: the same answers, made once, whole, and for this user alone."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model_store.backbone import Backbone
from model_store.backend import choose
from model_store.native import NativeBackend, builds
from model_store.native_weights import Precision, weights
from model_store.packing import Item
from model_store.shared_weights import SharedWeights, shared
from model_store.tokenization import Encoding
from tests.overlays import random_overlay, small_backbone

PRECISIONS: list[Precision] = ["fp32", "bf16", "int8"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return small_backbone(tmp_path_factory.mktemp("store"))[1]


def place(folder: Path, backbone: Backbone) -> SharedWeights:
    return SharedWeights(folder, backbone.fingerprint, lambda: backbone.tensors)


def named(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.weights"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_answers_are_the_same_to_the_bit(
    tmp_path: Path, backbone: Backbone, precision: Precision
) -> None:
    if not builds() or (precision != "fp32" and builds() == ["avx2"]):
        pytest.skip("no native forward was built for this processor")
    packed = place(tmp_path, backbone).packed(backbone.config, precision)
    assert packed is not None
    overlay = random_overlay(backbone, heads=0.5, scales=True, norms=True, delta_rank=2)
    items = [Item(Encoding(list(range(5, 5 + n)), [0] * n, 0), 0) for n in (3, 9, 20)]
    answers = []
    for given in (None, packed):
        backend = NativeBackend(
            backbone.config, backbone.tensors, precision, threads=2, packed=given
        )
        plan = backend.warm(backend.plan(overlay))
        answers.append([row.tobytes() for row in backend.answer(items, [plan])])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["bert", "electra"])
def test_the_file_gives_back_what_was_packed(
    tmp_path: Path, precision: Precision, family: str
) -> None:
    backbone = small_backbone(tmp_path / "store", family)[1]
    expected = dict(weights(backbone.config, backbone.tensors, precision))
    for _ in range(2):
        found = place(tmp_path / "shared", backbone).packed(backbone.config, precision)
        assert found is not None
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name
            assert found[name].data_ptr() % 64 == 0


def test_each_precision_and_backbone_has_its_file(tmp_path: Path, backbone: Backbone) -> None:
    place(tmp_path, backbone).packed(backbone.config, "fp32")
    place(tmp_path, backbone).packed(backbone.config, "int8")
    SharedWeights(tmp_path, "0" * 64, lambda: backbone.tensors).packed(backbone.config, "int8")
    assert len(named(tmp_path)) == 3


def test_a_file_that_is_there_is_not_made_again(tmp_path: Path, backbone: Backbone) -> None:
    place(tmp_path, backbone).packed(backbone.config, "fp32")

    def fails() -> dict[str, torch.Tensor]:
        raise AssertionError("packed again")

    again = SharedWeights(tmp_path, backbone.fingerprint, fails)
    assert again.packed(backbone.config, "fp32") is not None


@pytest.mark.parametrize("left", [0, 7, 100, 1000])
def test_a_file_that_is_not_whole_is_made_again(tmp_path: Path, left: int) -> None:
    path = tmp_path / "a.weights"
    expected = torch.arange(1000, dtype=torch.float32)
    shared(path, lambda: [("x", expected)])
    path.write_bytes(path.read_bytes()[:left])
    assert torch.equal(shared(path, lambda: [("x", expected)])["x"], expected)


def test_what_a_killed_process_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.new").write_bytes(b"x" * 100_000)
    expected = torch.arange(10, dtype=torch.int32)
    assert torch.equal(shared(tmp_path / "a.weights", lambda: [("x", expected)])["x"], expected)


def test_writing_to_it_reaches_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "a.weights"
    shared(path, lambda: [("x", torch.zeros(10))])["x"].fill_(1)
    assert not shared(path, list)["x"].any()


def test_others_folders_are_not_used(tmp_path: Path, backbone: Backbone) -> None:
    tmp_path.chmod(0o755)
    assert place(tmp_path, backbone).packed(backbone.config, "fp32") is None
    assert named(tmp_path) == []
    assert choose(
        backbone.config,
        backbone.tensors,
        device="cpu",
        precision="fp32",
        threads=1,
        shared=place(tmp_path, backbone),
    )


LARGE = 32 * 1024 * 1024
READER = """
import sys
from pathlib import Path
import psutil, torch
from model_store.shared_weights import shared

def make():
    print("made", flush=True)
    yield "x", torch.ones(int(sys.argv[2]), dtype=torch.int8)

x = shared(Path(sys.argv[1]), make)["x"]
print("read", int(x.sum()), flush=True)
sys.stdin.readline()
maps = psutil.Process().memory_maps(grouped=False)
print(sum(one.pss for one in maps if one.path == sys.argv[1]))
"""


def test_processes_make_it_once_and_have_it_in_memory_once(tmp_path: Path) -> None:
    path = str((tmp_path / "a.weights").resolve())
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, path, str(LARGE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said: list[str] = []
    for reader in readers:
        assert reader.stdout is not None
        while not said or not said[-1].startswith("read"):
            said.append(reader.stdout.readline().strip())
        said.append("")
    # All of them have it mapped now.
    shares = [int(reader.communicate("\n")[0]) for reader in readers]
    assert sorted(filter(None, said)) == ["made", *[f"read {LARGE}"] * 3]
    assert shares[0] < LARGE / 2
