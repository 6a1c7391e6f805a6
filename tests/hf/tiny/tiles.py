"""Models that cut large pictures into tiles; pictures are non-square and of several sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.hf.tiny.base import IMAGE, VIDEO, Case, build, noise, rows_with_pictures, text, vision
from tests.hf.tiny.per_patch import TOWER

PINPOINTS = [[16, 16], [16, 32], [32, 16], [32, 32]]
SIZES = ((10, 30), (30, 12), (14, 14))  # height, width: a grid of 1 x 2 tiles, 2 x 1, 1 x 1, all with borders to crop


def _llava_next() -> torch.nn.Module:
    return build(
        "llava_next",
        vision_config=vision("clip_vision_model"),
        text_config=text("llama"),
        image_token_id=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )


def onevision(aspect: str = "anyres_max_9") -> torch.nn.Module:
    return build(
        "llava_onevision",
        vision_config=vision("siglip_vision_model", vision_use_head=False),
        text_config=text("qwen2"),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio=aspect,
    )


def tokens_of(size: tuple[int, int]) -> int:
    """Patches of the small whole picture, then the rows of the cropped tiles with a newline each."""
    height, width = size
    rows, columns = (4 * (1 if side <= 16 else 2) for side in size)
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(round(height * columns / width, 7))) // 2)
    else:
        columns -= 2 * ((columns - int(round(width * rows / height, 7))) // 2)
    return 16 + rows * (columns + 1)


def tiled_batch(images: list[int], side: str = "left", first_image: int = 0) -> dict[str, Tensor]:
    """(pictures, most tiles, 3, 16, 16) filled up with zeros, ``image_sizes``."""
    size_of = lambda number: SIZES[number % len(SIZES)]
    inputs, numbers = rows_with_pictures(images, side, first_image, lambda n: [IMAGE] * tokens_of(size_of(n)))
    every = [n for row in numbers for n in row]
    if every:
        tiles = [1 + (1 + (size_of(n)[0] > 16)) * (1 + (size_of(n)[1] > 16)) for n in every]
        pixels = torch.zeros(len(every), max(tiles), 3, 16, 16)
        for i, (n, count) in enumerate(zip(every, tiles)):
            pixels[i, :count] = noise(n, count, 3, 16, 16)
        inputs |= {"pixel_values": pixels, "image_sizes": torch.tensor([size_of(n) for n in every])}
    return inputs


def _video() -> dict[str, Tensor]:
    """Three frames of 4 x 4 patches, halved to 2 x 2, and one newline."""
    return {
        "input_ids": torch.tensor([[5, 6, *[VIDEO] * (3 * 4 + 1), 8, 9, 10, 11]]),
        "pixel_values_videos": noise(50, 1, 3, 3, 16, 16),
    }


CASES: list[Case] = [
    Case("llava_next", _llava_next, tiled_batch, TOWER),
    Case("llava_onevision", onevision, tiled_batch, TOWER, video=_video),
]
BatchOf = Callable[..., dict[str, Tensor]]
