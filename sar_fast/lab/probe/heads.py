"""Linear heads on the features of all layers, trained as one batched model: L independent trainings in one.

The loss is a sum over layers and AdamW works element by element, so a head's weights never see another layer's
features; every head starts from the same weights and meets the samples in the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sar_fast.base.errors import ArgumentError, check_choice

FEATURE_SCALES = ("standardize", "none")
FeatureRows = Callable[[Tensor], Tensor]  # (n,) int64 sample numbers -> (n, L, d) fp32


@dataclasses.dataclass(frozen=True)
class HeadTraining:
    """How heads are trained. ``lr``, ``epochs`` and ``batch_size`` default to the research code's.

    ``feature_scale``: ``"standardize"`` makes every feature mean 0 and variance 1 / d over the training samples, so
    that one learning rate fits all layers: a residual stream grows with depth, and with raw features a layer's score
    says how large they are as much as what is in them. ``"none"`` takes them raw, as the research code does.
    """

    lr: float = 1e-3
    epochs: int = 5
    batch_size: int = 32
    weight_decay: float = 0.01
    feature_scale: str = "standardize"

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ArgumentError("lr", self.lr, "be > 0")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ArgumentError(name, getattr(self, name), "be at least 1")
        check_choice("feature_scale", self.feature_scale, FEATURE_SCALES)


@dataclasses.dataclass(frozen=True)
class Heads:
    """``weight`` (L, d, outputs), ``bias`` (L, outputs)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(n, L, d) -> (n, L, outputs)."""
        return torch.einsum("nld,ldo->nlo", features, self.weight) + self.bias


def scaled(features: FeatureRows, rows: Tensor, training: HeadTraining) -> FeatureRows:
    """``features`` as ``training.feature_scale`` wants them, with moments of the samples ``rows`` in fp64."""
    if training.feature_scale == "none":
        return features
    total = squares = 0.0
    for batch in rows.split(256):
        values = features(batch).double()  # (n, L, d)
        total, squares = total + values.sum(0), squares + values.square().sum(0)
    mean = total / len(rows)
    deviation = (squares / len(rows) - mean.square()).clamp_min(0).sqrt()
    factor = torch.where(deviation > 1e-6 * mean.abs(), 1 / deviation, 0) * mean.shape[-1] ** -0.5
    return lambda wanted: (features(wanted) - mean.float()) * factor.float()


def train_heads(
    features: FeatureRows, targets: Tensor, rows: Tensor, outputs: int, training: HeadTraining, seed: int
) -> Heads:
    """Heads of all layers, trained on the samples ``rows``.

    Args:
        features: gives features of samples. targets: (N, 4) fp32 boxes for L1 loss, or (N,) int64 classes for
            cross-entropy. rows: (n,) int64 training samples. outputs: 4, or the number of classes.
        seed: of the initial weights and of the order of samples.
    """
    generator = torch.Generator().manual_seed(seed)
    _, L, d = features(rows[:1]).shape
    bound = d**-0.5  # nn.Linear's initialisation
    uniform = lambda *shape: (2 * torch.rand(*shape, generator=generator) - 1) * bound
    weight = uniform(d, outputs).expand(L, -1, -1).clone().requires_grad_()
    bias = uniform(outputs).expand(L, -1).clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight, bias], lr=training.lr, weight_decay=training.weight_decay)
    for _ in range(training.epochs):
        for batch in rows[torch.randperm(len(rows), generator=generator)].split(training.batch_size):
            predicted = Heads(weight, bias)(features(batch))  # (n, L, outputs)
            loss = loss_per_layer(predicted, targets[batch]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Heads(weight.detach(), bias.detach())


@torch.no_grad()
def mean_loss(heads: Heads, features: FeatureRows, targets: Tensor, rows: Tensor, batch_size: int = 256) -> Tensor:
    """(L,) mean loss of each layer's head over the samples ``rows``."""
    batches = rows.split(batch_size)
    return sum(loss_per_layer(heads(features(b)), targets[b]).double() * len(b) for b in batches) / len(rows)


def root_mean_square(features: FeatureRows, rows: Tensor, batch_size: int = 256) -> Tensor:
    """(L,) how large features are in each layer, over the samples ``rows``."""
    squares = sum(features(batch).double().square().mean(2).sum(0) for batch in rows.split(batch_size))
    return (squares / len(rows)).sqrt()


def loss_per_layer(predicted: Tensor, targets: Tensor) -> Tensor:
    """(n, L, outputs) and (n, 4) or (n,) -> (L,) mean loss of each layer."""
    if targets.is_floating_point():
        return (predicted - targets[:, None]).abs().mean((0, 2))
    n, L, _ = predicted.shape
    losses = F.cross_entropy(predicted.flatten(0, 1), targets.repeat_interleave(L), reduction="none")
    return losses.view(n, L).mean(0)


@torch.no_grad()
def predict(heads: Heads, features: FeatureRows, rows: Tensor, batch_size: int = 256) -> Tensor:
    """(n, L, outputs) of the samples ``rows``."""
    return torch.cat([heads(features(batch)) for batch in rows.split(batch_size)])


def corners(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) as (x1, y1, x2, y2), of (centre x, centre y, width, height)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)
