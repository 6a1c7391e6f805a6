"""SAR's rule in training: a rule with parameters is trained with the model, and saved beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from sar_fast.hf.rule_module import NAME, rule_of
from sar_fast.method.weighting.files import has_parameters, read_parameters, save_weighting
from sar_fast.method.weighting.protocol import needs_statistics
from sar_fast.method.weighting.registry import weighting_to_dict


def learned_rule(model: nn.Module) -> nn.Module | None:
    """The rule of SAR on a model, wrapped or not, if it has parameters."""
    rule = rule_of(model)
    return rule if has_parameters(rule) else None


def is_trained(rule: nn.Module | None) -> bool:
    """Whether a rule has parameters that learn."""
    return rule is not None and any(p.requires_grad for p in rule.parameters())


def learns_from_statistics(model: nn.Module) -> bool:
    """Whether a model's rule learns, and is not asked in a batch without pictures, where there are no statistics."""
    rule = rule_of(model)
    return is_trained(rule) and needs_statistics(rule)


def load_rule(model: nn.Module, folder: Path) -> None:
    """Read the parameters of a model's rule, if it has any, from a checkpoint; ``ValueError`` where they do not fit."""
    rule = learned_rule(model)
    if rule is not None:
        read_parameters(rule, folder)


class SavedRules:
    """Mix-in of a Trainer: wherever a model is saved, its rule's files stand beside it, if the rule has parameters.

    They are not decayed, as those of norms are not: towards 0 a scale silences its head.
    """

    def __init__(self: Trainer, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if (rule := learned_rule(self.model)) is not None:
            weighting_to_dict(rule)  # one without a name could not be saved: better said now

    def save_model(self: Trainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if (rule := learned_rule(self.model)) is not None:
            with gathered(rule):  # every rank enters
                if self.args.should_save:
                    folder = Path(output_dir or self.args.output_dir)
                    folder.mkdir(parents=True, exist_ok=True)
                    save_weighting(rule, folder)
        super().save_model(output_dir, _internal_call)

    def get_decay_parameter_names(self: Trainer, model: nn.Module) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if NAME not in name.split(".")]


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """In here a module's parameters are whole, where ZeRO-3 splits them over ranks; then a collective."""
    split = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split):
        yield
