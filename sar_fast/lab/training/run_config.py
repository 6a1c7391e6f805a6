"""The whole configuration of a run, where Weights & Biases and TensorBoard compare runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback, WandbCallback

from sar_fast.lab.training.trainer_of import trainer_of


class RunConfigCallback(TrainerCallback):
    """Hands a configuration to the trackers of a Trainer as soon as they are open, once.

    Weights & Biases' run gets it as it is, so columns are ``data.dataset``, ``model.finetuning_type``,
    ``model.use_sar``; TensorBoard gets a text ``configuration`` and the same names as hyperparameters. The Trainer
    alone sends its own arguments and the model's.

    Args:
        trainer: whose trackers; add this callback after it has been made. None: the one that the callback runs in.
        configuration: plain values, in groups by name.
    """

    def __init__(self, trainer: Trainer | None, configuration: Mapping[str, Any]) -> None:
        self.trainer, self.configuration, self._written = trainer, configuration, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(state)  # an evaluation without training has no other event

    def _write(self, state: TrainerState) -> None:
        if self._written or not state.is_world_process_zero:
            return
        self._written = True
        trainer = trainer_of(state) if self.trainer is None else self.trainer
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, WandbCallback) and callback._wandb is not None:
                callback._wandb.config.update(dict(self.configuration), allow_val_change=True)
            elif isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                from torch.utils.tensorboard.summary import hparams

                callback.tb_writer.add_text("configuration", json.dumps(self.configuration, indent=2))
                for summary in hparams(dict(_flat(self.configuration)), {}):
                    callback.tb_writer.file_writer.add_summary(summary)


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value if isinstance(value, bool | int | float | str) else str(value)
