"""What the Trainer would find wrong at the first step, or at the end of a run, found before anything is replaced."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn
from transformers import Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames

from sar_fast.base.errors import ArgumentError
from sar_fast.base.extras import need
from sar_fast.lab.io.model_errors import first_line
from sar_fast.lab.training.arguments import Arguments, SFTArguments


def check_packages(arguments: Arguments) -> None:
    """``ImportError`` for flags that need a package which is not installed; a run would find out at its end."""
    if arguments.training.plot_loss:
        need("plot_loss", "matplotlib")
    for name in ("tensorboard", "wandb"):
        if name in arguments.training.report_to:
            need(f"report_to {name}", name)
    if arguments.training.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise ImportError("use_liger_kernel needs liger_kernel: pip install liger-kernel")


def check_trackers(training: SFTArguments) -> None:
    """``ValueError`` for a tracker that is none or is not installed, and for Weights & Biases without a key."""
    for name in set(training.report_to) - {"tensorboard", "wandb"}:
        try:
            (callback,) = get_reporting_integration_callbacks([name])
            callback()
        except (ImportError, RuntimeError, ValueError) as error:
            raise ArgumentError(
                "report_to", f"{name}: {first_line(error)}", "be trackers that can be started"
            ) from error
    if "wandb" not in training.report_to or training.process_index != 0:
        return
    import wandb

    reason = ""
    try:
        known = wandb.setup().settings.mode in ("offline", "dryrun", "disabled") or wandb.login(prompt=False)
    except TypeError:  # an older wandb, which cannot look without asking
        return
    except wandb.Error as error:
        known, reason = False, f" ({' '.join(str(error).split())})"
    if not known:
        raise ArgumentError(
            "report_to",
            f"none{reason}",
            (
                "come with a key for wandb: set WANDB_API_KEY or run `wandb login`; WANDB_MODE=offline keeps the "
                "log on this machine, {report_to} none keeps none"
            ),
        )


def check_optimizer(trainer: Trainer) -> None:
    """``ValueError`` for an optimizer or a schedule that cannot be made as the flags say.

    The optimizer stays the Trainer's. DeepSpeed and FSDP make theirs of weights that are split over ranks first.
    """
    training = trainer.args
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        try:
            trainer.create_optimizer()
        except (AttributeError, ImportError, TypeError, ValueError) as error:
            options = "" if training.optim_args is None else f" of {training.optim_args}"
            raise ArgumentError(
                "optim",
                f"{OptimizerNames(training.optim).value}{options}: {first_line(error)}",
                "be one that can be made",
            ) from error
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=training.learning_rate)
    options, kind = training.lr_scheduler_kwargs, training.lr_scheduler_type.value
    try:
        get_scheduler(kind, stand_in, training.get_warmup_steps(100), 100, options)
    except (TypeError, ValueError) as error:
        given = f" of {options!r}" if options else ""
        raise ArgumentError(
            "lr_scheduler_type", f"{kind}{given}: {first_line(error)}", "be one that can be made"
        ) from error
