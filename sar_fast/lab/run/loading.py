"""The model of an evaluation: loaded, on its device, with SAR on it if that is asked."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import nn

from sar_fast.base.errors import ArgumentError
from sar_fast.config import SARConfig
from sar_fast.hf import SARHandle, apply_sar
from sar_fast.lab.io.answering import GRID, encode_texts
from sar_fast.lab.io.chat_template import build_prompt, read_template, tokenizer_of
from sar_fast.lab.io.model_errors import FLAGS, flags_named
from sar_fast.lab.io.model_source import ModelSource
from sar_fast.lab.io.models import find_model, load_config, load_model, load_processor
from sar_fast.lab.run.arguments import EvaluationArguments
from sar_fast.lab.run.sar_flags import check_layers, flags_of, naming_flags


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


def start_processes(device: str) -> PartialState:
    """This process's place among those of ``accelerate launch`` or ``torchrun``; alone without one of them."""
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=True) if on_cpu else PartialState()  # without cpu=True it ignores the launcher there
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != started:
        raise ValueError(f"WORLD_SIZE is {started}, but {state.num_processes} process(es) found each other")
    if state.num_processes > 1 and device not in ("auto", "cpu"):
        raise ValueError(f"device is {device!r} with {state.num_processes} processes: each needs its own; auto")
    return state


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
