"""Tunes a prompt and a head on the frozen backbone, dense or with neurons removed.

The steps `inject` and `condense` of the pipeline are both `tune`. Knows nothing of files.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from localization.config import TuningConfig
from model_store.encoder import Encoder, LinearHead, Plan, VerbalizerHead
from model_store.packing import Item, Read, pack
from model_store.tokenization import Encoding

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all and a short text."""


def no_progress(done: int, total: int, text: str) -> None:
    """For who does not watch."""


@dataclass(frozen=True)
class Examples:
    """Rows ready for the encoder: tokens, and class indices `[B]`."""

    encodings: Sequence[Encoding]
    classes: Tensor

    def __len__(self) -> int:
        return len(self.encodings)


@dataclass(frozen=True)
class Tuned:
    """What tuning finds, on the CPU in fp32, and how it went."""

    prompt: Tensor | None  # [P, E]
    weight: Tensor | None  # [C, H]; None with a verbalizer
    bias: Tensor | None  # [C]
    validation_accuracy: float
    """0 to 1, of the best epoch, which is the one kept."""
    curve: tuple[float, ...]
    """Validation accuracy after each epoch."""


@dataclass(frozen=True)
class Network:
    """What a task's plan is made of besides what is tuned."""

    encoder: Encoder
    read: Read
    verbalizer: VerbalizerHead | None

    def plan(self, tuned: Tuned, neurons: Sequence[Tensor] | None = None) -> Plan:
        """A plan of the whole network, or of `neurons` per layer alone."""
        ffn = tuple(
            self.encoder.ffn(layer, None if neurons is None else neurons[layer])
            for layer in range(self.encoder.config.layers)
        )
        return Plan(self.read, self.head(tuned.weight, tuned.bias), ffn, self._here(tuned.prompt))

    def head(self, weight: Tensor | None, bias: Tensor | None) -> LinearHead | VerbalizerHead:
        """The verbalizer, or a linear head of these tensors."""
        if self.verbalizer is not None:
            return self.verbalizer
        assert weight is not None, "a linear head has a weight"
        assert bias is not None, "a linear head has a bias"
        device = self.encoder.ops.device
        return LinearHead(weight.to(device), bias.to(device))

    def _here(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.encoder.ops.device)


def start(network: Network, classes: int, prompt_tokens: int, seed: int) -> Tuned:
    """Where tuning starts: random words as prompt (Lester et al. 2021), a zero head."""
    config = network.encoder.config
    generator = torch.Generator().manual_seed(seed)
    prompt = None
    if prompt_tokens:
        words = torch.randint(config.vocabulary, (prompt_tokens,), generator=generator)
        prompt = network.encoder.word_embeddings(words).cpu()
    if network.verbalizer is not None:
        return Tuned(prompt, None, None, 0.0, ())
    return Tuned(prompt, torch.zeros(classes, config.hidden), torch.zeros(classes), 0.0, ())


def tune(
    network: Network,
    begin: Tuned,
    neurons: Sequence[Tensor] | None,
    train: Examples,
    validation: Examples,
    config: TuningConfig,
    epochs: int,
    seed: int,
    progress: Progress,
) -> Tuned:
    """Tune prompt and head from `begin`; keeps the epoch with the best validation accuracy.

    AdamW, warm-up and linear decay, early stopping. The backbone is never changed.
    """
    device = network.encoder.ops.device
    prompt, weight, bias = (
        None if tensor is None else tensor.clone().to(device).requires_grad_()
        for tensor in (begin.prompt, begin.weight, begin.bias)
    )
    frozen = network.plan(begin, neurons)
    plan = dataclasses.replace(frozen, prompt=prompt, head=network.head(weight, bias))
    groups = [
        {
            "params": [tensor for tensor in (weight, bias) if tensor is not None],
            "lr": config.head_learning_rate,
            "weight_decay": config.weight_decay,
        },
        {
            "params": [] if prompt is None else [prompt],
            "lr": config.prompt_learning_rate,
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    steps = -(-len(train) // config.batch_size) * epochs
    warm_up = max(1, min(50, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * (1.0 - step / (steps + 1))
    )
    best, curve, done = begin, [], 0
    for epoch in range(epochs):
        for rows in batches(train.encodings, config.batch_size, seed * 1000 + epoch):
            loss = _loss(network.encoder, plan, train, rows)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            done += 1
            progress(done, steps, f"epoch {epoch + 1}")
        accuracy = accuracy_of(network.encoder, plan, validation)
        curve.append(accuracy)
        if accuracy > best.validation_accuracy or epoch == 0:
            kept = [
                None if tensor is None else tensor.detach().cpu().clone()
                for tensor in (prompt, weight, bias)
            ]
            best = Tuned(kept[0], kept[1], kept[2], accuracy, ())
        if len(curve) - 1 - curve.index(max(curve)) >= config.patience:
            break
    progress(steps, steps, "done")
    return dataclasses.replace(best, curve=tuple(curve))


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


def _loss(encoder: Encoder, plan: Plan, examples: Examples, rows: Sequence[int]) -> Tensor:
    batch = pack([Item(examples.encodings[row], 0) for row in rows], [plan.layout])
    (logits,) = encoder.forward(batch, [plan])
    targets = examples.classes[[rows[index] for index in batch.order]]
    return F.cross_entropy(logits, targets.to(logits.device))


def predict(
    encoder: Encoder, plan: Plan, encodings: Sequence[Encoding], progress: Progress = no_progress
) -> Tensor:
    """Class probabilities `[B, C]` in fp32 on the CPU, in the order of `encodings`."""
    order = sorted(range(len(encodings)), key=lambda row: len(encodings[row].token_ids))
    parts, rows = [], []
    with torch.no_grad():
        if plan.prompt is not None:
            plan = dataclasses.replace(plan, prompt_cache=encoder.prompt_cache(plan.prompt))
        for first in range(0, len(order), 64):
            group = order[first : first + 64]
            batch = pack([Item(encodings[row], 0) for row in group], [plan.layout])
            parts.append(encoder.forward(batch, [plan])[0].softmax(dim=1).cpu())
            rows += [group[index] for index in batch.order]
            progress(len(rows), len(order), "rows")
    packed = torch.cat(parts)
    result = torch.empty_like(packed)
    result[rows] = packed
    return result


def accuracy_of(encoder: Encoder, plan: Plan, examples: Examples) -> float:
    """Share of rows whose likeliest class is the right one."""
    predicted = predict(encoder, plan, examples.encodings).argmax(dim=1)
    return float((predicted == examples.classes).float().mean())
