"""The model of an evaluation: loaded, on its device, with SAR on it if that is asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn

from sar_fast.base.errors import arguments_named
from sar_fast.cli.evaluate.arguments import EvaluationArguments
from sar_fast.config import SARConfig
from sar_fast.hf import SARHandle, apply_sar, remove_sar
from sar_fast.hf.features import handle_of
from sar_fast.lab.io.answering import GRID, prepare_processor
from sar_fast.lab.io.model_errors import FLAGS as MODEL_FLAGS
from sar_fast.lab.io.model_errors import flags_named
from sar_fast.lab.io.model_source import ModelSource
from sar_fast.lab.io.models import find_model, load_config, load_model, load_processor
from sar_fast.lab.io.stamps import file_stamp
from sar_fast.lab.io.weights import model_facts
from sar_fast.lab.run.rules import rule_settings
from sar_fast.lab.run.sar_flags import check_layers, flags_of, naming_flags
from sar_fast.lab.run.session import Session, start_processes
from sar_fast.lab.run.subject import Loaded, Subject

FLAGS = MODEL_FLAGS | {  # by the arguments of the laboratory's functions
    "batch_size": "--per_device_eval_batch_size",
    "data_dir": "--data_dir",
    "folder": "--output_dir",
    "max_new_tokens": "--max_new_tokens",
    "max_samples": "--max_samples",
    "overwrite": "--overwrite_output_dir",
    "scoring": "--scoring",
    "seed": "--seed",
    "split": "--split",
    "task": "--task",
    "template": "--template",
    "workers": "--dataloader_num_workers",
}


def dtype_name(arguments: EvaluationArguments) -> str:
    """float32 unless ``--bf16`` or ``--fp16`` is given."""
    return "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else "float32"


def source_of(arguments: EvaluationArguments) -> ModelSource:
    """Where the model lies, and its base if it is an adapter; ``ValueError`` names a bad flag."""
    with flags_named():
        return find_model(arguments.model_name_or_path, arguments.base_model)


def model_type_of(arguments: EvaluationArguments) -> str:
    """``model_type`` of the model's configuration."""
    with flags_named():
        return load_config(source_of(arguments)).model_type


def sar_config_of(arguments: EvaluationArguments) -> SARConfig:
    """The options of SAR, a rule's for the model, which is not loaded; ``ValueError`` if they do not fit it."""
    with flags_named():
        config = load_config(source_of(arguments))
    check_layers(arguments, config)
    return arguments.sar_config(config)


def reports_frames(arguments: EvaluationArguments) -> bool:
    """Whether the model's processor says how large the model sees each picture."""
    with flags_named():
        return GRID in load_processor(source_of(arguments)).image_processor.model_input_names


def load(arguments: EvaluationArguments, state: PartialState) -> tuple[nn.Module, Any, SARHandle | None]:
    """(model in eval mode, processor that pads on the left, SAR's handle or None); ``ValueError`` names a bad flag."""
    device = str(state.device) if arguments.device == "auto" else arguments.device
    with flags_named():
        model, processor = load_model(source_of(arguments), device, dtype_name(arguments))
    with arguments_named(FLAGS):
        prepare_processor(processor, arguments.template)
    if not arguments.use_sar:
        return model, processor, None
    with naming_flags(flags_of(arguments)):
        handle = apply_sar(model, arguments.sar_config(model.config))
        handle.describe()  # chooses the backend, or says why it cannot run here
    return model, processor, handle


def subject_of(arguments: EvaluationArguments, state: PartialState) -> Subject:
    """The model that the flags name, loaded once something is left to do."""

    @contextlib.contextmanager
    def opened() -> Iterator[Loaded]:
        loaded = Loaded(*load(arguments, state))
        try:
            yield loaded
        finally:
            if handle_of(loaded.model.base_model) is not None:  # its class is other models', too
                remove_sar(loaded.model)

    return Subject(
        lambda: model_settings(arguments), opened, model_type_of(arguments), lambda: reports_frames(arguments)
    )


def model_settings(arguments: EvaluationArguments) -> dict[str, Any]:
    """What records of any evaluation depend on: the model, how it runs and what it is asked in."""
    return {
        **model_facts(source_of(arguments)),
        "dtype": dtype_name(arguments),
        "sar": sar_settings(arguments) if arguments.use_sar else None,
        "template": file_stamp(Path(arguments.template)) if arguments.template else None,  # None: the model's own
        "max_samples": arguments.max_samples,
    }


def sar_settings(arguments: EvaluationArguments) -> dict[str, Any]:
    """SAR's options, and of a rule what tells it from others of its name."""
    if arguments.sar_weighting is None:
        return arguments.sar_config().to_dict()
    return rule_settings(arguments.sar_weighting, sar_config_of(arguments))


def session_of(arguments: EvaluationArguments) -> Session:
    """The session of a command; what can be wrong with SAR's flags for this model is found first."""
    if arguments.use_sar:
        sar_config_of(arguments)
    state = start_processes(arguments.device)
    return Session(arguments.to_dict(), state, seed=arguments.seed, overwrite=arguments.overwrite_output_dir)
