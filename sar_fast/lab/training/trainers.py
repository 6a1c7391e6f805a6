"""Trainers: supervised fine-tuning, and the control group with visual supervision."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from sar_fast.hf.structure import unwrap
from sar_fast.lab.training.checkpoints import SETTINGS, TOTALS, WholeCheckpoints
from sar_fast.lab.training.losses import SmoothedLoss, sample_losses
from sar_fast.lab.training.rules import SavedRules
from sar_fast.lab.training.saving import PlainModels
from sar_fast.lab.training.visual_supervision import VisualSupervision

NOTHING = {"step": 0, "loss_sum": 0.0, "seconds": 0.0}


class SFTTrainer(WholeCheckpoints, SavedRules, PlainModels, Trainer):
    """The Hugging Face Trainer; a checkpoint is whole or not there, and figures are of the whole run.

    - ``label_smoothing_factor`` smooths the model's own loss. (transformers compares logits with the labels of the same
      position in models that are no plain causal language model by name, as multimodal ones are.)
    - ``eval_loss`` is the mean of -log p over all answer tokens, whatever the batches; it is not smoothed.
    - After a resume ``train_loss`` and the throughput are those of the whole run, as far as checkpoints hold it.

    Args:
        run_settings: plain values that every checkpoint keeps (``run_settings.json``), for
            :func:`~sar_fast.lab.training.resume.check_same_run`.
        kwargs: of the Trainer.
    """

    def __init__(self, *args: Any, run_settings: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        smoothing = self.args.label_smoothing_factor
        self._smoothed = SmoothedLoss(smoothing) if smoothing else None
        self.label_smoother = None  # the Trainer's own
        self.run_settings = run_settings
        self._totals = dict(NOTHING)  # of the run before this process took over
        self._loss_sum: Tensor | float = 0.0  # of this process, over micro-batches
        self._began = time.monotonic()
        self._evaluated: list[Tensor] = []
        self._samples: Tensor | None = None

    # the whole run

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        found = resume_from_checkpoint
        if found is True:  # as the Trainer finds it
            found = get_last_checkpoint(self.args.output_dir)
        path = Path(found) / TOTALS if found else None
        self._totals = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else dict(NOTHING)
        self._loss_sum, self._began = 0.0, time.monotonic()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:  # resumed after its last step: another would change it
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._loss_sum = self._loss_sum + loss.detach().nan_to_num(0.0, 0.0, 0.0)
        return loss

    def save_beside(self, folder: Path) -> None:
        """The run's settings, and its loss and time up to this checkpoint."""
        totals = {
            "step": self.state.global_step,
            "loss_sum": self._totals["loss_sum"] + self._loss_here(),
            "seconds": self._totals["seconds"] + time.monotonic() - self._began,
        }
        if self.args.should_save:
            (folder / TOTALS).write_text(json.dumps(totals, indent=2) + "\n", encoding="utf-8")
            if self.run_settings is not None:
                (folder / SETTINGS).write_text(json.dumps(self.run_settings, indent=2) + "\n", encoding="utf-8")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs and self._totals["step"]:
            logs.update(self._whole_run(logs["train_runtime"]))
        super().log(logs, start_time)

    def _loss_here(self) -> float:
        """Sum of this process's steps' losses, the mean over ranks; every rank enters."""
        here = torch.as_tensor(self._loss_sum, dtype=torch.float32, device=self.args.device)
        return self.accelerator.reduce(here, reduction="mean").item()

    def _whole_run(self, runtime: float) -> dict[str, float]:
        """Loss, time and throughput of all steps, those before the resume included; ``runtime`` is of those after."""
        args, steps = self.args, self.state.global_step
        seconds = self._totals["seconds"] + runtime
        if args.max_steps > 0:
            samples = steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        else:
            samples = len(self.train_dataset) * args.num_train_epochs * steps / self.state.max_steps
        return {
            "train_loss": (self._totals["loss_sum"] + self._loss_here()) / steps,
            "train_runtime": round(seconds, 4),
            "train_steps_per_second": round(steps / seconds, 3),
            "train_samples_per_second": round(samples / seconds, 3),
        }

    # losses

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        evaluating = not self.model.training and "labels" in inputs
        if evaluating:
            inputs = {name: value for name, value in inputs.items() if name != "skip_logits"}  # Liger's: they are read
        smoothed = self._smoothed.on(unwrap(self.model)) if self._smoothed else contextlib.nullcontext()
        with smoothed:
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if evaluating:
            packed = None if "attention_mask" in inputs else inputs.get("position_ids")
            self._samples = torch.stack(sample_losses(outputs["logits"], inputs["labels"], packed), -1)  # (samples, 2)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        self._samples = None
        result = super().prediction_step(*args, **kwargs)
        if self._samples is not None:  # gathered here, where accelerate knows which samples only fill the last batch
            self._evaluated.append(self.gather_function(self._samples))
        return result

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._evaluated = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._evaluated:
            output.metrics.update(self._evaluation(torch.cat(self._evaluated), metric_key_prefix))
        self._evaluated = []
        return output

    def _evaluation(self, samples: Tensor, prefix: str) -> dict[str, float]:
        """Metrics of what :meth:`compute_loss` kept of each sample: sum of losses, answer tokens."""
        total, tokens = samples[:, :2].sum(0).tolist()
        return {f"{prefix}_loss": total / tokens}


class ControlSFTTrainer(VisualSupervision, SFTTrainer):
    """:class:`SFTTrainer` with :class:`~.visual_supervision.VisualSupervision`, whose arguments it takes.

    The text loss is a mean over all answer tokens of an optimizer step. An evaluation's ``eval_loss`` is the text's
    alone, as of :class:`SFTTrainer`, and ``eval_loss_text_gen``; ``eval_loss_contrastive`` is the mean over samples of
    that of their batch.
    """

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(*args, **kwargs)
        if self._samples is not None:
            of_batch = self.contrastive.double().expand(len(self._samples), 1)
            self._samples = torch.cat([self._samples, of_batch.to(self._samples.device)], -1)  # (samples, 3)
        return result

    def _evaluation(self, samples: Tensor, prefix: str) -> dict[str, float]:
        metrics = super()._evaluation(samples, prefix)
        parts = {"text_gen": metrics[f"{prefix}_loss"], "contrastive": samples[:, 2].mean().item()}
        return metrics | {f"{prefix}_loss_{name}": value for name, value in parts.items()}
