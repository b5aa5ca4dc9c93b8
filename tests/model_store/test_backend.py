"""The backend in torch, and which backend is taken: forwards that tasks share, threads, memory."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model_store.artifact import Overlay, probabilities
from model_store.backbone import Backbone
from model_store.backend import TorchBackend, choose
from model_store.encoder import Encoder
from model_store.native import NativeBackend, builds
from model_store.ops import TorchOps
from model_store.packing import Batch, Item
from model_store.plan import Plan, own_bytes
from model_store.store import Store
from model_store.tokenization import Encoding, InputEncoder
from tests.overlays import fp32_encoder, random_overlay

TEXTS = ["the film was good", "a", "what is my new bank card ?", "bad news"]


class Spied(TorchBackend):
    """Notes how many tasks each of its forwards serves."""

    def __init__(self, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
        encoder = fp32_encoder(backbone)
        super().__init__(encoder, threads=1)
        self.forwards: list[int] = []
        forward = encoder.forward

        def spy(batch: Batch, plans: Sequence[Plan]) -> list[Tensor]:
            self.forwards.append(len(plans))
            return forward(batch, plans)

        monkeypatch.setattr(encoder, "forward", spy)


def _encodings(backbone: Backbone) -> list[Encoding]:
    return InputEncoder(backbone.tokenizer, backbone.config, ["{text}"], 32).encode(TEXTS)


def _answers(
    backend: TorchBackend, backbone: Backbone, overlays: Sequence[Overlay]
) -> list[list[Any]]:
    """Every overlay's answers to all texts, asked in one call with the tasks in turn."""
    plans = [backend.plan(overlay) for overlay in overlays]
    items = [
        Item(encoding, segment)
        for encoding in _encodings(backbone)
        for segment in range(len(overlays))
    ]
    rows = backend.answer(items, plans)
    return [rows[segment :: len(overlays)] for segment in range(len(overlays))]


def _check(given: Sequence[Any], backbone: Backbone, overlay: Overlay) -> None:
    expected = probabilities(fp32_encoder(backbone), backbone, overlay, TEXTS)
    np.testing.assert_allclose(np.stack(given), expected.numpy(), atol=1e-5, rtol=1e-5)
    assert given[0].dtype == np.float32


def test_tasks_with_layers_of_their_own_share_no_forward(
    tiny: tuple[Store, Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny[1]
    backend = Spied(backbone, monkeypatch)
    inside: dict[str, Any] = {"heads": (2, 0, 3), "scales": True, "norms": True, "delta_rank": 2}
    overlays = [
        random_overlay(backbone, "recovered", labels=("a", "b"), seed=2, **inside),
        random_overlay(backbone, "plain"),
        random_overlay(backbone, "normed", seed=2, norms=True, prompt_tokens=0, read="cls"),
        random_overlay(backbone, "scaled", seed=2, scales=True),
    ]
    for overlay, given in zip(overlays, _answers(backend, backbone, overlays), strict=True):
        _check(given, backbone, overlay)
    assert sorted(backend.forwards) == [1, 1, 2], "the two that share, and each of the others"


def test_sequences_of_one_task_with_its_own_layers_share_a_forward(
    tiny: tuple[Store, Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny[1]
    backend = Spied(backbone, monkeypatch)
    overlay = random_overlay(backbone, "recovered", heads=(2, 0, 3), norms=True)
    (given,) = _answers(backend, backbone, [overlay])
    _check(given, backbone, overlay)
    assert backend.forwards == [1]


def test_the_backend_computes_with_its_number_of_threads(tiny: tuple[Store, Backbone]) -> None:
    here = torch.get_num_threads()
    seen: list[int] = []

    class Counting(TorchOps):
        def attention(self, q: Tensor, *rest: Any) -> Tensor:
            seen.append(torch.get_num_threads())
            return super().attention(q, *rest)

    encoder = Encoder(tiny[1].config, tiny[1].tensors, Counting())
    backend = TorchBackend(encoder, threads=here + 1)
    plan = backend.plan(random_overlay(tiny[1]))
    items = [Item(encoding, 0) for encoding in _encodings(tiny[1])]
    # In a thread of its own, which takes the setting along when it ends.
    thread = threading.Thread(target=backend.answer, args=(items, [plan]))
    thread.start()
    thread.join()
    assert seen == [here + 1] * tiny[1].config.layers
    assert torch.get_num_threads() == here


def test_a_plan_in_torch_is_as_warm_as_it_gets(tiny: tuple[Store, Backbone]) -> None:
    backend = TorchBackend(fp32_encoder(tiny[1]), threads=1)
    overlay = random_overlay(tiny[1])
    plan, other = backend.plan(overlay), backend.plan(overlay)
    assert backend.warm(plan) is plan
    assert sum(plan.parts.values()) == own_bytes(plan.plan)
    assert not set(plan.parts) & set(other.parts), "each has memory of its own"


def test_layers_of_its_own_count_as_memory(tiny: tuple[Store, Backbone]) -> None:
    encoder = fp32_encoder(tiny[1])
    config = tiny[1].config
    shared = own_bytes(random_overlay(tiny[1]).plan(encoder))
    attention = 4 * config.hidden * (config.hidden + 1)  # q, k, v, o and their biases
    norms = 4 * config.hidden
    own = own_bytes(random_overlay(tiny[1], norms=True).plan(encoder))
    assert own - shared == 4 * config.layers * (attention + norms), "all of it in fp32"
    half = own_bytes(random_overlay(tiny[1], heads=0.5).plan(encoder))
    assert shared < half < own


# -- Which backend ---------------------------------------------------------------------------------


def _choose(backbone: Backbone, **settings: Any) -> Any:
    settings = {"device": "cpu", "precision": None, "threads": 1} | settings
    return choose(backbone.config, backbone.tensors, **settings)


def _with_builds(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    missing = set(names) - set(builds())
    if missing:
        pytest.skip(f"no build for {missing} that this processor can run")
    monkeypatch.setattr("model_store.backend.builds", lambda: names)


def test_the_best_build_serves_in_the_fastest_exact_precision(
    tiny: tuple[Store, Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_builds(monkeypatch, ["avx512", "avx2"])
    chosen = _choose(tiny[1])
    assert isinstance(chosen, NativeBackend)
    assert (chosen.build, chosen.precision) == ("avx512", "bf16")
    for precision in ("fp32", "bf16", "int8"):
        chosen = _choose(tiny[1], precision=precision)
        assert (chosen.build, chosen.precision) == ("avx512", precision)


def test_without_bf16_the_native_forward_serves_in_fp32_alone(
    tiny: tuple[Store, Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_builds(monkeypatch, ["avx2"])
    for precision in (None, "fp32"):
        chosen = _choose(tiny[1], precision=precision)
        assert isinstance(chosen, NativeBackend)
        assert (chosen.build, chosen.precision) == ("avx2", "fp32")
    chosen = _choose(tiny[1], precision="bf16")
    assert isinstance(chosen, TorchBackend)
    assert chosen.precision == "bf16"
    with pytest.raises(ValueError, match="int8 needs the native forward"):
        _choose(tiny[1], precision="int8")


def test_where_nothing_was_built_torch_serves(
    tiny: tuple[Store, Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_store.backend.builds", lambda: [])
    for fast, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("model_store.backend.fast_bf16", lambda device, fast=fast: fast)
        chosen = _choose(tiny[1])
        assert isinstance(chosen, TorchBackend)
        assert chosen.precision == precision
    with pytest.raises(ValueError, match="int8 needs the native forward"):
        _choose(tiny[1], precision="int8")


def test_a_backbone_that_the_native_forward_cannot_run_is_served_by_torch(
    tiny: tuple[Store, Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny[1].config
    assert NativeBackend.supports(config)
    for wide in ({"ffn": 1 << 16}, {"hidden": 258, "heads": 2}, {"hidden": 4160, "heads": 65}):
        assert not NativeBackend.supports(config.model_copy(update=wide))
    monkeypatch.setattr(NativeBackend, "supports", lambda config: False)
    for precision in ("fp32", "bf16"):
        assert isinstance(_choose(tiny[1], precision=precision), TorchBackend)


def test_half_precision_is_for_gpus(tiny: tuple[Store, Backbone]) -> None:
    with pytest.raises(ValueError, match="fp16 needs a CUDA device"):
        _choose(tiny[1], precision="fp16")
