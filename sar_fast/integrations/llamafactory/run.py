"""``sar-fast llamafactory train`` and ``export``: LLaMA-Factory's own, with SAR's keys among its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import yaml
from llamafactory.hparams import (
    DataArguments,
    FinetuningArguments,
    GeneratingArguments,
    ModelArguments,
    TrainingArguments,
    get_train_args,
    read_args,
)
from llamafactory.train.tuner import export_model, run_exp
from omegaconf.errors import OmegaConfBaseException
from transformers import TrainerCallback

from sar_fast.integrations.llamafactory.checks import check
from sar_fast.integrations.llamafactory.options import NAMES, PLAIN, Given, check_names, split, value_of
from sar_fast.integrations.llamafactory.resuming import KeptOptions, check_resume
from sar_fast.integrations.llamafactory.trainer import chosen_trainer
from sar_fast.integrations.trainer_callback import SARCallback
from sar_fast.lab.io.model_errors import first_line
from sar_fast.lab.training.distributed import prepare_deepspeed
from sar_fast.lab.training.gradients import GradientSparsityCallback
from sar_fast.lab.training.run_config import RunConfigCallback

EXPORT = (ModelArguments, DataArguments, FinetuningArguments, GeneratingArguments)
TRAIN = (*EXPORT, TrainingArguments)


class Run:
    """One ``llamafactory-cli train``, with SAR's keys among its own: SFT, evaluation, prediction, SAR in all of them.

    Args:
        words: of the command line: ``FILE.yaml [key=value ...]``, or flags.

    Raises:
        ValueError, TypeError, ImportError, OSError: anything that is wrong with the arguments, before data are read, a
            model is loaded or anything is written.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.options, self.theirs = split(read(words))
        check_names(self.theirs, TRAIN)
        if value_of(self.theirs, "deepspeed"):
            prepare_deepspeed()
        model, data, training, finetuning, _ = get_train_args(self.theirs)
        if training.do_train:
            check_resume(self.options, training.resume_from_checkpoint)
        config = check(self.options, model, data, training, finetuning)
        self.callbacks: list[TrainerCallback] = [
            RunConfigCallback(None, self.options.to_dict()),
            KeptOptions(self.options),
        ]
        if config is not None:
            self.callbacks.append(SARCallback(config))
        if training.do_train and self.options.analysis.gradient_analysis:
            every = self.options.analysis.steps_between(training.logging_steps)
            self.callbacks.append(GradientSparsityCallback(every=every))

    def __call__(self) -> None:
        """Run it; LLaMA-Factory parses its own arguments once more."""
        with chosen_trainer(self.options.control):
            run_exp(self.theirs, self.callbacks)


def export(words: Sequence[str]) -> None:
    """What ``llamafactory-cli export`` does: a plain model, as no saved one holds anything of SAR."""
    options, theirs = split(read(words))
    if options != PLAIN:
        raise ValueError(f"export writes a plain model: {', '.join(sorted(NAMES))} have no effect; leave them out")
    check_names(theirs, EXPORT)
    export_model(theirs)


def read(words: Sequence[str]) -> Given:
    """The keys of a YAML file, or flags, as LLaMA-Factory reads them from its command line."""
    if words and words[0].endswith(".json"):
        raise ValueError(f"{words[0]}: LLaMA-Factory reads YAML files; give one")
    before, sys.argv = sys.argv, [sys.argv[0], *words]
    try:
        return read_args()
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{' '.join(words)} cannot be read: {first_line(error)}") from error
    finally:
        sys.argv = before
