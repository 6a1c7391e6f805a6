"""The model of a run: one that flags name, loaded when all else is right; or one that the caller has."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from sar_fast.backends.protocol import Request
from sar_fast.backends.select import choose_backend
from sar_fast.base.errors import ArgumentError
from sar_fast.config import SARConfig
from sar_fast.hf import apply_sar
from sar_fast.hf.features import handle_of
from sar_fast.hf.structure import unwrap
from sar_fast.lab.io.stamps import files_stamp, stamp
from sar_fast.lab.io.weights import frozen_stamp, model_facts
from sar_fast.lab.training import models
from sar_fast.lab.training.arguments import Arguments, ModelArguments
from sar_fast.lab.training.lora import with_defaults
from sar_fast.method.weighting.files import files_of
from sar_fast.method.weighting.split import module_of

OF_NO_CONSEQUENCE = ("backend", "record", "record_rows")  # of SAR's options, for the weights of a run


@dataclasses.dataclass(frozen=True)
class Learner:
    """A model that is trained, perhaps not loaded yet.

    Attributes:
        check: what can be wrong with it, found before data or weights are read.
        settings: what of it decides which weights a run ends with, as plain values.
        places: folders that it is read from, which no run may write over.
        processor: makes its processor.
        model: makes it ready for a Trainer, with SAR on it.
    """

    check: Callable[[], None]
    settings: Callable[[], Mapping[str, Any]]
    places: Callable[[], list[str]]
    processor: Callable[[], Any]
    model: Callable[[], nn.Module]

    @classmethod
    def named(cls, arguments: Arguments) -> Learner:
        """The model that flags name."""
        options = arguments.model
        return cls(
            check=lambda: models.check_model(options, arguments.training),
            settings=lambda: named_settings(options),
            places=lambda: [p for p in _parts(options) if p is not None],
            processor=lambda: models.load_processor(arguments),
            model=lambda: models.load_model(arguments),
        )

    @classmethod
    def of(cls, model: nn.Module, processor: Any, sar: SARConfig | None) -> Learner:
        """A model that the caller has, with the parameters that require gradients, which learn.

        ``ArgumentError`` for ``sar`` on a model that has SAR, a processor without template, nothing to learn.
        """
        own = handle_of(unwrap(model).base_model)
        if sar is not None and not isinstance(sar, SARConfig):
            raise ArgumentError("sar", type(sar).__name__, "be a SARConfig or None")
        if own is not None and sar is not None:
            raise ArgumentError("sar", sar, "be None for a model that has SAR on it, which holds; or remove that first")
        if not getattr(processor, "chat_template", None):
            raise ArgumentError("processor", "none", "be one with a chat_template")
        rule = None if sar is None else module_of(sar.weighting)
        learning = [p for part in (model, rule) if part is not None for p in part.parameters() if p.requires_grad]
        if not learning:
            raise ArgumentError("model", "none", "be one with parameters that require gradients")
        place = unwrap(model).config.name_or_path
        return cls(
            check=lambda: _check_backend(model, sar),
            settings=lambda: lent_settings(model, processor, sar if own is None else own.config),
            places=lambda: [os.path.abspath(place)] if os.path.isdir(place) else [],
            processor=lambda: processor,
            model=lambda: _with_sar(model, sar),
        )


def named_settings(options: ModelArguments) -> dict[str, Any]:
    """Settings of a model that flags name, by flag; files by content, wherever they lie."""
    source = models.source_of(options)
    settings = dataclasses.asdict(options)
    if options.finetuning_type == "lora" and source.adapter is None:
        settings |= with_defaults(options)
    facts = model_facts(source)
    for name, of in (("model_name_or_path", ""), ("base_model", "base_")):
        weights = facts.get(f"{of}weights")
        settings[name] = facts.get(f"{of}model") if weights is None else f"{facts[f'{of}model']} (content {weights})"
    settings["sar_weighting"] = _weighting(options.sar_weighting)
    return settings


def lent_settings(model: nn.Module, processor: Any, sar: SARConfig | None) -> dict[str, Any]:
    """Settings of a model that the caller has. What learns does not count by value: a checkpoint has it all."""
    values = {} if sar is None else sar.to_dict()
    rule = None if sar is None else module_of(sar.weighting)
    return {
        "model": frozen_stamp(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "sar": {name: value for name, value in values.items() if name not in OF_NO_CONSEQUENCE},
        "rule": None if rule is None else frozen_stamp(rule),
        "chat_template": stamp(processor.chat_template),
    }


def _parts(options: ModelArguments) -> tuple[str | None, ...]:
    source = models.source_of(options)
    return source.weights, source.adapter


def _weighting(spec: str | None) -> str | None:
    """A rule's spec; one of files by their names and content, wherever they lie."""
    files = [] if spec is None else files_of(spec)
    return f"{spec.rstrip(os.sep).rpartition(os.sep)[2]} (content {files_stamp(files)})" if files else spec


def _check_backend(model: nn.Module, sar: SARConfig | None) -> None:
    if sar is not None:
        choose_backend(sar.backend, Request(model.device, model.dtype))


def _with_sar(model: nn.Module, sar: SARConfig | None) -> nn.Module:
    if sar is not None:
        apply_sar(model, sar)
    return model
