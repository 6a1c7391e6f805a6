"""Families that cut a large image into tiles and put newline tokens between the rows of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sar_fast.hf.families.per_patch import without_class_token
from sar_fast.hf.families.registry import Family, register_family
from sar_fast.hf.host_facts import HostFacts

_BLOCKS = ("vision_tower.encoder.layers", "vision_tower.vision_model.encoder.layers")


def _read_images(arguments: Mapping[str, Any]) -> tuple[list[tuple[int, int]], list[int] | None]:
    """(height, width) of each image, and how many each row has if that is said.

    In one read, where the model's own functions would wait for a device image by image.
    """
    facts, counts = HostFacts(), arguments.get("batch_num_images")
    facts.ask("sizes", torch.as_tensor(arguments["image_sizes"]))
    if counts is not None:
        facts.ask("counts", torch.as_tensor(counts))
    sides = facts["sizes"]
    return list(zip(sides[::2], sides[1::2])), None if counts is None else facts["counts"]


def _tiles_of_images(base_model: nn.Module, sizes: list[tuple[int, int]], cut: list[bool]) -> list[int]:
    """How many tiles each image has, the small whole image included."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = base_model.config
    return [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) if tiled else 1
        for size, tiled in zip(sizes, cut)
    ]


def _packed(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """The model's own packing of tiles, on norms; newline tokens get 0."""
    norms = without_class_token(base_model, norms, arguments)
    sizes, _ = _read_images(arguments)
    tiles = _tiles_of_images(base_model, sizes, [True] * len(sizes))
    strategy = arguments.get("vision_feature_select_strategy") or base_model.config.vision_feature_select_strategy
    packed, _ = base_model.pack_image_features(
        norms[..., None].split(tiles), sizes, strategy, image_newline=norms.new_zeros(1)
    )
    return torch.cat([p.flatten() for p in packed])


def _packed_and_scaled(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """The model's own packing of tiles and scaling down, on norms; newline tokens get 0."""
    norms = without_class_token(base_model, norms, arguments)
    sizes, counts = _read_images(arguments)
    cut = [True] * len(sizes)
    if counts is not None:  # only a row's single image is cut into tiles
        cut = [n == 1 for n in counts for _ in range(n)]
    packed, _ = base_model.pack_image_features(
        norms[..., None].split(_tiles_of_images(base_model, sizes, cut)),
        sizes,
        image_newline=norms.new_zeros(1),
        vision_aspect_ratio=arguments.get("vision_aspect_ratio") or base_model.config.vision_aspect_ratio,
    )
    return torch.cat([p.flatten() for p in packed])


def _pooled_frames(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Frames scaled to half by the model's own pooling, on norms; a newline token per video gets 0."""
    norms = without_class_token(base_model, norms, arguments)
    frames = arguments.get("pixel_values_videos", arguments.get("pixel_values"))  # named so by older transformers
    videos = frames.shape[0]
    pooled = base_model.apply_pooling(norms[..., None]).reshape(videos, -1)
    return F.pad(pooled, (0, 1)).flatten()


def _with_newlines(base_model: nn.Module, features: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """(videos, n, F) with the newline token that ``get_video_features`` of older transformers leaves to the model."""
    videos, frames = arguments.get("pixel_values_videos", arguments.get("pixel_values")).shape[:2]
    vision = base_model.config.vision_config
    pooled = -(-(vision.image_size // vision.patch_size) // 2)  # patches of a side, halved and rounded up
    if features.shape[1] > frames * pooled**2:
        return features
    return torch.cat([features, base_model.image_newline.expand(videos, 1, -1)], dim=1)


register_family(
    Family(
        name="LLaVA-NeXT",
        model_types=("llava_next",),
        vision_blocks=_BLOCKS,
        token_norms=_packed,
        packable=("llava_next",),
        tiling=lambda m: {"vision_feature_select_strategy": m.config.vision_feature_select_strategy},
        whole_prompts="",
    )
)
register_family(
    Family(
        name="LLaVA-OneVision",
        model_types=("llava_onevision",),
        vision_blocks=_BLOCKS,
        token_norms=_packed_and_scaled,
        video_token_norms=_pooled_frames,
        whole_video_features=_with_newlines,
        placeholder_ids={"image": "image_token_id", "video": "video_token_id"},
        tiling=lambda m: {"vision_aspect_ratio": m.config.vision_aspect_ratio},
        whole_prompts="",
    )
)
