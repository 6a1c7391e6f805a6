"""SAR's options as flags of a command: the configuration they make, and errors that name the flag."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from sar_fast.backends.protocol import Request
from sar_fast.backends.select import choose_backend
from sar_fast.base.errors import ArgumentError, arguments_named
from sar_fast.config import PAPER_OPTIONS, SARConfig
from sar_fast.method.weighting import Weighting, find_weighting

RULE_HELP = 'Another rule for the weights: NAME, FILE.py:NAME, {"name": ..., "options": {...}} or a folder of training.'
DO_NOT_ATTEND = ("linear_attention", "conv", "mamba")  # transformers' names of such layers in a config's layer_types


def flags_of(group: Any) -> dict[str, str]:
    """Name of the flag, without dashes, by the field of ``SARConfig`` that it sets, in a group of flags.

    ``sar_beta`` is found for ``beta``, ``sav_grad`` for itself; a class attribute ``sar_flag_names`` says otherwise.
    """
    own = {field.name for field in dataclasses.fields(group)}
    found = {f.name: n for f in dataclasses.fields(SARConfig) for n in (f.name, f"sar_{f.name}") if n in own}
    return {**found, **getattr(group, "sar_flag_names", {})}


def sar_config(group: Any, model_config: Any = None) -> SARConfig:
    """The options of SAR; ``ValueError`` or ``TypeError`` names the flag that is bad.

    Args:
        group: flags; those that are None take the defaults of ``SARConfig``. With a rule, ``sar_weighting``, those of
            the paper's rule must be at their own defaults.
        model_config: a model's configuration, whose sizes a rule may ask for.
    """
    return _config(group, lambda spec: find_rule(spec, model_config))


def check_sar_flags(group: Any) -> None:
    """What can be wrong with the options of SAR whatever the model is; errors as of :func:`sar_config`."""
    with naming_flags(flags_of(group)):
        _config(group, check_rule).to_dict()  # as results keep it: a rule that cannot be written is refused


def _config(group: Any, find: Callable[[str], Weighting | None]) -> SARConfig:
    own = {field.name: field.default for field in dataclasses.fields(group)}
    fields = {f.name: n for f in dataclasses.fields(SARConfig) for n in (f.name, f"sar_{f.name}") if n in own}
    values = {field: getattr(group, name) for field, name in fields.items()}
    flags, spec = flags_of(group), values.get("weighting")
    with naming_flags(flags):
        if spec is not None:
            given = [f"--{flags[f]}" for f in PAPER_OPTIONS if f in fields and values[f] != own[fields[f]]]
            refuse_papers(f"--{flags['weighting']}", given)
            values |= {**dict.fromkeys(PAPER_OPTIONS), "weighting": find(spec)}
        return SARConfig(**values)


def refuse_papers(flag: str, given: Sequence[str]) -> None:
    """``ValueError`` if flags of the paper's rule are given beside ``flag``, that of another rule."""
    if given:
        raise ArgumentError(flag, ", ".join(given), "come without options of the paper's rule")


def find_rule(spec: str | Mapping[str, Any], model_config: Any = None) -> Weighting:
    """:func:`~sar_fast.weighting.find_weighting` with the sizes of a model, if any; errors begin with "weighting"."""
    sizes = {}
    if model_config is not None:
        heads = getattr(model_config.get_text_config(), "num_attention_heads", 0)
        sizes = {"layers": count_attention_layers(model_config), "heads": heads}
    return _find(spec, {name: size for name, size in sizes.items() if size})


def check_rule(spec: str | Mapping[str, Any]) -> Weighting | None:
    """What can be wrong with a rule whatever the model is, as :func:`find_rule`; the rule, where it needs none.

    One that asks for the model's sizes is tried with 1. If it refuses those, only the model will tell: None.
    """
    try:
        return _find(spec, {})
    except (ValueError, TypeError) as error:
        found = error
    try:
        return _find(spec, {"layers": 1, "heads": 1})
    except (ValueError, TypeError) as error:
        if found.__cause__ is None and error.__cause__ is not None:  # it was not made before, and is now
            return None
    raise found


def _find(spec: str | Mapping[str, Any], sizes: Mapping[str, int]) -> Weighting:
    try:
        return find_weighting(spec, **sizes)
    except (ValueError, TypeError) as error:
        if str(error).startswith("weighting"):
            raise
        kind = ValueError if isinstance(error, ValueError) else TypeError  # of an option, which may be named as a flag
        raise kind(f"weighting {spec}: {error}") from error


@contextlib.contextmanager
def naming_flags(flags: Mapping[str, str], dashes: str = "--") -> Iterator[None]:
    """An error that begins with the name of an argument begins with the flag that sets it instead."""
    try:
        with arguments_named({name: f"{dashes}{flag}" for name, flag in flags.items()}):
            yield
    except ArgumentError:
        raise
    except (ValueError, TypeError) as error:
        name = re.match(r"\w*", str(error)).group()
        if name not in flags:
            raise
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{dashes}{flags[name]}{str(error)[len(name) :]}") from error


def check_backend(group: Any, device: torch.device, dtype: torch.dtype) -> None:
    """``ValueError`` if the backend that is asked for cannot run on ``device`` in ``dtype``; nothing is loaded."""
    with naming_flags(flags_of(group)):
        choose_backend(group.sar_backend, Request(device, dtype))


def check_layers(group: Any, config: Any) -> None:
    """``ValueError`` if K is more than a model's layers, by its configuration alone.

    What else may not fit is found when SAR meets the model.
    """
    layers = count_attention_layers(config)
    k = group.sar_activation_layer_k
    if layers and k > layers:
        with naming_flags(flags_of(group)):
            raise ArgumentError("activation_layer_k", k, f"be at most the number of attention layers, {layers}")


def count_attention_layers(config: Any) -> int:
    """Layers of the language model that attend, by a model's configuration; 0 if that does not say."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["attention"] * getattr(text, "num_hidden_layers", 0)
    return sum(kind not in DO_NOT_ATTEND for kind in kinds)
