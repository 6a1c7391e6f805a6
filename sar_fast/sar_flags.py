"""SAR's options as flags of a command: the configuration they make, and errors that name the flag."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from sar_fast.backends.protocol import Request
from sar_fast.backends.select import choose_backend
from sar_fast.config import SARConfig

DO_NOT_ATTEND = ("linear_attention", "conv", "mamba")  # transformers' names of such layers in a config's layer_types


def flags_of(group: Any) -> dict[str, str]:
    """Name of the flag, without dashes, by the field of ``SARConfig`` that it sets, in a group of flags.

    ``sar_beta`` is found for ``beta``, ``sav_grad`` for itself; a class attribute ``sar_flag_names`` says otherwise.
    """
    own = {field.name for field in dataclasses.fields(group)}
    found = {f.name: n for f in dataclasses.fields(SARConfig) for n in (f.name, f"sar_{f.name}") if n in own}
    return {**found, **getattr(group, "sar_flag_names", {})}


def sar_config(group: Any) -> SARConfig:
    """The options of SAR; ``ValueError`` names the flag that is bad."""
    own = {field.name for field in dataclasses.fields(group)}
    fields = {f.name: n for f in dataclasses.fields(SARConfig) for n in (f.name, f"sar_{f.name}") if n in own}
    with naming_flags(flags_of(group)):
        return SARConfig(**{field: getattr(group, name) for field, name in fields.items()})


@contextlib.contextmanager
def naming_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """An error that begins with the name of an argument begins with the flag that sets it instead."""
    try:
        yield
    except (ValueError, TypeError) as error:
        name = re.match(r"\w*", str(error)).group()
        if name not in flags:
            raise
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"--{flags[name]}{str(error)[len(name) :]}") from error


def check_backend(group: Any, device: torch.device, dtype: torch.dtype) -> None:
    """``ValueError`` if the backend that is asked for cannot run on ``device`` in ``dtype``; nothing is loaded."""
    with naming_flags(flags_of(group)):
        choose_backend(sar_config(group).backend, Request(device, dtype))


def check_layers(group: Any, config: Any) -> None:
    """``ValueError`` if K is more than a model's layers, by its configuration alone.

    What else may not fit is found when SAR meets the model.
    """
    layers = count_attention_layers(config)
    k = group.sar_activation_layer_k
    if layers and k > layers:
        flag = flags_of(group)["activation_layer_k"]
        raise ValueError(f"--{flag} must be at most the number of attention layers, {layers}; got {k}")


def count_attention_layers(config: Any) -> int:
    """Layers of the language model that attend, by a model's configuration; 0 if that does not say."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["attention"] * getattr(text, "num_hidden_layers", 0)
    return sum(kind not in DO_NOT_ATTEND for kind in kinds)
