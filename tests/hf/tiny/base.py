"""What the tiny models share: token ids, configs of common towers, and batches of rows with pictures in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])  # older ones have bugs of their own
TAKES_ENCODED = VERSION >= (5, 18)  # pictures that are encoded already, mm_encoder_outputs
IMAGE = 99
VIDEO = 98
VOCAB = 120
LAYERS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """One tiny model as the family tests see it.

    Attributes:
        name: the test's id.
        make: () -> model in eval mode, always the same weights.
        batch: (pictures per row, side of the padding, number of the first picture) -> keyword arguments of the model.
        blocks: dotted path of the vision blocks from the model itself.
        output: the attribute of ``get_image_features``'s output that has one feature per visual token.
        attending: indices of the text layers that attend, in depth order.
        generated: token types that generated tokens have, by the name of the entry.
        beta: small enough that SAR moves the logits of this model.
        static_error: what transformers itself raises when it generates with a static cache here; None = it works.
        video: () -> keyword arguments of one row with a clip, for families with video tokens.
        since: the first transformers that has the model.
    """

    name: str
    make: Callable[[], torch.nn.Module]
    batch: Callable[..., dict[str, torch.Tensor]]
    blocks: str
    output: str = "pooler_output"
    attending: tuple[int, ...] = tuple(range(LAYERS))
    generated: dict[str, int] = dataclasses.field(default_factory=dict)
    beta: float = 0.02
    static_error: type[Exception] | None = None
    video: Callable[[], dict[str, torch.Tensor]] | None = None
    since: tuple[int, int] = (5, 4)


def tower(path: str) -> str:
    """Where the blocks of a CLIP or SigLIP encoder are: before 5.6 they lie one module deeper."""
    return path if VERSION >= (5, 6) else path.replace(".encoder", ".vision_model.encoder")


def text(model_type: str, **changes: Any) -> dict[str, Any]:
    """Config of a small text model with four query and two key/value heads."""
    config = {
        "model_type": model_type,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 512,
    }
    return config | changes


def vision(model_type: str, **changes: Any) -> dict[str, Any]:
    """Config of a small vision encoder: six blocks, 16 x 16 pixels, patches of 4 x 4."""
    config = {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
        "initializer_range": 0.2,
    }
    return config | changes


def build(model_type: str, *, seed: int = 0, **config: Any) -> torch.nn.Module:
    """The image-text-to-text model of a config with random weights of order 0.2 everywhere, norms excepted."""
    torch.manual_seed(seed)
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **config)).eval()


def randomize(model: torch.nn.Module, *names: str, std: float = 0.2) -> torch.nn.Module:
    """Give parameters that transformers initialises to 0 random values."""
    generator = torch.Generator().manual_seed(1)
    for name in names:
        parameter = model.get_parameter(name)
        parameter.data = torch.randn(parameter.shape, generator=generator) * std
    return model


def noise(number: int, *shape: int) -> torch.Tensor:
    """Picture ``number``: always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number))


def pad(rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` of rows of different lengths."""
    length = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill = [0] * (length - len(row))
        ids.append(fill + row if side == "left" else row + fill)
        mask.append([0] * len(fill) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(fill))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def rows_with_pictures(
    images: list[int], side: str, first_image: int, tokens_of: Callable[[int], list[int]]
) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
    """Padded rows with ``images[b]`` pictures in row b, texts of different lengths, and the pictures' numbers by row.

    ``tokens_of(number)`` are the tokens that stand for a picture.
    """
    rows, numbers, at = [], [], first_image
    for count in images:
        row = [5, 6, 7]
        for number in range(at, at + count):
            row += [*tokens_of(number), 8, 9]
        numbers.append(list(range(at, at + count)))
        at += count
        rows.append(row + [10, 11, 12, 13][: 3 + count % 2] + [14] * (2 * count))
    return pad(rows, side), numbers


def stacked(tokens: int, *, size: int = 16, before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> Callable:
    """Batches for families whose pictures all have one size: ``pixel_values`` (pictures, 3, size, size)."""

    def batch(images: list[int], side: str = "left", first_image: int = 0) -> dict[str, torch.Tensor]:
        inputs, numbers = rows_with_pictures(images, side, first_image, lambda _: [*before, *[IMAGE] * tokens, *after])
        pixels = [noise(n, 3, size, size) for row in numbers for n in row]
        if pixels:
            inputs["pixel_values"] = torch.stack(pixels)
        return inputs

    return batch
