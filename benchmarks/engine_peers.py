"""Other engines on the same model and sentences: each as fast as its own settings make it.

All get batches that are padded and ready, all cores, and a warm-up; where an engine has several
ways to answer a batch, a short measurement chooses. Shapes stay dynamic, as sentences have any
length. Knows nothing of ours.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.engine_exports import arrays, onnx_file, openvino_file
from benchmarks.engine_models import Model, classifier
from benchmarks.engine_works import Sentences

Answer = Callable[[Sentences], NDArray[np.float32]]
"""A batch in, logits `[B, C]` out."""

PACKAGES = ("onnx", "onnxruntime", "openvino", "nncf")

PEERS = {
    ("transformers", "fp32"): (),
    ("transformers", "bf16"): (),
    ("torch.compile", "fp32"): (),
    ("torch.compile", "bf16"): (),
    ("onnxruntime", "fp32"): ("onnx", "onnxruntime"),
    ("onnxruntime", "int8"): ("onnx", "onnxruntime"),
    ("openvino", "fp32"): ("openvino",),
    ("openvino", "bf16"): ("openvino",),
    ("openvino", "int8"): ("openvino", "nncf"),
}
"""Peers by name and precision, and the packages that each needs besides our own."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Peer:
    """A peer that is ready, and which of its ways was the fastest."""

    name: str
    answer: Answer
    mode: str


def installed() -> set[str]:
    """Those of `PACKAGES` that are there."""
    return {name for name in PACKAGES if find_spec(name) is not None}


def missing_packages(name: str, precision: str) -> tuple[str, ...]:
    """What has to be installed before this peer can run."""
    there = installed()
    return tuple(package for package in PEERS[name, precision] if package not in there)


def start(
    name: str,
    precision: str,
    model: Model,
    folder: Path,
    threads: int,
    calibration: Sequence[Sentences],
    samples: Sequence[Sentences],
) -> Peer:
    """The peer, ready to answer, in the way that is fastest on `samples`."""
    ways: Mapping[str, Answer]
    if name == "transformers":
        ways = {"sdpa": _torch_answer(classifier(model, DTYPES[precision]))}
    elif name == "torch.compile":
        ways = {"frozen": _compiled(classifier(model, DTYPES[precision]))}
    elif name == "onnxruntime":
        ways = _onnxruntime(model, folder, precision, threads)
    elif name == "openvino":
        many = len(samples[0].token_ids) > 1
        ways = _openvino(model, folder, precision, threads, calibration, many=many)
    else:
        raise ValueError(f"unknown peer {name!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compilers warn at their first call
        mode = fastest(ways, samples)
    return Peer(name, ways[mode], mode)


def fastest(ways: Mapping[str, Answer], samples: Sequence[Sentences], rounds: int = 4) -> str:
    """The name of the way that answers the samples soonest, each warmed up before."""
    if len(ways) == 1:
        (only,) = ways
        return only
    best = dict.fromkeys(ways, float("inf"))
    for number in range(rounds):
        for name, answer in ways.items():
            begun = time.perf_counter()
            for batch in samples:
                answer(batch)
            if number:  # the first round warms up
                best[name] = min(best[name], time.perf_counter() - begun)
    return min(best, key=lambda name: best[name])


def _torch_answer(network: Callable[..., torch.Tensor]) -> Answer:
    def answer(batch: Sentences) -> NDArray[np.float32]:
        # Freezing wants gradients off rather than inference mode.
        with torch.no_grad():
            logits = network(torch.from_numpy(batch.token_ids), torch.from_numpy(batch.mask))
        result: NDArray[np.float32] = logits.float().numpy()
        return result

    return answer


def _compiled(network: torch.nn.Module) -> Answer:
    """With weights frozen, so that they are packed once; one graph for all shapes."""
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.reset()
    torch._inductor.config.freezing = True
    return _torch_answer(torch.compile(network, dynamic=True))


def _onnxruntime(model: Model, folder: Path, precision: str, threads: int) -> dict[str, Answer]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3

    def way(file: Path) -> Answer:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

        def answer(batch: Sentences) -> NDArray[np.float32]:
            logits: NDArray[np.float32] = session.run(None, arrays(batch))[0]
            return logits

        return answer

    int8 = precision == "int8"
    return {
        "fused" if fused else "plain": way(onnx_file(model, folder, int8=int8, fused=fused))
        for fused in (True, False)
    }


def _openvino(
    model: Model,
    folder: Path,
    precision: str,
    threads: int,
    calibration: Sequence[Sentences],
    *,
    many: bool,
) -> dict[str, Answer]:
    """One request on all cores; for many sentences also parts of the batch on one core each."""
    file = openvino_file(model, folder, int8=precision == "int8", calibration=calibration)
    import openvino

    core = openvino.Core()
    hints = {"fp32": ("f32",), "bf16": ("bf16",), "int8": ("bf16", "f32")}[precision]
    ways: dict[str, Answer] = {}
    for hint in hints:
        settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
        latency = core.compile_model(file, "CPU", settings | {"PERFORMANCE_HINT": "LATENCY"})
        ways[f"latency, rest {hint}"] = _one_request(latency)
        if many:
            split = settings | {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": threads}
            streams = core.compile_model(file, "CPU", split)
            ways[f"throughput, rest {hint}"] = _split_requests(streams, threads)
    return ways


def _one_request(compiled: Any) -> Answer:
    request = compiled.create_infer_request()

    def answer(batch: Sentences) -> NDArray[np.float32]:
        request.infer(arrays(batch))
        logits: NDArray[np.float32] = request.get_output_tensor(0).data.copy()
        return logits

    return answer


def _split_requests(compiled: Any, parts: int) -> Answer:
    """The batch dealt out by length: parts of as many tokens, each padded to its own longest."""
    requests = [compiled.create_infer_request() for _ in range(parts)]

    def answer(batch: Sentences) -> NDArray[np.float32]:
        lengths = batch.mask.sum(axis=1)
        order = np.argsort(lengths)
        tokens = np.cumsum(lengths[order])
        # Every part has a sentence, since a batch has at least as many as there are parts.
        cuts = np.searchsorted(tokens, [tokens[-1] * k / parts for k in range(1, parts)])
        shares = np.split(order, np.clip(cuts, range(1, parts), None))
        for request, rows in zip(requests, shares, strict=True):
            longest = lengths[rows].max()
            inputs = {
                name: np.ascontiguousarray(array[rows, :longest])
                for name, array in arrays(batch).items()
            }
            request.start_async(inputs)
        classes = compiled.output(0).partial_shape[1].get_length()
        result = np.empty((len(lengths), classes), dtype=np.float32)
        for request, rows in zip(requests, shares, strict=True):
            request.wait()
            result[rows] = request.get_output_tensor(0).data
        return result

    return answer
