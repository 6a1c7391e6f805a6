"""The model of an evaluation: loaded, on its device, with SAR on it if that is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image
from torch import nn

from sar_fast.base.errors import ArgumentError
from sar_fast.cli.evaluate.arguments import EvaluationArguments
from sar_fast.config import SARConfig
from sar_fast.hf import SARHandle, apply_sar
from sar_fast.lab.io.answering import GRID, encode_texts
from sar_fast.lab.io.chat_template import build_prompt, read_template, tokenizer_of
from sar_fast.lab.io.model_errors import FLAGS, flags_named
from sar_fast.lab.io.model_source import ModelSource
from sar_fast.lab.io.models import find_model, load_config, load_model, load_processor
from sar_fast.lab.io.stamps import file_stamp
from sar_fast.lab.io.weights import model_facts
from sar_fast.lab.run.rules import rule_settings
from sar_fast.lab.run.sar_flags import check_layers, flags_of, naming_flags
from sar_fast.lab.run.session import Session, start_processes


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
    prepare_processor(processor, arguments.template)
    if not arguments.use_sar:
        return model, processor, None
    with naming_flags(flags_of(arguments)):
        handle = apply_sar(model, arguments.sar_config(model.config))
        handle.describe()  # chooses the backend, or says why it cannot run here
    return model, processor, handle


def prepare_processor(processor: Any, template: str | None = None) -> None:
    """Pad on the left, with a chat template: the model's own, or the Jinja file ``template``."""
    if template is not None:
        processor.chat_template = read_template(template)
    if not getattr(processor, "chat_template", None):
        raise ValueError("the model has no chat template, give one with --template")
    try:
        prompt = build_prompt(processor, "What is this?")
    except ArgumentError as error:
        raise ValueError(f"{error.worded(FLAGS)}; give one with --template") from error
    tokenizer = tokenizer_of(processor)
    tokenizer.padding_side = "left"  # new tokens continue every row of a batch
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if template is not None:
        try:
            encode_texts(processor, [Image.new("RGB", (64, 64))], [prompt])
        except ValueError as error:  # of processors that count placeholders; others are found out by their tokens
            raise ValueError(f"template {template} does not fit the model's processor: {error}") from error


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
