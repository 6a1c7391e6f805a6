"""LoRA on the decoder: a new adapter, or one that is trained on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import nn

from sar_fast.base.errors import ArgumentError
from sar_fast.hf.structure import find_decoder_layers
from sar_fast.lab.io import adapters
from sar_fast.lab.io.model_source import ModelSource
from sar_fast.lab.training.arguments import ModelArguments

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

RANK = 8
FLAGS = {"lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}  # flag -> field of the adapter


def add_lora(model: nn.Module, options: ModelArguments) -> PeftModel:
    """The model with a new adapter, as the flags say."""
    from peft import LoraConfig, get_peft_model

    given = with_defaults(options)
    config = LoraConfig(
        r=given["lora_rank"],
        lora_alpha=given["lora_alpha"],
        lora_dropout=given["lora_dropout"],
        target_modules=lora_targets(model, given["lora_target"]),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def with_defaults(options: ModelArguments) -> dict[str, Any]:
    """The flags of a new adapter, those that are left out at their defaults."""
    rank = options.lora_rank if options.lora_rank is not None else RANK
    return {
        "lora_rank": rank,
        "lora_alpha": options.lora_alpha if options.lora_alpha is not None else 2 * rank,
        "lora_dropout": options.lora_dropout or 0.0,
        "lora_target": options.lora_target or "all",
    }


def lora_targets(model: nn.Module, wanted: str) -> list[str]:
    """Full names of the decoder's linear layers that ``lora_target`` names; ``ValueError`` for an unknown one."""
    decoder = find_decoder_layers(model)
    linear = {n: m for n, m in decoder.named_modules() if isinstance(m, nn.Linear)}
    names = None if wanted == "all" else {t.strip() for t in wanted.split(",")}
    known = {name.split(".")[-1] for name in linear}
    unknown = sorted((names or set()) - known)
    if unknown:
        raise ArgumentError(
            "lora_target", ", ".join(unknown), f"be all, or of the decoder's layers, {', '.join(sorted(known))}"
        )
    inside = {id(m) for n, m in linear.items() if names is None or n.split(".")[-1] in names}
    return [name for name, module in model.named_modules() if id(module) in inside]


def check_lora_flags(source: ModelSource, options: ModelArguments) -> None:
    """``ValueError`` for an adapter that is no LoRA, and for a flag that says otherwise than the adapter."""
    config = adapters.read_config(source.adapter)
    if config["peft_type"] != "LORA":
        raise ArgumentError(
            "finetuning_type",
            f"lora for {source.name}, {config['peft_type']}",
            (
                "be full, which trains the merged model, for an adapter that is no LoRA; or train what `sar-fast "
                "merge` makes of it"
            ),
        )
    for flag, field in FLAGS.items():
        wanted, has = getattr(options, flag), config.get(field)
        if wanted is not None and wanted != has:
            raise ArgumentError(
                flag, wanted, f"be {has} as in the adapter {source.name}, or left out, to go on with it"
            )


def go_on_with_lora(model: nn.Module, source: ModelSource, options: ModelArguments) -> PeftModel:
    """The model with the adapter on it, which is trained; rank, alpha, dropout and targets are the adapter's own."""
    targets = None if options.lora_target is None else set(lora_targets(model, options.lora_target))
    wrapped = adapters.attach(model, source, trainable=True)
    config = wrapped.peft_config[adapters.NAME]
    has = {name.removeprefix("model.") for name in wrapped.targeted_module_names}
    if targets is not None and {name.removeprefix("model.") for name in targets} != has:
        ends = sorted({name.rpartition(".")[2] for name in has})
        raise ArgumentError(
            "lora_target",
            f"{options.lora_target}, which is {len(targets)} layers",
            (
                f"name the layers of the adapter {source.name}, {len(has)} ({', '.join(ends)}), or be left out, to "
                "go on with it"
            ),
        )
    logger.info(
        "lora goes on with %s: rank %d, alpha %g, dropout %g",
        source.name,
        config.r,
        config.lora_alpha,
        config.lora_dropout,
    )
    return wrapped
