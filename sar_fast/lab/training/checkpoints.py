"""Checkpoints that are whole or not there: a run that is killed while it writes one resumes from the one before."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import rotate_checkpoints

from sar_fast.lab.training.rules import load_rule

SETTINGS = "run_settings.json"  # in a checkpoint: what decides which weights its run ends with
TOTALS = "run_totals.json"  # in a checkpoint: loss and seconds up to it
REPLACED = "replaced_run"  # folder in the output folder: an earlier run, until this one's first save is whole
COMPLETE = "COMPLETE"  # a file in a checkpoint's folder, written after everything else by every rank is


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders ``checkpoint-N`` of a run, oldest first, whole or not."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def forget_replaced(output_dir: Path) -> None:
    """Delete the earlier run that was moved aside: this one has a whole save."""
    shutil.rmtree(Path(output_dir) / REPLACED, ignore_errors=True)


def last_complete(output_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    return next((p for p in reversed(checkpoints(output_dir)) if (p / COMPLETE).is_file()), None)


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Read a checkpoint's weights into ``model``, in place; ``ValueError`` if one of the model's is not there.

    What the model is saved without is not asked for: the parameters of SAR's rule, which have a file of their own.
    """
    weights = type(model).from_pretrained(folder, dtype=model.dtype).state_dict()
    missing = set(model.load_state_dict(weights, strict=False).missing_keys) - set(model._keys_to_ignore_on_save or ())
    for file in sorted(folder.glob("*.safetensors")):  # parameters that were added to the model: the temperature
        with safe_open(file, "pt") as tensors:
            added = {name: tensors.get_tensor(name) for name in missing & set(tensors.keys())}
        model.load_state_dict(added, strict=False)
        missing -= set(added)
    if missing:
        raise ValueError(f"checkpoint {folder} has no {', '.join(sorted(missing)[:3])}; {len(missing)} weights missing")


class WholeCheckpoints:
    """Mix-in of a Trainer: marks a checkpoint when all ranks have written it, and only then deletes older ones.

    A failed write (a full disk) removes the half-written folder and raises ``RuntimeError`` with the last whole one.

    Weights are read back as ``from_pretrained`` reads them. The Trainer itself matches the names in the file with those
    of the running model, which differ in most multimodal families (``language_model.model...`` on disk,
    ``model.language_model...`` in memory), and then goes on with the weights it started from, after a warning.
    """

    def _load_from_checkpoint(self: Trainer, resume_from_checkpoint: str, model: Any = None) -> None:
        target = self.model if model is None else model
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        if isinstance(target, PreTrainedModel):
            load_weights(target, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_rule(target, Path(resume_from_checkpoint))

    def _load_best_model(self: Trainer) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # their own checkpoints hold all parameters
            super()._load_best_model()
            return
        best = Path(self.state.best_model_checkpoint)
        if isinstance(self.model, PreTrainedModel):
            load_weights(self.model, best)
        else:
            super()._load_best_model()
        load_rule(self.model, best)

    def save_beside(self, folder: Path) -> None:
        """Write what else belongs into a checkpoint; every rank enters."""

    def _save_checkpoint(self: Trainer, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self.save_beside(folder)
            if dist.is_initialized():
                dist.barrier()
            if self.args.should_save:
                (folder / COMPLETE).touch()
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise RuntimeError(
                f"checkpoint {folder} could not be written: {error}; the last whole one is "
                f"{last_complete(folder.parent) or 'none'}"
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            forget_replaced(folder.parent)
            rotate_checkpoints(output_dir=self.args.output_dir, save_total_limit=limit, best_model_checkpoint=best)
