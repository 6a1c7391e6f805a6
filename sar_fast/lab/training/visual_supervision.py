"""The control group's loss (section 3.3 of the paper) in any Trainer: text, and visual supervision beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.training.contrastive import OUTPUT_NAME, ContrastiveHead, ContrastiveSupervision


class VisualSupervision:
    """Mix-in of a Trainer: adds ``visual_contrastive_loss_weight`` times the symmetric CLIP-style loss to its own.

    Logs ``loss_text_gen`` and ``loss_contrastive``, in the scale of ``loss``: means over optimizer steps and ranks, so
    that ``loss = loss_text_gen + weight * loss_contrastive``. Weight 0 trains exactly as the Trainer alone does, and an
    evaluation's loss is the text's alone.

    The contrastive loss, whose negatives are the samples of one micro-batch on all ranks, is averaged over the step's
    micro-batches; the text loss is what the Trainer makes of it.

    Args:
        visual_contrastive_loss_weight: >= 0.
        visual_contrastive_temperature, learnable_temperature: of :class:`~.contrastive.ContrastiveHead`.
        visual_contrastive_text_pool: ``"all"``, ``"prompt"`` or ``"answer"``.
        kwargs: of the Trainer.

    Attributes:
        contrastive: the contrastive loss of the last micro-batch, without gradient.
    """

    def __init__(
        self: Trainer,
        *args: Any,
        visual_contrastive_loss_weight: float = 0.1,
        visual_contrastive_temperature: float = 1.0,
        learnable_temperature: bool = False,
        visual_contrastive_text_pool: str = "all",
        **kwargs: Any,
    ) -> None:
        weight = visual_contrastive_loss_weight
        if not weight >= 0:
            raise ArgumentError("visual_contrastive_loss_weight", weight, "be >= 0")
        if weight == 0 and learnable_temperature:
            raise ArgumentError("visual_contrastive_loss_weight", 0, "be > 0 with {learnable_temperature}")
        model = kwargs.get("model", args[0] if args else None)
        if learnable_temperature and hasattr(model, "peft_config"):
            raise ArgumentError(
                "learnable_temperature", True, "be False for adapters, whose checkpoints do not hold it"
            )
        head = ContrastiveHead(visual_contrastive_temperature, learnable_temperature)
        self.supervision = ContrastiveSupervision(model, head, visual_contrastive_text_pool, differentiable=weight > 0)
        self.weight = weight
        self._sums: dict[str, Tensor] = {}
        self._steps = 0.0  # optimizer steps in the sums
        super().__init__(*args, **kwargs)

    def compute_loss(
        self: Trainer,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        contrastive = outputs.pop(OUTPUT_NAME)
        self.contrastive = contrastive.detach()
        if self.model.training:
            # with num_items_in_batch the text loss is this micro-batch's share of the step's mean; without it the
            # Trainer divides the sum by the number of micro-batches
            steps, shared = self.current_gradient_accumulation_steps, num_items_in_batch is not None
            self._add("loss_text_gen", loss.detach() * (1.0 if shared else 1 / steps))
            self._add("loss_contrastive", self.contrastive / steps)
            self._steps += 1 / steps
            if self.weight:
                loss = loss + self.weight * (1 / steps if shared else 1.0) * contrastive
        return (loss, outputs) if return_outputs else loss

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def log(self: Trainer, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums:  # every rank comes here together
            for name, value in self._sums.items():
                logs[name] = self.accelerator.reduce(value, reduction="mean").item() / self._steps
            self._sums, self._steps = {}, 0.0
        super().log(logs, start_time)
