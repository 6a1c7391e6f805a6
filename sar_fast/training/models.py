"""The model of a run: loaded, with the parameters that its fine-tuning type trains, and SAR on it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sar_fast.chat_template import read_template
from sar_fast.integrations.hf.apply import apply_sar
from sar_fast.integrations.hf.structure import find_decoder_layers
from sar_fast.miniature.checkpoint import MINIATURE_PATH
from sar_fast.sar_flags import flags_of, naming_flags
from sar_fast.training.arguments import Arguments, ModelArguments

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def source_of(name: str) -> str:
    """Folder or hub id of a model's name."""
    return str(MINIATURE_PATH) if name == "miniature" else str(Path(name).expanduser()) if Path(name).exists() else name


def load_processor(arguments: Arguments) -> Any:
    """The model's processor, with ``--template`` as its chat template if there is one."""
    from transformers import AutoProcessor

    model, template = arguments.model, arguments.data.template
    processor = AutoProcessor.from_pretrained(
        source_of(model.model_name_or_path), trust_remote_code=model.trust_remote_code
    )
    if template is not None:
        processor.chat_template = read_template(template)
    return processor


def load_model(arguments: Arguments) -> nn.Module:
    """The model, ready to be given to a Trainer; ``ValueError`` names a flag that does not fit it."""
    from transformers import AutoModelForImageTextToText

    options, training = arguments.model, arguments.training
    if options.torch_dtype == "auto":
        # mixed precision keeps the weights in fp32; DeepSpeed keeps an fp32 copy of its own
        dtype = torch.bfloat16 if training.bf16 and training.deepspeed else torch.float32
    elif options.torch_dtype in DTYPES:
        dtype = DTYPES[options.torch_dtype]
    else:
        raise ValueError(f"torch_dtype must be auto, {', '.join(DTYPES)}; got {options.torch_dtype!r}")
    model = AutoModelForImageTextToText.from_pretrained(
        source_of(options.model_name_or_path),
        dtype=dtype,
        attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
    )
    model.config.get_text_config().use_cache = False  # training needs no cache, and packed rows allow none
    model = set_trainable(model, options)
    if options.use_sar:
        with naming_flags(flags_of(options)):
            apply_sar(model, options.sar_config())
    if training.gradient_checkpointing:
        model.enable_input_require_grads()
    trained = sum(
        p.numel() if not hasattr(p, "ds_numel") else p.ds_numel for p in model.parameters() if p.requires_grad
    )
    if not trained:
        raise ValueError(f"finetuning_type {options.finetuning_type!r} leaves no parameter to train")
    logger.info("%s: %d parameters are trained", options.finetuning_type, trained)
    return model


def set_trainable(model: nn.Module, options: ModelArguments) -> nn.Module:
    """Freeze what the fine-tuning type does not train; LoRA returns the PEFT model."""
    if options.finetuning_type == "lora":
        return _lora(model, options)
    vision, projector = vision_modules(model)
    if options.finetuning_type == "freeze":
        layers = find_decoder_layers(model)
        count = options.freeze_trainable_layers
        if not 1 <= count <= len(layers):
            raise ValueError(f"freeze_trainable_layers must be 1 to {len(layers)}, the number of layers; got {count}")
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
    """(vision encoders, projectors into the language model), by the names that transformers gives them."""
    base = model.base_model
    vision = [getattr(base, n) for n in ("vision_tower", "vision_model", "visual", "video_tower") if hasattr(base, n)]
    names = ("multi_modal_projector", "connector", "embed_vision", "visual.merger", "visual.deepstack_merger_list")
    projector = []
    for name in names:
        try:
            projector.append(base.get_submodule(name))
        except AttributeError:
            continue
    return vision, projector


def _lora(model: nn.Module, options: ModelArguments) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    decoder = find_decoder_layers(model)
    linear = {n: m for n, m in decoder.named_modules() if isinstance(m, nn.Linear)}
    wanted = None if options.lora_target == "all" else {t.strip() for t in options.lora_target.split(",")}
    known = {name.split(".")[-1] for name in linear}
    unknown = sorted((wanted or set()) - known)
    if unknown:
        raise ValueError(
            f"lora_target {', '.join(unknown)} not in the decoder layers; known: {', '.join(sorted(known))}"
        )
    inside = {id(m) for n, m in linear.items() if wanted is None or n.split(".")[-1] in wanted}
    targets = [name for name, module in model.named_modules() if id(module) in inside]
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)
