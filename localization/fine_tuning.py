"""Full fine-tuning of the backbone for one task: the yardstick that overlays are compared with.

Every weight is trained, embeddings included, with a linear head and without a prompt. The result is
a network of its own, as large as the backbone, and no overlay: it is measured and thrown away.
"""

import torch
from torch import Tensor

from localization.config import TuningConfig
from localization.evaluation import evaluate
from localization.job import Job
from localization.network import BACKBONE, Examples, Tuned, predict, start
from localization.results import Answers
from localization.tuning import tune


def fine_tune(job: Job, config: TuningConfig, rate: float, seed: int) -> Tuned:
    """Train everything at learning rate `rate`; `config` gives epochs and batches."""
    begin = start(job.tuning, len(job.labels), 0, seed)
    backbone = {
        f"{BACKBONE}{name}": tensor.float()
        for name, tensor in job.backbone.tensors.items()
        if not name.startswith("mlm.")
    }
    settings = config.model_copy(
        update={"backbone_learning_rate": rate, "delta_learning_rate": max(rate, 1e-3)}
    )
    return tune(
        job.tuning,
        Tuned({**begin.tensors, **backbone}),
        None,
        job.train,
        job.validation,
        settings,
        config.epochs,
        seed,
        job.report.step(f"fine-tune {rate:g}"),
        metric=job.config.metric,
    )


def answers_of(job: Job, tuned: Tuned, examples: Examples) -> Answers:
    """A fine-tuned network's answers, in the precision that it was trained in."""
    network = job.tuning.with_backbone(tuned.tensors)
    with torch.no_grad():
        plan = network.plan(tuned)
    given: Tensor = predict(network.encoder, plan, examples.encodings)
    return Answers(given, evaluate(given.argmax(dim=1), examples.classes, len(job.labels)))
