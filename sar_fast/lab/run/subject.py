"""The model of an experiment: one that the caller has, or one that a command line names."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import nn

from sar_fast.base.errors import ArgumentError
from sar_fast.config import SARConfig
from sar_fast.hf import SARHandle, apply_sar
from sar_fast.hf.features import handle_of
from sar_fast.hf.structure import unwrap
from sar_fast.lab.io.answering import GRID, pad_left
from sar_fast.lab.io.stamps import stamp
from sar_fast.lab.io.weights import live_stamp
from sar_fast.lab.run.rules import config_settings


class Loaded(NamedTuple):
    """What experiments work with: a model in eval mode, a processor that pads on the left, SAR's handle or None."""

    model: nn.Module
    processor: Any
    handle: SARHandle | None


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that is looked at, perhaps not loaded yet.

    Attributes:
        settings: makes what results keep of it: the model and its weights, dtype, SAR's options, the template.
        opened: makes it ready for one experiment, and leaves it afterwards as it was.
        model_type: of its configuration.
        reports_frames: whether its processor says how large the model sees each picture.
    """

    settings: Callable[[], Mapping[str, Any]]
    opened: Callable[[], AbstractContextManager[Loaded]]
    model_type: str
    reports_frames: Callable[[], bool]

    @classmethod
    def of(cls, model: nn.Module, processor: Any, sar: SARConfig | None = None, lasting: bool = True) -> Subject:
        """A model and a processor that the caller has; both are the caller's again after each experiment.

        Args:
            model: of transformers, PEFT-wrapped or not; in eval mode while it is looked at.
            processor: its processor, which is copied.
            sar: SAR while it is looked at. None: the model as it is, with the SAR that may be on it.
            lasting: whether a folder keeps the settings, which then need a name for a rule.

        Raises:
            ArgumentError: ``sar`` on a model that has SAR; no chat template.
        """
        on = handle_of(unwrap(model).base_model)
        if sar is not None and not isinstance(sar, SARConfig):
            raise ArgumentError("sar", type(sar).__name__, "be a SARConfig or None")
        if on is not None and sar is not None:
            raise ArgumentError("sar", sar, "be None for a model that has SAR on it, which holds; or remove that first")
        config = sar if on is None else on.config
        if not getattr(processor, "chat_template", None):
            raise ArgumentError("processor", "none", "be one with a chat_template")
        padded = left_padded(processor)

        def settings() -> dict[str, Any]:
            return {
                "model": unwrap(model).config.name_or_path or type(unwrap(model)).__name__,
                "weights": live_stamp(model),
                "dtype": str(model.dtype).removeprefix("torch."),
                "sar": None if config is None else config_settings(config, lasting),
                "template": stamp(processor.chat_template),
            }

        reports = lambda: GRID in processor.image_processor.model_input_names
        return cls(settings, lambda: _borrowed(model, padded, sar), unwrap(model).config.model_type, reports)


@contextlib.contextmanager
def _borrowed(model: nn.Module, processor: Any, sar: SARConfig | None) -> Iterator[Loaded]:
    base = unwrap(model).base_model
    own, training = handle_of(base), [part for part in model.modules() if part.training]
    before = None if own is None else own.config
    model.eval()
    try:
        handle = apply_sar(model, sar) if sar is not None else own
        if handle is not None:
            handle.describe()  # chooses the backend, or says why it cannot run here
        yield Loaded(model, processor, handle)
    finally:
        left = handle_of(base)
        if left is not None and left is not own:
            left.remove()
        if own is not None:
            if handle_of(base) is None:
                own.install()
            own.reconfigure(before)
        for part in training:
            part.training = True


def left_padded(processor: Any) -> Any:
    """A copy of a processor whose tokenizer pads on the left."""
    processor = copy.deepcopy(processor)
    pad_left(processor)
    return processor
