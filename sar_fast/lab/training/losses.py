"""Losses of answers: smoothed over the vocabulary for training, and per sample for evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.training.encoding import IGNORED


class SmoothedLoss:
    """Takes the place of a model's own loss function: cross-entropy with label smoothing.

    ``(1 - eps) * nll + eps * mean over the vocabulary of -log p``, each answer token against the position before it, as
    transformers' loss of causal language models is without smoothing. Models call it themselves, so that what they add
    to it (the routers' loss of mixtures of experts) stays.
    """

    def __init__(self, smoothing: float) -> None:
        self.smoothing, self.called = smoothing, False

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        self.called = True
        targets = shifted(labels, ignore_index) if shift_labels is None else shift_labels
        loss = F.cross_entropy(
            logits.float().view(-1, vocab_size),
            targets.flatten().to(logits.device),
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
            label_smoothing=self.smoothing,
        )
        if num_items_in_batch is None:
            return loss
        items = num_items_in_batch
        return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)

    @contextlib.contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Let ``model`` use it; ``ValueError`` at the end if it did not."""
        before = model.__dict__.get("_loss_function")
        model.loss_function, self.called = self, False
        try:
            yield
        finally:
            if before is None:
                del model._loss_function
            else:
                model.loss_function = before
        if not self.called:
            raise ArgumentError(
                "label_smoothing_factor", "one > 0", f"be 0 for a {type(model).__name__}, which has a loss of its own"
            )


def shifted(labels: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """(B, S) labels -> (B, S): what each position is to predict."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def sample_losses(logits: Tensor, labels: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sums of -log p over each sample's answer tokens, numbers of those), fp64.

    Args:
        logits: (B, S, vocabulary). labels: (B, S) int64, -100 where there is no answer.
        position_ids: of packed rows, (B, S): a sample begins where they are 0. None: one sample a row.

    Returns:
        (samples,) each; rows are taken one at a time, as their logits are widened to fp32.
    """
    targets = shifted(labels).to(logits.device)
    losses, counts = [], []
    for row, target in enumerate(targets):
        each = F.cross_entropy(logits[row].float(), target, ignore_index=IGNORED, reduction="none").double()  # (S,)
        counted = (target != IGNORED).double()
        if position_ids is None:
            losses.append(each.sum(0, keepdim=True))
            counts.append(counted.sum(0, keepdim=True))
            continue
        sample = (position_ids[row].to(target.device) == 0).cumsum(0) - 1
        zeros = each.new_zeros(int(sample[-1]) + 1)
        losses.append(zeros.index_add(0, sample, each))
        counts.append(zeros.index_add(0, sample, counted))
    return torch.cat(losses), torch.cat(counts)
