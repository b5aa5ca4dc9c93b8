"""A linear head by least squares: seconds instead of a training.

The encoder runs once over the rows; ridge regression of the classes on what the head would read
gives the weights, and one number, the sharpness of the probabilities, is chosen on the same rows.

Letters: `B` rows, `H` hidden, `C` classes.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from localization.network import Examples, Network, Tuned
from localization.selection import Kept
from model_store.packing import Item, pack
from model_store.plan import LinearHead

RIDGE = 1e-2
"""As a share of the features' mean variance."""

SHARPNESS = (1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0)


def with_closed_form_head(
    network: Network, tuned: Tuned, kept: Kept | None, train: Examples, classes: int
) -> Tuned:
    """`tuned` with a linear head fitted to `train` on what is kept of the network."""
    features = read_vectors(network, tuned, kept, train)
    weight, bias = ridge(features, train.classes, classes)
    logits = features @ weight.t() + bias
    losses = [float(F.cross_entropy(sharp * logits, train.classes)) for sharp in SHARPNESS]
    sharp = SHARPNESS[losses.index(min(losses))]
    tensors = {**tuned.tensors, "head.weight": sharp * weight, "head.bias": sharp * bias}
    return dataclasses.replace(tuned, tensors=tensors)


def ridge(features: Tensor, targets: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Weight `[C, H]` and bias `[C]` of the regression of one-hot classes on `features [B, H]`."""
    x = features.double()
    y = F.one_hot(targets, classes).double()
    mean, share = x.mean(dim=0), y.mean(dim=0)
    x = x - mean
    covariance = x.t() @ x / len(x)
    strength = RIDGE * covariance.diagonal().mean() + 1e-12
    covariance += strength * torch.eye(len(covariance), dtype=x.dtype)
    weight = torch.linalg.solve(covariance, x.t() @ (y - share) / len(x)).t()
    return weight.float(), (share - weight @ mean).float()


def read_vectors(network: Network, tuned: Tuned, kept: Kept | None, examples: Examples) -> Tensor:
    """What the head reads of each row, `[B, H]` in fp32 on the CPU."""
    hidden = network.encoder.config.hidden
    device = network.encoder.ops.device
    identity = LinearHead(torch.eye(hidden, device=device), torch.zeros(hidden, device=device))
    blank = {"head.weight": identity.weight, "head.bias": identity.bias}
    plan = network.plan(dataclasses.replace(tuned, tensors={**tuned.tensors, **blank}), kept)
    result = torch.empty(len(examples), hidden)
    order = sorted(range(len(examples)), key=lambda row: len(examples.encodings[row].token_ids))
    with torch.no_grad():
        for first in range(0, len(order), 64):
            rows = order[first : first + 64]
            batch = pack([Item(examples.encodings[row], 0) for row in rows], [plan.layout])
            (vectors,) = network.encoder.forward(batch, [plan])
            result[[rows[index] for index in batch.order]] = vectors.cpu()
    return result
