"""Models that see square pictures and merge square blocks of patches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.hf.tiny.base import IMAGE, VERSION, Case, build, noise, randomize, rows_with_pictures, stacked, text, vision
from tests.hf.tiny.per_patch import TOWER, with_types

SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def _internvl(model_type: str, text_model: str) -> torch.nn.Module:
    tower = vision(f"{model_type}_vision", image_size=[16, 16], patch_size=[4, 4], drop_path_rate=0.0)
    config = text(text_model, head_dim=16)
    return build(model_type, vision_config=tower, text_config=config, image_token_id=IMAGE, image_seq_length=4)


def _gemma3() -> torch.nn.Module:
    """Sliding and full layers, image blocks bidirectional."""
    config = text(
        "gemma3_text",
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=12,
        layer_types=SLIDING,
        initializer_range=0.1,
    )
    model = build(
        "gemma3",
        vision_config=vision("siglip_vision_model", vision_use_head=False, image_size=32),
        text_config=config,
        image_token_id=IMAGE,
        mm_tokens_per_image=16,
        boi_token_index=97,
        eoi_token_index=96,
    )
    return randomize(model, "model.multi_modal_projector.mm_input_projection_weight")


def _idefics3(model_type: str) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        return build(
            model_type,
            vision_config=vision(f"{model_type}_vision"),
            text_config=text("llama"),
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=0,
        )

    return make


def _idefics3_batch(images: list[int], side: str = "left", first_image: int = 0) -> dict[str, Tensor]:
    """(rows, most pictures, 3, 16, 16), filled up with black pictures; one picture has a padded border."""
    inputs, numbers = rows_with_pictures(images, side, first_image, lambda _: [97, *[IMAGE] * 4, 96])
    if sum(images):
        pixels = torch.zeros(len(images), max(images), 3, 16, 16)
        real = torch.zeros(len(images), max(images), 16, 16, dtype=torch.bool)
        for b, row in enumerate(numbers):
            for i, n in enumerate(row):
                width = 8 if n == 1 else 16
                pixels[b, i, :, :, :width] = noise(n, 3, 16, width)
                real[b, i, :, :width] = True
        inputs |= {"pixel_values": pixels, "pixel_attention_mask": real}
    return inputs


def _llama4() -> torch.nn.Module:
    """Chunked attention with RoPE and full attention without, experts; the class token last.

    The temperature of layers without RoPE counts padding, so it stays 1 here, as it does below ``floor_scale`` tokens.
    """
    tower = vision(
        "llama4_vision_model",
        vision_output_dim=64,
        projector_input_dim=64,
        projector_output_dim=64,
        intermediate_size=128,
    )
    config = text(
        "llama4_text",
        head_dim=16,
        intermediate_size_mlp=96,
        num_local_experts=2,
        interleave_moe_layer_step=2,
        attention_chunk_size=12,
        no_rope_layers=[1, 0, 1, 0],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return build("llama4", vision_config=tower, text_config=config, image_token_id=IMAGE)


def _cohere(model_type: str, **changes: int) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        return build(
            model_type,
            vision_config=vision("siglip_vision_model", vision_use_head=False),
            text_config=text("cohere2", sliding_window=12, layer_types=SLIDING),
            image_token_id=IMAGE,
            downsample_factor=2,
            **changes,
        )

    return make


def _ovis2(stride: int) -> torch.nn.Module:
    tower = vision("ovis2_vision", hidden_stride=stride, vocab_size=40, num_visual_indicator_tokens=5, image_size=24)
    return build(
        "ovis2",
        vision_config=tower,
        text_config=text("qwen2"),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[100, 101, 102, 103, 104],
        vocab_size=120,
        hidden_size=64,
    )


FEW = 0.3  # beta where pictures have few tokens: SA is of the order 1 / |V|
CASES = [
    *(
        Case(name, partial(_internvl, name, text_model), stacked(4), blocks, beta=FEW, since=since)
        for name, text_model, blocks, since in (
            ("internvl", "qwen2", "model.vision_tower.encoder.layer", (5, 4)),
            ("qianfan_ocr", "qwen3", "model.vision_tower.layers", (5, 6)),
        )
    ),
    Case(
        "gemma3",
        _gemma3,
        with_types(stacked(16, size=32, before=(97,), after=(96,)), "token_type_ids", images=True),
        TOWER,
        generated={"token_type_ids": 0},
    ),
    *(
        Case(
            name,
            _idefics3(name),
            _idefics3_batch,
            "model.vision_model.encoder.layers",
        )
        for name in ("idefics3", "smolvlm")
    ),
    Case(
        "llama4",
        _llama4,
        stacked(4),
        "vision_model.model.layers",
        output="last_hidden_state",
        beta=FEW,
        static_error=TypeError if VERSION < (5, 18) else None,
    ),
    Case("cohere2_vision", _cohere("cohere2_vision", alignment_intermediate_size=64), stacked(4), TOWER, beta=FEW),
    Case("aya_vision", _cohere("aya_vision"), stacked(4), TOWER, beta=FEW),
    Case(
        "ovis2",
        partial(_ovis2, 2),
        stacked(9, size=24, before=(100,), after=(101,)),
        "model.vision_tower.transformer.encoder.layers",
        beta=FEW,
    ),
]
