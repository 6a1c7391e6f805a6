"""SAR in any Hugging Face Trainer, of whatever library: ``Trainer(..., callbacks=[SARCallback(SARConfig())])``."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from transformers import TrainerCallback

from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.config import SARConfig
from sar_fast.hf import SARHandle, apply_sar
from sar_fast.hf.features import handle_of
from sar_fast.hf.structure import unwrap
from sar_fast.lab.training.rules import is_trained
from sar_fast.method.weighting.split import module_of


class SARCallback(TrainerCallback):
    """Puts SAR on the model when its Trainer has been made: before an optimizer is, or DDP or DeepSpeed wrap it.

    It must be among the Trainer's ``callbacks``: ``add_callback`` comes too late, which is an error when the first step
    begins. A model that has SAR already, with the same options, is left as it is.

    Args:
        config: the options of SAR; default :class:`~sar_fast.SARConfig`. A ``weighting`` with parameters is used as it
            is: one that learns is an error in training, as other Trainers would decay and not save it.

    Attributes:
        handle: of SAR on the model, from then on; ``handle.remove()`` restores the model.

    Raises:
        UnsupportedModelError: the model's family is not known.
        ValueError: the Trainer has no model, K exceeds its attention layers, SAR is on it with other options, or it was
            replaced by another model since (``model_init``).
    """

    def __init__(self, config: SARConfig | None = None) -> None:
        self.config = SARConfig() if config is None else config
        if not isinstance(self.config, SARConfig):
            raise ArgumentTypeError("config", type(config).__name__, "be a SARConfig")
        self.handle: SARHandle | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        if model is None:
            raise ArgumentError("model", "None", "be one that SARCallback can put SAR on")
        there = handle_of(unwrap(model).base_model)
        if there is not None and there.config != self.config:
            fields = [f.name for f in dataclasses.fields(SARConfig)]
            other = [n for n in fields if getattr(there.config, n) != getattr(self.config, n)]
            raise ArgumentError(
                "model", f"one with another {', '.join(other)}", "be without SAR, or have the SARCallback's"
            )
        self.handle = apply_sar(model, self.config) if there is None else there

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check(kwargs["model"])
        if is_trained(module_of(self.config.weighting)):
            raise ArgumentError(
                "weighting",
                "some",
                (
                    "have no parameters that learn, after weighting.requires_grad_(False), in any Trainer but "
                    "sar_fast.lab.training.trainers.SFTTrainer, which alone trains and saves those"
                ),
            )

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check(kwargs["model"])

    def _check(self, model: nn.Module) -> None:
        """A run without SAR that was meant to have it ends."""
        if self.handle is None:
            raise ValueError("SARCallback must be one of the Trainer's callbacks when it is made; add_callback is late")
        if handle_of(unwrap(model).base_model) is not self.handle:
            raise ArgumentError(
                "model", "another, or one that was changed (model_init?)", "be the one that SARCallback put SAR on"
            )
