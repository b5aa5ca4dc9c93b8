"""The training loop: tunes what an overlay adds to the frozen backbone, epoch by epoch.

Used by the pipeline's steps `inject` and `condense`, and by full fine-tuning, the yardstick. Knows
nothing of neuron scores or of how many neurons are kept; what is tuned is what it is given.

Letters: `B` rows.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from localization.config import Metric, TuningConfig
from localization.evaluation import evaluate
from localization.network import BACKBONE, Examples, Network, Progress, Tuned, predict
from localization.selection import Kept
from model_store.encoder import Encoder
from model_store.packing import Item, pack
from model_store.plan import Plan
from model_store.tokenization import Encoding

TOKENS_AT_ONCE = 8_192
"""Tokens of one forward and backward pass, which bound the memory that training takes."""


class Checkpoint(Protocol):
    """Where a training is kept after every epoch; `localization.stages` has one."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was saved last, or None."""
        ...

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
        """Keep tensors, and facts that are JSON."""
        ...


def tune(
    network: Network,
    begin: Tuned,
    kept: Kept | None,
    train: Examples,
    validation: Examples,
    config: TuningConfig,
    epochs: int,
    seed: int,
    progress: Progress,
    *,
    metric: Metric = "accuracy",
    enough: float | None = None,
    checkpoint: Checkpoint | None = None,
) -> Tuned:
    """Tune every tensor of `begin`; keeps the epoch that is best on the validation rows.

    AdamW, warm-up and linear decay, early stopping; also once the metric reaches `enough`. With
    `kept`, where `begin` was cut from a trained network, `begin` itself may be the best. The
    backbone is changed only where `begin` holds tensors of it. From a `checkpoint` a training goes
    on exactly as if it had never stopped.
    """
    started = time.perf_counter()
    training = _Training(network, begin, kept, train, config, epochs, seed, progress)
    found = None if checkpoint is None else checkpoint.load()
    if found is not None:
        training.restore(*found)
    elif kept is not None:  # what is cut from a trained network may be as good as it gets
        training.keep_if_best(training.measure(validation, metric))
    before = training.seconds
    while not training.ended(enough):
        training.run_epoch()
        value = training.measure(validation, metric)
        training.curve.append(value)
        training.keep_if_best(value)
        training.seconds = before + time.perf_counter() - started
        if checkpoint is not None:
            checkpoint.save(*training.state())
    progress(training.steps, training.steps, "done")
    return Tuned(training.best, training.best_value, tuple(training.curve), training.seconds)


class _Training:
    """One run of `tune`: the parameters, their optimizer, and what was best so far."""

    def __init__(
        self,
        network: Network,
        begin: Tuned,
        kept: Kept | None,
        train: Examples,
        config: TuningConfig,
        epochs: int,
        seed: int,
        progress: Progress,
    ) -> None:
        self._network, self._begin, self._kept = network, begin, kept
        self._train, self._config, self._seed, self._progress = train, config, seed, progress
        self._epochs = epochs
        device = network.encoder.ops.device
        self._tensors = {
            name: tensor.detach().clone().to(device).requires_grad_()
            for name, tensor in begin.tensors.items()
        }
        self._frozen = network.frozen(begin, kept)
        self._optimizer = torch.optim.AdamW(_groups(self._tensors, config), fused=True)
        self.steps = -(-len(train) // config.batch_size) * epochs
        self.best: Mapping[str, Tensor] = begin.tensors
        self.best_value = -1.0
        self.curve: list[float] = []
        self.seconds = 0.0

    def ended(self, enough: float | None) -> bool:
        """Whether all epochs are done, nothing gets better, or it is good enough."""
        if enough is not None and self.best_value >= enough:
            return True
        if not self.curve:
            return self._epochs == 0
        latest_best = max(at for at, value in enumerate(self.curve) if value == max(self.curve))
        waited = len(self.curve) - 1 - latest_best
        return len(self.curve) >= self._epochs or waited >= self._config.patience

    def run_epoch(self) -> None:
        """One pass over the training rows."""
        epoch = len(self.curve)
        size = self._config.batch_size
        done = epoch * -(-len(self._train) // size)
        for rows in batches(self._train.encodings, size, self._seed * 1000 + epoch):
            self._optimizer.zero_grad()
            for part in parts_of(rows, self._train.encodings):
                network, plan = self._plan()
                loss = _loss(network.encoder, plan, self._train, part)
                (loss * (len(part) / len(rows))).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self._tensors.values(), 1.0)
            for group in self._optimizer.param_groups:
                group["lr"] = group["rate"] * self._share_of_rate(done)
            self._optimizer.step()
            done += 1
            self._progress(done, self.steps, f"epoch {epoch + 1}")

    def measure(self, examples: Examples, metric: Metric) -> float:
        """The metric of the network as it is now."""
        with torch.no_grad():
            network, plan = self._plan()
            given = predict(network.encoder, plan, examples.encodings)
        return evaluate(given.argmax(dim=1), examples.classes, given.shape[1]).value(metric)

    def keep_if_best(self, value: float) -> None:
        """Keep the parameters unless earlier ones were better.

        On small validation sets equal values are common; the later epoch has learned more.
        """
        if value >= self.best_value:
            self.best_value = value
            self.best = {name: part.detach().cpu().clone() for name, part in self._tensors.items()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Everything that the rest of the training depends on."""
        tensors = {f"best:{name}": part for name, part in self.best.items()}
        for name, part in self._tensors.items():
            tensors[f"now:{name}"] = part.detach().cpu()
            for key, value in self._optimizer.state[part].items():
                tensors[f"{key}:{name}"] = value.cpu()
        facts = {"curve": self.curve, "best_value": self.best_value, "seconds": self.seconds}
        return tensors, facts

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go back to a `state`."""
        self.curve, self.seconds = list(facts["curve"]), facts["seconds"]
        self.best_value = facts["best_value"]
        self.best = {
            name.removeprefix("best:"): part
            for name, part in tensors.items()
            if name.startswith("best:")
        }
        for name, part in self._tensors.items():
            with torch.no_grad():
                part.copy_(tensors[f"now:{name}"])
            self._optimizer.state[part] = {
                key: tensors[f"{key}:{name}"].to(part.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }

    def _share_of_rate(self, step: int) -> float:
        """Warm-up, then a straight line down to almost nothing at the last step."""
        warm_up = max(1, min(50, self.steps // 10))
        return min(1.0, (step + 1) / warm_up) * (1.0 - step / (self.steps + 1))

    def _plan(self) -> tuple[Network, Plan]:
        network = self._network.with_backbone(self._tensors)
        frozen = self._frozen
        if network is not self._network:  # the backbone itself is tuned, and another at every step
            frozen = network.frozen(self._begin, self._kept)
        return network, network.with_parameters(frozen, self._tensors)


def _groups(tensors: Mapping[str, Tensor], config: TuningConfig) -> list[dict[str, object]]:
    """Parameter groups: each kind has its learning rate; only matrices decay."""
    # A head beside deltas or a whole backbone learns with them; alone it must move further.
    joint = any(name.startswith(("delta.", BACKBONE)) for name in tensors)
    rates = {
        "prompt": config.prompt_learning_rate,
        "head": config.delta_learning_rate if joint else config.head_learning_rate,
        "delta": config.delta_learning_rate,
        "norm": config.delta_learning_rate,
        "ffn": config.delta_learning_rate / 2,
        "backbone": config.backbone_learning_rate,
    }
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, tensor in tensors.items():
        kind = name.split(".")[0]
        decays = kind in ("head", "delta", "backbone") and tensor.dim() == 2
        decay = config.weight_decay if decays else 0.0
        groups.setdefault((rates[kind], decay), []).append(tensor)
    return [
        {"params": params, "lr": rate, "rate": rate, "weight_decay": decay}
        for (rate, decay), params in groups.items()
    ]


def batches(encodings: Sequence[Encoding], size: int, seed: int) -> Iterator[list[int]]:
    """Random batches of row indices, of similar lengths: equal ones run together."""
    generator = random.Random(seed)  # noqa: S311 - not for secrets
    order = list(range(len(encodings)))
    generator.shuffle(order)
    groups: list[list[int]] = []
    for first in range(0, len(order), 32 * size):
        pool = sorted(
            order[first : first + 32 * size], key=lambda row: len(encodings[row].token_ids)
        )
        groups += [pool[at : at + size] for at in range(0, len(pool), size)]
    generator.shuffle(groups)
    yield from groups


def parts_of(rows: Sequence[int], encodings: Sequence[Encoding]) -> Iterator[list[int]]:
    """A batch in parts of at most `TOKENS_AT_ONCE` tokens, whose gradients add up to the batch's.

    A batch of long texts so needs no more memory than one of short ones, and nothing is computed
    twice, as it is with gradient checkpointing. One row is always a part.
    """
    part: list[int] = []
    tokens = 0
    for row in rows:
        length = len(encodings[row].token_ids)
        if part and tokens + length > TOKENS_AT_ONCE:
            yield part
            part, tokens = [], 0
        part.append(row)
        tokens += length
    yield part


def _loss(encoder: Encoder, plan: Plan, examples: Examples, rows: Sequence[int]) -> Tensor:
    batch = pack([Item(examples.encodings[row], 0) for row in rows], [plan.layout])
    (logits,) = encoder.forward(batch, [plan])
    targets = examples.classes[[rows[index] for index in batch.order]]
    return F.cross_entropy(logits, targets.to(logits.device))
