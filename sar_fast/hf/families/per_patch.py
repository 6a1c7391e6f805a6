"""Families whose visual tokens are the patches themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sar_fast.hf.families.registry import Family, register_family


def without_class_token(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """(images, 1 + patches) -> (images, patches) where the model's feature selection drops the first position."""
    strategy = arguments.get("vision_feature_select_strategy") or base_model.config.vision_feature_select_strategy
    return norms[:, 1:] if strategy == "default" else norms


def _selected_patches(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """One token per patch; the class token goes where the model drops it."""
    return without_class_token(base_model, norms, arguments).reshape(-1)


def _all_patches(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """One token per patch."""
    return norms.reshape(-1)


register_family(
    Family(
        name="LLaVA-1.5, Pixtral",
        model_types=("llava",),
        vision_blocks=(
            "vision_tower.encoder.layers",
            "vision_tower.vision_model.encoder.layers",
            "vision_tower.transformer.layers",
        ),
        token_norms=_selected_patches,
        packable=("llava",),
        whole_prompts="",
    )
)
register_family(
    Family(
        name="PaliGemma 1, 2",
        model_types=("paligemma",),
        vision_blocks=("vision_tower.encoder.layers", "vision_tower.vision_model.encoder.layers"),
        token_norms=_all_patches,
        box_formats={"paligemma": "paligemma"},
        whole_prompts="the picture's tokens attend to the question",
        note="AV is the variance of soft-capped scores where the text model caps them (PaliGemma 2).",
    )
)
register_family(
    Family(
        name="DeepSeek-VL",
        model_types=("deepseek_vl",),
        vision_blocks=("vision_model.encoder.layers", "vision_model.vision_model.encoder.layers"),
        token_norms=_all_patches,
        pads_to_square=True,
        projectors=("aligner",),
        whole_prompts="",
    )
)
