"""Where visual tokens lie in the picture: grids of tokens over regions of it, square or not, merged or in tiles."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sar_fast.hf.families import known_family
from sar_fast.lab.show.overlay import seen_region

Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class TokenGrid:
    """``index`` (rows, columns) int64: which of the picture's visual tokens covers which cell of ``region``, a box
    (x1, y1, x2, y2) in pixels of the picture, which reaches beyond the picture where the model saw padding."""

    index: np.ndarray
    region: Box


def token_grids(
    model: nn.Module, processor: Any, inputs: Mapping[str, Tensor], sample: int, tokens: int, size: tuple[int, int]
) -> list[TokenGrid]:
    """The grids that the visual tokens of a one-picture prompt form.

    Args:
        model: the transformers model. processor: its processor.
        inputs: what the processor made of a batch with one picture per prompt; ``sample`` counts its pictures.
        tokens: number of visual tokens of that picture. size: (width, height) of the picture as it was given.

    Returns:
        One grid; for models that see the whole and tiles of it, the whole's and the tiles'. Newline tokens are in none.

    Raises:
        ValueError: the family does not tell where the tokens lie (unordered tiles, several frames).
    """
    base_model, whole = model.base_model, (0, 0, *size)
    kind = model.config.model_type
    family = known_family(kind)
    if family is not None and family.tiling is not None:
        return _whole_and_tiles(base_model, family.tiling(base_model), inputs["image_sizes"][sample], tokens, whole)
    shape = _shape(base_model, inputs, sample, tokens)
    if shape is None or shape[0] * shape[1] != tokens:
        raise ValueError(
            f"the {tokens} visual tokens of this picture do not form one rectangle that {kind!r} tells; if the "
            "processor cuts pictures into tiles, switch that off"
        )
    region = _padded_square(size) if family is not None and family.pads_to_square else whole
    image_processor = getattr(processor, "image_processor", processor)
    if getattr(image_processor, "do_center_crop", False) and not _own_shape(inputs):
        region = seen_region(image_processor, size)
    return [TokenGrid(np.arange(tokens).reshape(shape), region)]


def _own_shape(inputs: Mapping[str, Tensor]) -> bool:
    """Whether the model sees pictures in their own shape."""
    return any(key in inputs for key in ("image_grid_thw", "image_sizes", "spatial_shapes", "image_position_ids"))


def _shape(base_model: nn.Module, inputs: Mapping[str, Tensor], sample: int, tokens: int) -> tuple[int, int] | None:
    """(rows, columns) of the only grid, None where it is not known."""
    config = base_model.config
    if "image_grid_thw" in inputs:
        frames, rows, columns = inputs["image_grid_thw"][sample].tolist()
        kernel = getattr(config.vision_config, "merge_kernel_size", None)
        merge = kernel or (config.vision_config.spatial_merge_size,) * 2
        return (rows // merge[0], columns // merge[1]) if frames == 1 else None
    if "image_sizes" in inputs:
        side = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
        height, width = inputs["image_sizes"][sample].tolist()
        return height // side, width // side
    if "spatial_shapes" in inputs:
        if len(inputs["spatial_shapes"]) != len(inputs["input_ids"]):
            return None
        rows, columns = inputs["spatial_shapes"][sample].tolist()
        return rows // config.downsample_factor, columns // config.downsample_factor
    if "image_position_ids" in inputs:
        columns, rows = (inputs["image_position_ids"][sample].amax(0) + 1).tolist()
        side = config.vision_config.pooling_kernel_size
        return rows // side, columns // side
    pixels = inputs["pixel_values"]
    tiles = pixels.shape[0] if pixels.dim() == 4 else pixels.shape[0] * pixels.shape[1]
    if tiles != len(inputs["input_ids"]) or math.isqrt(tokens) ** 2 != tokens:
        return None
    return math.isqrt(tokens), math.isqrt(tokens)


def _whole_and_tiles(
    base_model: nn.Module, options: Mapping[str, Any], image_size: Tensor, tokens: int, whole: Box
) -> list[TokenGrid]:
    """The small whole picture, then the tiles joined and cropped, found by packing a picture of marked patches.

    ``options``: further arguments of ``pack_image_features``.
    """
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = base_model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    tiles = image_size_to_num_patches(image_size, config.image_grid_pinpoints, config.vision_config.image_size)
    marks = torch.ones(tiles, side * side, 1)
    packed, _ = base_model.pack_image_features(
        [marks], image_size[None].cpu(), image_newline=marks.new_zeros(1), **options
    )
    is_patch = packed[0].flatten().numpy() > 0.5
    if len(is_patch) != tokens:
        raise ValueError(
            f"{config.model_type!r} packs this picture into {len(is_patch)} tokens, the prompt has {tokens}"
        )
    grids = [TokenGrid(np.arange(side * side).reshape(side, side), whole)]
    in_tiles = side * side + np.flatnonzero(is_patch[side * side :])
    if len(in_tiles):
        columns = int(np.flatnonzero(~is_patch[side * side :])[0])  # a newline token ends every row
        grids.append(TokenGrid(in_tiles.reshape(-1, columns), whole))
    return grids


def _padded_square(size: tuple[int, int]) -> Box:
    """The square around a picture that is padded evenly on both sides."""
    width, height = size
    side = max(size)
    left, top = (side - width) // 2, (side - height) // 2
    return -left, -top, side - left, side - top
