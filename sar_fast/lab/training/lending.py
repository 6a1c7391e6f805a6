"""A model that the caller has, for the time of a training: its weights change, and nothing else of it does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from sar_fast.hf.features import handle_of
from sar_fast.hf.structure import unwrap
from sar_fast.lab.training.contrastive import ContrastiveSupervision
from sar_fast.lab.training.gradients import GradientSparsityCallback
from sar_fast.lab.training.throughput import ThroughputCallback, TrainingFlops

GUESTS = (ContrastiveSupervision, GradientSparsityCallback, ThroughputCallback, TrainingFlops)  # they hook into a model


@contextlib.contextmanager
def lent(model: nn.Module, checkpointing: bool = False) -> Iterator[None]:
    """Lends a model to a Trainer and takes it back, with or without an error.

    Afterwards SAR is on it as it was before, hooks, heads and wrappers of the training are off, configuration and modes
    of its parts are what they were, and there are no gradients. It stays on the Trainer's device.

    Args:
        checkpointing: whether the Trainer is to checkpoint activations, which needs inputs that require gradients.
    """
    inner = unwrap(model)
    own, modes = handle_of(inner.base_model), [(part, part.training) for part in model.modules()]
    configs = [(config, dict(vars(config))) for config in (inner.config, inner.config.get_text_config())]
    attributes = dict(vars(model))
    checkpointed = checkpoints_activations(inner)
    if checkpointing:
        inner.enable_input_require_grads()
    try:
        yield
    finally:
        handle = handle_of(inner.base_model)
        if handle is not None and handle is not own:
            handle.remove()
        for guest in guests(inner):
            guest.remove()
        if checkpointing:
            inner.disable_input_require_grads()
        if checkpoints_activations(inner) and not checkpointed:
            inner.gradient_checkpointing_disable()
        for thing, values in [*configs, (model, attributes)]:  # accelerate wraps ``forward`` of mixed precision
            vars(thing).clear()
            vars(thing).update(values)
        for part, mode in modes:
            part.training = mode
        model.zero_grad(set_to_none=True)


def guests(model: nn.Module) -> list[Any]:
    """What a training hooked into a model, each once."""
    hooks = (hooks for part in model.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks))
    owners = (getattr(hook, "__self__", None) for found in hooks for hook in found.values())
    return list(dict.fromkeys(owner for owner in owners if isinstance(owner, GUESTS)))


def checkpoints_activations(model: nn.Module) -> bool:
    """Whether any part of a model computes its activations again in backward."""
    return any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
