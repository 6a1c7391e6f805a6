"""Tiny random multimodal models and batches for the integration tests."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

IMAGE = 99
VIDEO = 98
VOCAB = 120
QWEN_GRIDS = ((1, 8, 12), (1, 12, 8), (1, 6, 10))  # patches (t, h, w) of the pictures, non-square on purpose


def llava(layers: int = 4, seed: int = 0) -> LlavaForConditionalGeneration:
    """LLaVA-1.5 layout: CLIP with a class token, 16 patches, LLaMA with 4 query and 2 key/value heads."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        initializer_range=0.2,
    )
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        initializer_range=0.2,
        pad_token_id=0,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=16)
    return LlavaForConditionalGeneration(config).eval()


def qwen2_5_vl(layers: int = 4, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL layout: windowed vision attention, 2x2 patch merging, mrope."""
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 6,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [2, 5],
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "initializer_range": 0.2,
        },
        text_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=97,
        vision_end_token_id=96,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def _pad(rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill = [0] * (length - len(row))
        ids.append(fill + row if side == "left" else row + fill)
        mask.append([0] * len(fill) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(fill))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def llava_batch(images: list[int], side: str = "left", first_image: int = 0) -> dict[str, torch.Tensor]:
    """A batch with ``images[b]`` pictures in row b, texts of different lengths; picture i is always the same."""
    rows = []
    for count in images:
        row = [5, 6, 7]
        for _ in range(count):
            row += [IMAGE] * 16 + [8, 9]
        rows.append(row + [10, 11, 12, 13][: 3 + count % 2] + [14] * (2 * count))
    batch = _pad(rows, side)
    picture = lambda i: torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(first_image + i))
    pixels = [picture(i) for i in range(sum(images))]
    if pixels:
        batch["pixel_values"] = torch.stack(pixels)
    return batch


def qwen_batch(images: list[int], side: str = "left", first_image: int = 0) -> dict[str, torch.Tensor]:
    """As :func:`llava_batch`, for Qwen2.5-VL: pictures of several sizes, ``image_grid_thw``, token types."""
    rows, pixels, grids, at = [], [], [], first_image
    for count in images:
        row = [5, 6, 7]
        for _ in range(count):
            t, h, w = QWEN_GRIDS[at % len(QWEN_GRIDS)]
            row += [97] + [IMAGE] * (t * h * w // 4) + [96, 9]
            pixels.append(torch.randn(t * h * w, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(at)))
            grids.append((t, h, w))
            at += 1
        rows.append(row + [10, 11, 12, 13][: 3 + count % 2] + [14] * (2 * count))
    batch = _pad(rows, side)
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
        batch["image_grid_thw"] = torch.tensor(grids)
    return batch


MODELS = {"llava": (llava, llava_batch), "qwen2_5_vl": (qwen2_5_vl, qwen_batch)}
