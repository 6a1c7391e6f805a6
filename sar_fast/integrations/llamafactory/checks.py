"""What does not go together, said before data are read, a model is loaded or anything is written."""

from __future__ import annotations

from typing import Any

import torch
from llamafactory.extras.misc import is_env_enabled
from llamafactory.model import load_config

from sar_fast.base.errors import ArgumentError
from sar_fast.config import SARConfig
from sar_fast.hf.families import find_family
from sar_fast.integrations.llamafactory.options import Options
from sar_fast.lab.run.sar_flags import check_backend, check_layers, check_sar_flags
from sar_fast.lab.training.distributed import refuse_split_models
from sar_fast.lab.training.rules import is_trained
from sar_fast.method.weighting.split import module_of

OTHER_ENGINES = {  # key -> which of LLaMA-Factory's argument groups it is in
    "use_mca": "finetuning",
    "use_hyper_parallel": "finetuning",
    "use_unsloth": "model",
    "use_kt": "model",
    "shift_attn": "model",
    "mixture_of_depths": "model",
    "use_ray": "training",
}
OTHER_LOSSES = ("use_dft_loss", "use_eaft_loss", "use_asft_loss")
VISUAL_IDS = ("image_token_id", "video_token_id")


def check(options: Options, model: Any, data: Any, training: Any, finetuning: Any) -> SARConfig | None:
    """The options of SAR, None without it; ``ValueError`` names a key that does not fit the rest or the model.

    Args:
        options: ours.
        model, data, training, finetuning: LLaMA-Factory's arguments, as it has parsed them.
    """
    if finetuning.stage != "sft":
        raise ArgumentError("--stage", finetuning.stage, "be sft here; llamafactory-cli trains others")
    groups = {"model": model, "training": training, "finetuning": finetuning}
    for name, group in OTHER_ENGINES.items():
        if getattr(groups[group], name):
            raise ArgumentError(
                f"--{name}",
                getattr(groups[group], name),
                "be left out: it replaces what SAR and the gradient analysis work on",
            )
    control, sar = options.control.custom_trainer, options.sar.use_sar
    if control:
        _check_control(options, training, finetuning)
    if sar or control:
        _refuse_packing(data, "--use_sar" if sar else "--custom_trainer control_sft")
    measures = training.do_train and options.analysis.gradient_analysis
    if measures and (training.fsdp or is_env_enabled("ACCELERATE_USE_FSDP")):
        raise ArgumentError("--gradient_analysis", True, "be false under FSDP: how that keeps gradients is not known")
    config = load_config(model)
    if (measures or control) and not any(getattr(config, name, None) is not None for name in VISUAL_IDS):
        flag, came, off = (
            ("--custom_trainer", control, "left out") if control else ("--gradient_analysis", True, "false")
        )
        raise ArgumentError(
            flag,
            came,
            f"be {off} for {config.model_type}, which has no {VISUAL_IDS[0]} to tell visual tokens from text by",
        )
    deepspeed = getattr(training, "hf_deepspeed_config", None)
    refuse_split_models(deepspeed.config if deepspeed else None, getattr(training, "parallelism_config", None))
    return _check_sar(options, model, training, config) if sar else None


def _check_control(options: Options, training: Any, finetuning: Any) -> None:
    others = [f"--{name}" for name in OTHER_LOSSES if getattr(finetuning, name)]
    others += ["--label_smoothing_factor"] if training.label_smoothing_factor else []
    if others:
        raise ArgumentError(
            "--custom_trainer",
            f"control_sft with {', '.join(others)}",
            "come without other losses: it adds to the model's own",
        )
    if options.control.learnable_temperature and finetuning.finetuning_type not in ("full", "freeze"):
        raise ArgumentError(
            "--learnable_temperature",
            True,
            f"be left out with --finetuning_type {finetuning.finetuning_type}, whose checkpoints do not hold it",
        )


def _refuse_packing(data: Any, flag: str) -> None:
    for name in ("neat_packing", "packing"):
        if getattr(data, name):
            raise ArgumentError(
                f"--{name}", getattr(data, name), f"be left out with {flag}, which tells samples apart by rows"
            )


def _check_sar(options: Options, model: Any, training: Any, config: Any) -> SARConfig:
    flags = options.sar
    check_sar_flags(flags)
    if model.flash_attn != "auto":
        raise ArgumentError(
            "--flash_attn", model.flash_attn, "be left out with --use_sar, which sets the attention itself"
        )
    find_family(config)
    check_layers(flags, config)
    check_backend(flags, training.device, model.compute_dtype or torch.float32)
    found = flags.sar_config(config)
    if training.do_train and is_trained(module_of(found.weighting)):
        raise ArgumentError(
            "--sar_weighting",
            flags.sar_weighting,
            (
                "have no parameters that learn, which LLaMA-Factory would decay and not save: experiments/train.py "
                "trains it"
            ),
        )
    return found
