"""Families that see square images and merge square blocks of patches into one token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError
from sar_fast.hf.families.per_patch import without_class_token
from sar_fast.hf.families.registry import Family, TokenNorms, register_family


def block_means(norms: Tensor, side: int) -> Tensor:
    """(images, g * g) in rows -> (tokens,): mean of every ``side`` x ``side`` block, blocks in rows."""
    grid = math.isqrt(norms.shape[1])
    if grid * grid != norms.shape[1]:
        raise ArgumentError("norms", norms.shape[1], "hold a square number of patches per image")
    return F.avg_pool2d(norms.view(-1, 1, grid, grid), side).flatten()


def _blocks(side_of: Callable[[nn.Module], int], select: TokenNorms | None = None) -> TokenNorms:
    def token_norms(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Mean of each square block of patches."""
        if select is not None:
            norms = select(base_model, norms, arguments)
        return block_means(norms, side_of(base_model))

    return token_norms


def _without_last(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """(images, patches + 1) -> (images, patches): the class token comes last."""
    return norms[:, :-1]


register_family(
    Family(
        name="InternVL, Qianfan-OCR",
        model_types=("internvl", "qianfan_ocr"),
        vision_blocks=("vision_tower.encoder.layer", "vision_tower.layers"),
        token_norms=_blocks(lambda m: round(1 / m.config.downsample_ratio), without_class_token),
        box_formats={"internvl": "internvl"},
        packable=("internvl",),
        whole_prompts="",
    )
)
register_family(
    Family(
        name="Gemma 3",
        model_types=("gemma3",),
        vision_blocks=("vision_tower.encoder.layers", "vision_tower.vision_model.encoder.layers"),
        token_norms=_blocks(lambda m: m.multi_modal_projector.kernel_size),
        whole_prompts="",
        note="Sliding layers see only the visual tokens in their window.",
    )
)
register_family(
    Family(
        name="Idefics3, SmolVLM",
        model_types=("idefics3", "smolvlm"),
        vision_blocks=("vision_model.encoder.layers",),
        token_norms=_blocks(lambda m: m.config.scale_factor),
        packable=("idefics3",),
        projectors=("connector",),
        whole_prompts="",
    )
)
register_family(
    Family(
        name="Llama 4",
        model_types=("llama4",),
        vision_blocks=("vision_model.model.layers",),
        token_norms=_blocks(lambda m: round(1 / m.config.vision_config.pixel_shuffle_ratio), _without_last),
        features="last_hidden_state",
        projects_later="multi_modal_projector",
        whole_prompts="it does not take pictures that are encoded already",
        note="Chunked layers see only their chunk's visual tokens.",
    )
)
register_family(
    Family(
        name="Cohere2-Vision",
        model_types=("cohere2_vision",),
        vision_blocks=("vision_tower.encoder.layers", "vision_tower.vision_model.encoder.layers"),
        token_norms=_blocks(lambda m: m.config.downsample_factor),
        whole_prompts="",
    )
)
register_family(
    Family(
        name="Aya Vision",
        model_types=("aya_vision",),
        vision_blocks=("vision_tower.encoder.layers", "vision_tower.vision_model.encoder.layers"),
        token_norms=_blocks(lambda m: m.config.downsample_factor, without_class_token),
        whole_prompts="",
    )
)
register_family(
    Family(
        name="Ovis2",
        model_types=("ovis2",),
        vision_blocks=("vision_tower.transformer.encoder.layers",),
        token_norms=_blocks(lambda m: m.config.vision_config.hidden_stride),
        projectors=("visual_embeddings_table",),
        whole_prompts="",
    )
)
