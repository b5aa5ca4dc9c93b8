"""The peers' own files: ONNX and OpenVINO models, whole and quantized, made once in a folder.

Files are named by the versions that made them. Making all of them takes minutes for BERT-base.
"""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.engine_models import Model, classifier
from benchmarks.engine_works import Sentences

INPUTS = ("input_ids", "attention_mask")


def onnx_file(model: Model, folder: Path, *, int8: bool, fused: bool) -> Path:
    """ONNX Runtime's model; `fused`: its transformer optimizer has put operations together."""
    kind = f"{'fused' if fused else 'plain'}-{'int8' if int8 else 'fp32'}"
    file = folder / f"onnxruntime-{version('onnxruntime')}-{kind}.onnx"
    if file.is_file():
        return file
    with _made(file) as made:
        if int8:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(
                onnx_file(model, folder, int8=False, fused=fused),
                made,
                per_channel=True,
                weight_type=QuantType.QInt8,
                # Fused operations tell no types; all of them compute in floats.
                extra_options={"DefaultTensorType": 1},
            )
        elif fused:
            from onnxruntime.transformers import optimizer

            optimizer.optimize_model(
                str(onnx_file(model, folder, int8=False, fused=False)),
                model_type="bert",
                num_heads=model.config.heads,
                hidden_size=model.config.hidden,
                opt_level=1,
            ).save_model_to_file(str(made))
        else:
            # The optimizer knows the graphs of this exporter and of attention written out.
            torch.onnx.export(
                classifier(model, torch.float32, "eager"),
                _example(model),
                str(made),
                input_names=list(INPUTS),
                output_names=["logits"],
                dynamic_axes={name: {0: "B", 1: "T"} for name in INPUTS},
                opset_version=17,
                dynamo=False,
            )
    return file


def openvino_file(
    model: Model, folder: Path, *, int8: bool, calibration: Sequence[Sentences]
) -> Path:
    """OpenVINO's model; int8 by NNCF after training, calibrated on these sentences."""
    # Its telemetry would send to a server; without the package there is none.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    tool = f"-nncf-{version('nncf')}-int8" if int8 else "-fp32"
    file = folder / f"openvino-{version('openvino')}{tool}.xml"
    if file.is_file():
        return file
    with _made(file) as made:
        if int8:
            import nncf

            nncf.set_log_level(logging.ERROR)
            whole = openvino_file(model, folder, int8=False, calibration=calibration)
            converted = nncf.quantize(
                openvino.Core().read_model(whole),
                nncf.Dataset(calibration, arrays),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(calibration),
            )
        else:
            network = classifier(model, torch.float32)
            example = dict(zip(INPUTS, _example(model), strict=True))
            converted = openvino.convert_model(network, example_input=example)
        openvino.save_model(converted, made, compress_to_fp16=False)
        # The weights lie beside the graph.
        made.with_suffix(".bin").replace(file.with_suffix(".bin"))
    return file


def arrays(batch: Sentences) -> dict[str, NDArray[np.int64]]:
    """The batch as the exported models take it."""
    return dict(zip(INPUTS, (batch.token_ids, batch.mask), strict=True))


def steps_to_make(
    model: Model, folder: Path, packages: set[str], calibration: Sequence[Sentences]
) -> list[tuple[str, Callable[[], object]]]:
    """What has to be made for these packages, as (what it is, how): in this order."""
    steps: list[tuple[str, Callable[[], object]]] = []
    if {"onnxruntime", "onnx"} <= packages:
        for int8 in (False, True):
            for fused in (False, True):
                name = f"ONNX {'int8' if int8 else 'fp32'}{', fused' if fused else ''}"
                steps.append((name, partial(onnx_file, model, folder, int8=int8, fused=fused)))
    if "openvino" in packages:
        for int8 in (False, True) if "nncf" in packages else (False,):
            make = partial(openvino_file, model, folder, int8=int8, calibration=calibration)
            steps.append((f"OpenVINO {'int8' if int8 else 'fp32'}", make))
    return steps


def _example(model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sentences, one of them padded, so that no exporter takes the mask for a constant."""
    token_ids = torch.full((2, 16), model.config.vocabulary // 2)
    mask = torch.ones_like(token_ids)
    mask[1, 8:] = 0
    return token_ids, mask


@contextlib.contextmanager
def _made(file: Path) -> Iterator[Path]:
    """A path to write to that becomes `file` if all goes well; what the tools say is dropped."""
    file.parent.mkdir(parents=True, exist_ok=True)
    made = file.with_name(f"making-{os.getpid()}-{file.name}")
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield made
    made.replace(file)
