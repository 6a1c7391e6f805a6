"""The model of a run: loaded, with the parameters that its fine-tuning type trains, and SAR on it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from sar_fast.base.errors import ArgumentError
from sar_fast.base.extras import need
from sar_fast.hf import apply_sar
from sar_fast.hf.families import known_family
from sar_fast.hf.structure import find_decoder_layers, unwrap
from sar_fast.lab.io import adapters, models
from sar_fast.lab.io.chat_template import read_template
from sar_fast.lab.io.model_errors import flags_named
from sar_fast.lab.io.model_source import ModelSource
from sar_fast.lab.io.models import find_model
from sar_fast.lab.run.sar_flags import check_backend, check_layers, flags_of, naming_flags
from sar_fast.lab.training.arguments import Arguments, ModelArguments, SFTArguments
from sar_fast.lab.training.lora import add_lora, check_lora_flags, go_on_with_lora
from sar_fast.lab.training.rules import is_trained
from sar_fast.method.weighting.split import module_of

logger = logging.getLogger(__name__)

USUAL_ENCODERS = ("vision_tower", "vision_model", "visual", "video_tower")  # of families without an entry
USUAL_PROJECTORS = ("multi_modal_projector", "connector", "visual.merger")


def source_of(options: ModelArguments) -> ModelSource:
    """Where the model lies, and its base if it is an adapter; ``ValueError`` names a bad flag."""
    with flags_named():
        return find_model(options.model_name_or_path, options.base_model)


def check_model(options: ModelArguments, training: SFTArguments) -> None:
    """What can be wrong with the model before weights are read: ``ValueError``, ``ImportError`` for a package."""
    if options.finetuning_type == "lora":
        need("finetuning_type lora", "peft")
    source = source_of(options)
    if source.adapter is not None and options.finetuning_type == "lora":
        check_lora_flags(source, options)
    elif source.adapter is not None and is_deepspeed_zero3_enabled():
        raise ArgumentError(
            "finetuning_type",
            options.finetuning_type,
            (
                "be lora for an adapter under ZeRO-3, which splits the weights before they can be merged; or make a "
                "model of it first, with `sar-fast merge`"
            ),
        )
    if options.use_sar:
        check_model_layers(options)
        check_backend(options, training.device, torch.bfloat16 if training.bf16 else torch.float32)


def check_model_layers(options: ModelArguments) -> None:
    """``ValueError`` if K is more than the model's layers, or the rule does not fit; the model is not loaded."""
    with flags_named():
        config = models.load_config(source_of(options), trust_remote_code=options.trust_remote_code)
    check_layers(options, config)
    weighting = options.sar_config(config).weighting
    if options.finetuning_type == "rule" and not is_trained(module_of(weighting)):
        raise ArgumentError(
            "sar_weighting",
            repr(options.sar_weighting),
            "have parameters with {finetuning_type} rule, which trains them",
        )


def load_processor(arguments: Arguments) -> Any:
    """The model's processor, with ``template`` as its chat template if there is one."""
    with flags_named():
        source = source_of(arguments.model)
        processor = models.load_processor(source, trust_remote_code=arguments.model.trust_remote_code)
    if arguments.data.template is not None:
        processor.chat_template = read_template(arguments.data.template)
    return processor


def load_model(arguments: Arguments) -> nn.Module:
    """The model, ready to be given to a Trainer; ``ValueError`` names a flag that does not fit it."""
    options, training = arguments.model, arguments.training
    model = _load_trainable(options, _dtype(options, training))
    if options.use_sar:
        with naming_flags(flags_of(options)):
            apply_sar(model, options.sar_config(unwrap(model).config))
    if training.gradient_checkpointing:
        model.enable_input_require_grads()
    trained = sum(
        p.numel() if not hasattr(p, "ds_numel") else p.ds_numel for p in model.parameters() if p.requires_grad
    )
    if not trained:
        raise ArgumentError("finetuning_type", options.finetuning_type, "leave a parameter to train")
    logger.info("%s: %d parameters are trained", options.finetuning_type, trained)
    return model


def _dtype(options: ModelArguments, training: SFTArguments) -> torch.dtype:
    if options.torch_dtype == "auto":
        # mixed precision keeps the weights in fp32; DeepSpeed keeps an fp32 copy of its own
        return torch.bfloat16 if training.bf16 and training.deepspeed else torch.float32
    if options.torch_dtype in models.DTYPES:
        return models.DTYPES[options.torch_dtype]
    raise ArgumentError("torch_dtype", repr(options.torch_dtype), f"be auto, {', '.join(models.DTYPES)}")


def _load_trainable(options: ModelArguments, dtype: torch.dtype) -> nn.Module:
    """The model with what its fine-tuning type trains: an adapter goes on, or is merged and then trained."""
    with flags_named():
        source = source_of(options)
        model = models.load_whole(
            source,
            dtype,
            attn_implementation=options.attn_implementation,
            trust_remote_code=options.trust_remote_code,
        )
        if source.adapter is None:
            return set_trainable(model, options)
        if options.finetuning_type == "lora":
            return go_on_with_lora(model, source, options)
        merged = adapters.merge(adapters.attach(model, source), source)
        logger.info("%s trains the merged model: %s", options.finetuning_type, source.adapter)
        return set_trainable(merged.requires_grad_(True), options)


def set_trainable(model: nn.Module, options: ModelArguments) -> nn.Module:
    """Freeze what the fine-tuning type does not train; LoRA returns the PEFT model."""
    if options.finetuning_type == "lora":
        return add_lora(model, options)
    if options.finetuning_type == "rule":  # SAR comes after
        return model.requires_grad_(False)
    vision, projector = vision_modules(model)
    if options.finetuning_type == "freeze":
        layers = find_decoder_layers(model)
        count = options.freeze_trainable_layers
        if not 1 <= count <= len(layers):
            raise ArgumentError("freeze_trainable_layers", count, f"be 1 to {len(layers)}, the number of layers")
        model.requires_grad_(False)
        for layer in layers[-count:]:
            layer.requires_grad_(True)
        for part in () if options.freeze_multi_modal_projector else projector:
            part.requires_grad_(True)
        for part in () if options.freeze_vision_tower else vision:
            part.requires_grad_(True)
        return model
    for part in vision if options.freeze_vision_tower else ():
        part.requires_grad_(False)
    for part in projector:  # inside the vision encoder in some families
        part.requires_grad_(not options.freeze_multi_modal_projector)
    return model


def vision_modules(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """(vision encoders, projectors into the language model): the family's, or by usual names where none is known."""
    base, family = model.base_model, known_family(model.config.model_type)
    if family is not None:
        return [family.vision_encoder(base)], family.find_projectors(base)
    parts = dict(base.named_modules())
    return [parts[name] for name in USUAL_ENCODERS if name in parts], [parts[n] for n in USUAL_PROJECTORS if n in parts]
