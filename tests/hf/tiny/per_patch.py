"""Models whose visual tokens are the patches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.hf.tiny.base import IMAGE, LAYERS, Case, build, stacked, text, tower, vision

TOWER = tower("model.vision_tower.encoder.layers")
llava_batch = stacked(16)


def llava(layers: int = LAYERS, seed: int = 0, **text_changes: object) -> torch.nn.Module:
    """LLaVA-1.5 layout: CLIP with a class token, 16 patches, LLaMA with 4 query and 2 key/value heads."""
    return build(
        "llava",
        seed=seed,
        vision_config=vision("clip_vision_model"),
        text_config=text("llama", num_hidden_layers=layers, **text_changes),
        image_token_id=IMAGE,
        image_seq_length=16,
    )


def _llava_siglip() -> torch.nn.Module:
    """LLaVA around an encoder without a class token, features of two layers side by side."""
    return build(
        "llava",
        vision_config=vision("siglip_vision_model", vision_use_head=False),
        text_config=text("qwen2"),
        image_token_id=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=[-3, -1],
    )


def _paligemma(text_model: str, **changes: object) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        return build(
            "paligemma",
            vision_config=vision("siglip_vision_model", vision_use_head=False),
            text_config=text(text_model, head_dim=16, **changes),
            image_token_id=IMAGE,
            projection_dim=64,
        )

    return make


def with_types(batch_of: Callable[..., dict[str, Tensor]], name: str, *, images: bool) -> Callable:
    """The batches of ``batch_of`` with token types: 1 on pictures, or 0 everywhere."""

    def batch(*args: object, **kwargs: object) -> dict[str, Tensor]:
        inputs = batch_of(*args, **kwargs)
        return inputs | {name: (inputs["input_ids"] == IMAGE).long() * images}

    return batch


def _deepseek_vl() -> torch.nn.Module:
    return build(
        "deepseek_vl",
        vision_config=vision("siglip_vision_model", vision_use_head=False),
        text_config=text("llama"),
        image_token_id=IMAGE,
    )


_PREFIX = {"batch": with_types(llava_batch, "token_type_ids", images=False), "generated": {"token_type_ids": 1}}
CASES = [
    Case("llava", llava, llava_batch, TOWER),
    Case("llava-siglip", _llava_siglip, llava_batch, TOWER),
    Case("paligemma", _paligemma("gemma"), blocks=TOWER, **_PREFIX),
    Case(
        "paligemma2",
        _paligemma("gemma2", query_pre_attn_scalar=16, attn_logit_softcapping=5.0, sliding_window=12),
        blocks=TOWER,
        **_PREFIX,
        static_error=AttributeError,
    ),
    Case("deepseek_vl", _deepseek_vl, llava_batch, tower("model.vision_model.encoder.layers")),
]
