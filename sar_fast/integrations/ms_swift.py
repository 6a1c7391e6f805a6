"""SAR in ms-swift: ``swift sft --external_plugins sar_plugin.py --callbacks sar ...`` (docs/integrations.md).

``sar_plugin.py`` is a file of one line, ``import sar_fast.integrations.ms_swift``, which registers the callback. The
options are those of :class:`~sar_fast.SARConfig`, as ``SAR_<OPTION>`` in the environment or, as ms-swift puts them
there, ``--model_kwargs '{"sar_beta": 0.5}'``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Mapping
from os import environ
from typing import Any

import yaml
from swift.callbacks import callbacks_map
from torch import nn

from sar_fast.base.errors import ArgumentError
from sar_fast.config import SARConfig
from sar_fast.integrations.options import config_of
from sar_fast.integrations.trainer_callback import SARCallback

NAME = "sar"  # in --callbacks
PREFIX = "SAR_"
VARIABLES = {field.name: PREFIX + field.name.upper() for field in dataclasses.fields(SARConfig)}


class SwiftSARCallback(SARCallback):
    """:class:`SARCallback` as ms-swift makes its callbacks, with the options of the environment.

    Args:
        args: the trainer's arguments; not used.
        trainer: ms-swift's trainer, of which nothing but the template is set up.

    Raises:
        ValueError: an unknown variable, sequence parallelism.
    """

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__()
        refuse_sequence_parallel(trainer.template.sequence_parallel_size)
        self.options, self.template = read_options(environ), trainer.template

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self.config = config_of(self.options, VARIABLES, model.config)
        super().on_init_end(args, state, control, model=model, **kwargs)
        leave_pictures_to_model(self.template)


def read_options(variables: Mapping[str, str]) -> dict[str, Any]:
    """Field of :class:`SARConfig` -> value, of the environment variables that set one."""
    for name in variables:
        if name.startswith(PREFIX) and name not in VARIABLES.values():
            near = difflib.get_close_matches(name, VARIABLES.values(), n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{name} sets no option of SAR; {hint}known: {', '.join(VARIABLES.values())}")
    return {field: _value(variables[name]) for field, name in VARIABLES.items() if name in variables}


def _value(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)  # YAML takes 1e-05, as Python writes it, for a word
    return value


def refuse_sequence_parallel(size: int) -> None:
    """``ValueError`` if ms-swift splits sequences over ranks."""
    if size > 1:
        raise ArgumentError(
            "sequence_parallel_size",
            (
                f"{size}: a hook of ms-swift gives every rank a slice of the prompt, which only its own "
                "sdpa and flash_attention_2 put together, so statistics would be a slice's. DDP and "
                "DeepSpeed's ZeRO split no prompt"
            ),
            "be 1 with SAR",
        )


def leave_pictures_to_model(template: Any) -> None:
    """Let the model put pictures into the prompt itself, as transformers' models do: SAR reads its inputs.

    In training, ms-swift's templates may do it in a hook before the model.
    """
    template._post_encode = _as_they_are


def _as_they_are(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs


callbacks_map[NAME] = SwiftSARCallback
