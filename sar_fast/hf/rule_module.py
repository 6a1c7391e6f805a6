"""A rule that is a module becomes a part of the model: optimizers, wrappers and ``.to`` see its parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

from sar_fast.base.errors import ArgumentError
from sar_fast.config import SARConfig
from sar_fast.hf.features import handle_of
from sar_fast.hf.structure import unwrap
from sar_fast.method.weighting.split import Split, module_of

NAME = "sar_weighting"  # of the submodule of base models
IGNORED = "_keys_to_ignore_on_save"  # transformers' name: an attribute of models, in older versions of their classes


class _Names(set):
    """Names on a model that had no such attribute of its own."""


def rule_of(model: nn.Module) -> nn.Module | None:
    """The rule that is a part of a model, wrapped or not; None where SAR is off or its rule is no module."""
    handle = handle_of(unwrap(model).base_model)
    return None if handle is None else module_of(handle.config.weighting)


def config_for(config: SARConfig, base_model: nn.Module, replica: nn.Module) -> SARConfig:
    """The options of ``base_model`` for ``replica``, itself or a copy of it (DataParallel) with a copy of the rule."""
    weighting = config.weighting
    if replica is base_model or (rule := module_of(weighting)) is None:
        return config
    own = replica._modules.get(NAME, rule)
    if isinstance(weighting, Split):
        own = Split(own, weighting.heads, weighting.queries)
    return config.replace(weighting=own)


def put_on(model: nn.Module, rule: nn.Module, like: nn.Module) -> None:
    """Make a rule a submodule of ``model``'s base model, on the device of ``like``; its dtype stays.

    ``save_pretrained`` leaves it out: a checkpoint of the model loads without it, the rule has files of its own.
    """
    base_model = model.base_model
    if hasattr(base_model, NAME):
        raise ArgumentError(
            "model",
            f"a {type(base_model).__name__} that has one",
            f"have no attribute {NAME!r}, as SAR keeps a rule that is a module there; rename or delete it",
        )
    device = next(like.parameters()).device
    if device.type != "meta":  # an offloaded layer's weights: the rule is small and stays where it is
        rule.to(device)
    rule.train(base_model.training)
    base_model.add_module(NAME, rule)
    for owner, names in _saved_names(model, rule):
        own = IGNORED in vars(owner)
        setattr(owner, IGNORED, (set if own else _Names)((*(getattr(owner, IGNORED) or ()), *names)))


def take_off(model: nn.Module, rule: nn.Module) -> None:
    """Undo :func:`put_on`; a rule that something else has replaced meanwhile is left alone."""
    if model.base_model._modules.get(NAME) is not rule:
        return
    delattr(model.base_model, NAME)
    for owner, names in _saved_names(model, rule):
        if isinstance(getattr(owner, IGNORED), _Names):
            delattr(owner, IGNORED)
        else:
            setattr(owner, IGNORED, set(getattr(owner, IGNORED) or ()) - names)


def _saved_names(model: nn.Module, rule: nn.Module) -> list[tuple[Any, set[str]]]:
    """(model, what its ``state_dict`` calls the rule's tensors), for the model and for its base model."""
    names = {f"{NAME}.{name}" for name in rule.state_dict()}
    if model.base_model is model:
        return [(model, names)]
    return [(model.base_model, names), (model, {f"{model.base_model_prefix}.{name}" for name in names})]
