"""Families that see images in their own shape: (t, h, w) grids of patches, merged block by block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sar_fast.hf.families.registry import Family, register_family

_IMAGE_AND_VIDEO = {"image": "image_token_id", "video": "video_token_id"}


def grid_thw(arguments: Mapping[str, Any]) -> Tensor:
    """(n, 3) patches in time, height and width of the images or videos that a feature call was given."""
    grid = arguments.get("image_grid_thw")
    return arguments["video_grid_thw"] if grid is None else grid


def _block_means(norms: Tensor, starts: Tensor, shapes: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Mean of every (height, width) block of patches, over all frames, by arithmetic on the device alone.

    Args:
        norms: (P,) patches of images or clips in rows; what follows an image's last patch is padding.
        starts: (n,) int64, each image's first patch.
        shapes: (n, 3) int64, patches in time, height and width.

    Returns:
        (means, real): blocks in rows, image after image, and which of the entries are any.
    """
    index = torch.arange(norms.numel(), device=norms.device)
    image = torch.searchsorted(starts, index, right=True) - 1
    t, h, w = shapes[image].clamp_min(1).unbind(-1)  # [P] each
    index = index - starts[image]
    y, x = index // w % h // block[0], index % w // block[1]
    rows, columns = h // block[0], w // block[1]
    inside = (index < shapes.prod(-1)[image]) & (y < rows) & (x < columns)
    blocks = shapes[:, 1] // block[0] * (shapes[:, 2] // block[1])  # [n]
    target = (blocks.cumsum(0) - blocks)[image] + y * columns + x
    size = block[0] * block[1]
    most = norms.numel() // size
    means = norms.new_zeros(most + 1).scatter_add(0, torch.where(inside, target, most), norms / (t * size))
    return means[:most], torch.arange(most, device=norms.device) < blocks.sum()


def _one_after_another(shapes: Tensor) -> Tensor:
    """(n,) first patch of images that have no padding between them."""
    sizes = shapes.prod(-1)
    return sizes.cumsum(0) - sizes


def _images(heights_and_widths: Any, device: torch.device) -> Tensor:
    """(n, 3) int64 shapes of single frames."""
    return F.pad(torch.as_tensor(heights_and_widths, dtype=torch.int64, device=device), (1, 0), value=1)


def _consecutive(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Mean of each block, whose patches come one after another."""
    return norms.reshape(-1, base_model.visual.spatial_merge_size**2).mean(-1)


def _windowed(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Mean of each block; blocks come in the order of attention windows and go back to reading order."""
    visual = base_model.visual
    merged = _consecutive(base_model, norms, arguments)
    side = visual.window_size // visual.spatial_merge_size // visual.patch_size  # of a window, in blocks
    shapes = grid_thw(arguments).to(merged.device)
    shapes = torch.cat([shapes[:, :1], shapes[:, 1:] // visual.spatial_merge_size], -1)  # [n, 3] blocks
    starts = _one_after_another(shapes)
    index = torch.arange(merged.numel(), device=merged.device)  # of a block in reading order
    image = torch.searchsorted(starts, index, right=True) - 1
    _, h, w = shapes[image].unbind(-1)
    inner = index - starts[image]
    across, down = -(-w // side), -(-h // side)  # windows of a frame
    window = (inner // (h * w) * down + inner // w % h // side) * across + inner % w // side
    order = torch.argsort(starts[image] + window, stable=True)  # a frame has no more windows than blocks
    return torch.zeros_like(merged).scatter(0, order, merged)


def _blocks_in_rows(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean of each block; patches come in rows, images one after another."""
    patch, side = base_model.vision_tower.patch_size, base_model.config.spatial_merge_size
    sizes = torch.as_tensor(arguments["image_sizes"], device=norms.device)
    shapes = _images(sizes // patch, norms.device)
    return _block_means(norms.flatten(), _one_after_another(shapes), shapes, (side, side))


def _unpadded_blocks(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean of each block of the real patches; images are padded to one length."""
    side = base_model.config.downsample_factor
    shapes = _images(arguments["spatial_shapes"], norms.device)
    starts = torch.arange(len(shapes), device=norms.device) * norms.shape[1]
    return _block_means(norms.flatten(), starts, shapes, (side, side))


def _blocks_over_time(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean of each block, over all frames of a clip too."""
    shapes = grid_thw(arguments).to(norms.device, torch.int64)
    kernel = tuple(base_model.vision_tower.merge_kernel_size)
    return _block_means(norms.flatten(), _one_after_another(shapes), shapes, kernel)


def _blocks_by_position(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
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
    return sums / side**2, torch.arange(sums.shape[1], device=sums.device) < tokens


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
        note="Latent attention: value heads are smaller than key heads. transformers before 5.24 fails on clips of "
        "several frames.",
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
