"""Trainers: supervised fine-tuning, and the control group with visual supervision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from sar_fast.training.checkpoints import WholeCheckpoints
from sar_fast.training.contrastive import OUTPUT_NAME, ContrastiveHead, ContrastiveSupervision
from sar_fast.training.saving import PlainModels


class SFTTrainer(WholeCheckpoints, PlainModels, Trainer):
    """The Hugging Face Trainer; a checkpoint is whole or not there."""


class ControlSFTTrainer(SFTTrainer):
    """Text loss plus ``visual_contrastive_loss_weight`` times the symmetric CLIP-style loss.

    Logs ``loss_text_gen`` and ``loss_contrastive``, in the scale of ``loss``: means over optimizer steps and ranks, so
    that ``loss = loss_text_gen + weight * loss_contrastive``. Weight 0 trains exactly as :class:`SFTTrainer` does.

    The text loss is a mean over all answer tokens of an optimizer step; the contrastive loss, whose negatives are the
    samples of one micro-batch on all ranks, is averaged over the step's micro-batches.

    Args:
        visual_contrastive_loss_weight: >= 0.
        visual_contrastive_temperature, learnable_temperature: of :class:`~.contrastive.ContrastiveHead`.
        visual_contrastive_text_pool: ``"all"``, ``"prompt"`` or ``"answer"``.
        kwargs: of the Trainer.
    """

    def __init__(
        self,
        *args: Any,
        visual_contrastive_loss_weight: float = 0.1,
        visual_contrastive_temperature: float = 1.0,
        learnable_temperature: bool = False,
        visual_contrastive_text_pool: str = "all",
        **kwargs: Any,
    ) -> None:
        weight = visual_contrastive_loss_weight
        if not weight >= 0:
            raise ValueError(f"visual_contrastive_loss_weight must be >= 0; got {weight}")
        if weight == 0 and learnable_temperature:
            raise ValueError("learnable_temperature needs visual_contrastive_loss_weight > 0; got 0")
        model = kwargs.get("model", args[0] if args else None)
        if learnable_temperature and hasattr(model, "peft_config"):
            raise ValueError("learnable_temperature: adapters' checkpoints do not hold it; use a fixed temperature")
        head = ContrastiveHead(visual_contrastive_temperature, learnable_temperature)
        self.supervision = ContrastiveSupervision(model, head, visual_contrastive_text_pool, differentiable=weight > 0)
        self.weight = weight
        self._sums: dict[str, Tensor] = {}
        self._steps = 0.0  # optimizer steps in the sums
        super().__init__(*args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        text, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        contrastive = outputs.pop(OUTPUT_NAME)
        # with num_items_in_batch the text loss is this micro-batch's share of the step's mean; without it the Trainer
        # divides the sum by the number of micro-batches
        steps = self.current_gradient_accumulation_steps if self.model.training else 1
        share = 1 / steps if num_items_in_batch is not None else 1.0
        if self.model.training:
            self._add("loss_text_gen", text.detach() * (1.0 if num_items_in_batch is not None else 1 / steps))
            self._add("loss_contrastive", contrastive.detach() / steps)
            self._steps += 1 / steps
        loss = text + self.weight * share * contrastive if self.weight else text
        return (loss, outputs) if return_outputs else loss

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums:  # every rank comes here together
            for name, value in self._sums.items():
                logs[name] = self.accelerator.reduce(value, reduction="mean").item() / self._steps
            self._sums, self._steps = {}, 0.0
        super().log(logs, start_time)
