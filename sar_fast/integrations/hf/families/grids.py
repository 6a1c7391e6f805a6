"""Families that see images in their own shape: (t, h, w) grids of patches, merged block by block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sar_fast.integrations.hf.families.registry import Family, register_family

_IMAGE_AND_VIDEO = {"image": "image_token_id", "video": "video_token_id"}


def grid_thw(arguments: Mapping[str, Any]) -> Tensor:
    """(n, 3) patches in time, height and width of the images or videos that a feature call was given."""
    grid = arguments.get("image_grid_thw")
    return arguments["video_grid_thw"] if grid is None else grid


def grid_block_means(norms: Tensor, shape: tuple[int, int, int], block: tuple[int, int, int]) -> Tensor:
    """(t * h * w,) in rows -> mean of every block of (t, h, w) patches, blocks in rows."""
    (t, h, w), (bt, bh, bw) = shape, block
    return norms.view(t // bt, bt, h // bh, bh, w // bw, bw).mean((1, 3, 5)).flatten()


def _consecutive(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Mean of each block, whose patches come one after another."""
    return norms.reshape(-1, base_model.visual.spatial_merge_size**2).mean(-1)


def _windowed(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Mean of each block; blocks come in the order of attention windows and go back to reading order."""
    visual, grid = base_model.visual, grid_thw(arguments)
    if hasattr(visual, "get_window_index"):  # transformers before the shared vision utilities
        window_index = torch.as_tensor(visual.get_window_index(grid)[0])
    else:
        from transformers.vision_utils import get_vision_window_index

        window_index = get_vision_window_index(
            grid,
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )[0]
    merged = _consecutive(base_model, norms, arguments)
    return merged[torch.argsort(window_index.to(merged.device))]


def _blocks_in_rows(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Mean of each block; patches come in rows, images one after another."""
    patch, side = base_model.vision_tower.patch_size, base_model.config.spatial_merge_size
    shapes = [(1, h // patch, w // patch) for h, w in torch.as_tensor(arguments["image_sizes"]).tolist()]
    parts = norms.flatten().split([h * w for _, h, w in shapes])
    return torch.cat([grid_block_means(p, shape, (1, side, side)) for p, shape in zip(parts, shapes)])


def _unpadded_blocks(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Mean of each block of the real patches; images are padded to one length."""
    side = base_model.config.downsample_factor
    shapes = torch.as_tensor(arguments["spatial_shapes"]).tolist()
    return torch.cat([grid_block_means(n[: h * w], (1, h, w), (1, side, side)) for n, (h, w) in zip(norms, shapes)])


def _blocks_over_time(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Mean of each block, over all frames of a clip too."""
    kernel = tuple(base_model.vision_tower.merge_kernel_size)
    shapes = [tuple(shape) for shape in grid_thw(arguments).tolist()]
    parts = norms.flatten().split([t * h * w for t, h, w in shapes])
    return torch.cat([grid_block_means(p, (t, h, w), (t, *kernel)) for p, (t, h, w) in zip(parts, shapes)])


def _blocks_by_position(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Mean of each block, found by its patches' coordinates; padding has none."""
    positions = arguments.get("image_position_ids")
    positions = arguments["video_position_ids"] if positions is None else positions
    positions = positions.flatten(0, -3)  # (images or frames, P, 2) x, y; -1 = padding; older: (videos, frames, P, 2)
    side = base_model.config.vision_config.pooling_kernel_size
    real = (positions != -1).all(-1)  # [images, P]
    x, y = positions.unbind(-1)
    blocks_per_row = (x.amax(-1, keepdim=True) + 1) // side
    block = torch.where(real, x // side + blocks_per_row * (y // side), 0)
    sums = torch.zeros_like(norms).scatter_add(1, block, norms.masked_fill(~real, 0.0))  # [images, P], blocks first
    tokens = real.sum(-1, keepdim=True) // side**2
    return sums[torch.arange(sums.shape[1], device=sums.device) < tokens] / side**2


register_family(
    Family(
        name="Qwen2-VL, Qwen3-VL",
        model_types=("qwen2_vl", "qwen3_vl", "qwen3_vl_moe"),
        vision_blocks=("visual.blocks",),
        token_norms=_consecutive,
        placeholder_ids=_IMAGE_AND_VIDEO,
        box_formats={"qwen2_vl": "thousandths", "qwen3_vl": "qwen3", "qwen3_vl_moe": "qwen3"},
        projectors=("visual.merger", "visual.deepstack_merger_list"),
        whole_prompts="",
    )
)
register_family(
    Family(
        name="Qwen3.5",
        model_types=("qwen3_5", "qwen3_5_moe"),
        vision_blocks=("visual.blocks",),
        token_norms=_consecutive,
        placeholder_ids=_IMAGE_AND_VIDEO,
        projectors=("visual.merger",),
        whole_prompts="its linear-attention layers keep a state of all tokens, which no second prompt can start from",
        note="Hybrid: K counts the layers that attend, linear-attention layers do not.",
    )
)
register_family(
    Family(
        name="Qwen2.5-VL, EXAONE 4.5",
        model_types=("qwen2_5_vl", "exaone4_5"),
        vision_blocks=("visual.blocks",),
        token_norms=_windowed,
        placeholder_ids=_IMAGE_AND_VIDEO,
        box_formats={"qwen2_5_vl": "resized_pixels"},
        projectors=("visual.merger",),
        whole_prompts="",
    )
)
register_family(
    Family(
        name="GLM-4.1V, GLM-4.5V, GLM-4.6V, GLM-OCR",
        model_types=("glm4v", "glm4v_moe", "glm46v", "glm_ocr"),
        vision_blocks=("visual.blocks",),
        token_norms=_consecutive,
        placeholder_ids={"image": "image_token_id", "video": "image_token_id"},
        projectors=("visual.merger",),
        whole_prompts="",
        note="Frames of a clip use the image's placeholder.",
    )
)
register_family(
    Family(
        name="Mistral 3",
        model_types=("mistral3",),
        vision_blocks=("vision_tower.transformer.layers",),
        token_norms=_blocks_in_rows,
        packable=("mistral3",),
        whole_prompts="",
    )
)
register_family(
    Family(
        name="Kimi K2.5",
        model_types=("kimi_k25",),
        vision_blocks=("vision_tower.layers",),
        token_norms=_blocks_over_time,
        placeholder_ids=_IMAGE_AND_VIDEO,
        projectors=("mm_projector",),
        whole_prompts="",
        note="Latent attention: value heads are smaller than key heads. transformers fails on clips of several frames.",
    )
)
register_family(
    Family(
        name="LFM2-VL",
        model_types=("lfm2_vl",),
        vision_blocks=("vision_tower.encoder.layers", "vision_tower.vision_model.encoder.layers"),
        token_norms=_unpadded_blocks,
        whole_prompts="its convolution layers keep a state of the last tokens, which no second prompt can start from",
        note="Hybrid: K counts the layers that attend, convolutions do not.",
    )
)
register_family(
    Family(
        name="Gemma 4",
        model_types=("gemma4",),
        vision_blocks=("vision_tower.encoder.layers",),
        token_norms=_blocks_by_position,
        placeholder_ids=_IMAGE_AND_VIDEO,
        computes_last_queries_only=True,
        projectors=("embed_vision",),
        whole_prompts="transformers builds the masks of its layers for whole prompts",
        note="Layers without own keys compute all queries of a prompt, not only the last, as T needs them.",
    )
)
