"""A task's network in training: the frozen backbone, what is tuned beside it, and its answers.

Parameters go by their names in an artifact (`prompt`, `head.weight`, `delta.0.q.up`); the
backbone's own, which only full fine-tuning changes, as `backbone.` and their name. Knows nothing
of how anything is trained, of neuron scores or of files.

Letters: `B` rows, `P` prompt length, `E` embedding width, `C` classes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localization.selection import Kept
from model_store.encoder import Encoder
from model_store.packing import Item, Read, pack
from model_store.plan import LinearHead, Plan, VerbalizerHead, beside, owns_layers
from model_store.tokenization import Encoding

BACKBONE = "backbone."
"""Before the names of the backbone's own tensors, where they are tuned."""

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
    """What tuning finds, on the CPU in fp32 and by artifact tensor name, and how it went."""

    tensors: Mapping[str, Tensor]
    validation: float = 0.0
    """The metric on the validation rows, 0 to 1, of the best epoch, which is the one kept."""
    curve: tuple[float, ...] = ()
    """The same after each epoch; empty where training was not needed."""
    seconds: float = 0.0
    """That the training took."""

    @property
    def prompt(self) -> Tensor | None:
        """`[P, E]`"""
        return self.tensors.get("prompt")

    @property
    def changes(self) -> dict[str, Tensor]:
        """What is changed inside the layers; see `model_store.plan`."""
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if name.split(".")[0] in ("delta", "norm", "ffn")
        }


@dataclass(frozen=True)
class Network:
    """What a task's plan is made of besides what is tuned."""

    encoder: Encoder
    read: Read
    verbalizer: VerbalizerHead | None

    def plan(self, tuned: Tuned, kept: Kept | None = None) -> Plan:
        """A plan of the whole network, or of what is kept, with the changes beside it."""
        return self.with_parameters(self.frozen(tuned, kept), tuned.tensors)

    def frozen(self, tuned: Tuned, kept: Kept | None = None) -> Plan:
        """The plan's frozen weights, cut once; without prompt and changes."""
        count = self.encoder.config.layers
        ffn = tuple(
            self.encoder.ffn(layer, None if kept is None else kept.neurons[layer])
            for layer in range(count)
        )
        heads = None if kept is None else kept.heads
        layers = None
        if heads is not None or owns_layers(tuned.changes):
            layers = tuple(
                self.encoder.layer(number, None if heads is None else heads[number])
                for number in range(count)
            )
        return Plan(self.read, self._head(tuned.tensors), ffn, layers=layers)

    def with_parameters(self, frozen: Plan, tensors: Mapping[str, Tensor]) -> Plan:
        """The plan with prompt, head and changes of `tensors`, which keep their gradients."""
        prompt = tensors.get("prompt")
        if prompt is not None:
            prompt = prompt.to(self.encoder.ops.device)
        plan = dataclasses.replace(frozen, prompt=prompt, head=self._head(tensors))
        return beside(plan, tensors)

    def with_backbone(self, tensors: Mapping[str, Tensor]) -> "Network":
        """The network on the backbone tensors among `tensors`; itself where there are none."""
        own = {
            name.removeprefix(BACKBONE): tensor
            for name, tensor in tensors.items()
            if name.startswith(BACKBONE)
        }
        if not own:
            return self
        encoder = Encoder(self.encoder.config, {**self.encoder.tensors, **own}, self.encoder.ops)
        return dataclasses.replace(self, encoder=encoder)

    def _head(self, tensors: Mapping[str, Tensor]) -> LinearHead | VerbalizerHead:
        if self.verbalizer is not None:
            return self.verbalizer
        device = self.encoder.ops.device
        return LinearHead(tensors["head.weight"].to(device), tensors["head.bias"].to(device))


def start(network: Network, classes: int, prompt_tokens: int, seed: int) -> Tuned:
    """Where tuning starts: random words as prompt (Lester et al. 2021), a zero head."""
    config = network.encoder.config
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    if prompt_tokens:
        words = torch.randint(config.vocabulary, (prompt_tokens,), generator=generator)
        tensors["prompt"] = network.encoder.word_embeddings(words).cpu()
    if network.verbalizer is None:
        tensors["head.weight"] = torch.zeros(classes, config.hidden)
        tensors["head.bias"] = torch.zeros(classes)
    return Tuned(tensors)


def predict(
    encoder: Encoder, plan: Plan, encodings: Sequence[Encoding], progress: Progress = no_progress
) -> Tensor:
    """Class probabilities `[B, C]` in fp32 on the CPU, in the order of `encodings`."""
    order = sorted(range(len(encodings)), key=lambda row: len(encodings[row].token_ids))
    parts, rows = [], []
    with torch.no_grad():
        if plan.prompt is not None:
            first = None if plan.layers is None else plan.layers[0]
            plan = dataclasses.replace(plan, prompt_cache=encoder.prompt_cache(plan.prompt, first))
        for at in range(0, len(order), 64):
            group = order[at : at + 64]
            batch = pack([Item(encodings[row], 0) for row in group], [plan.layout])
            parts.append(encoder.forward(batch, [plan])[0].softmax(dim=1).cpu())
            rows += [group[index] for index in batch.order]
            progress(len(rows), len(order), "rows")
    packed = torch.cat(parts)
    result = torch.empty_like(packed)
    result[rows] = packed
    return result
