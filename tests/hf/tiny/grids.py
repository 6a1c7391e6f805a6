"""Models that see pictures as grids of patches of any shape; the pictures are non-square and of several sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.hf.tiny.base import (
    IMAGE,
    LAYERS,
    VERSION,
    VIDEO,
    Case,
    build,
    noise,
    randomize,
    rows_with_pictures,
    text,
    tower,
)

QWEN_GRIDS = ((1, 8, 12), (1, 12, 8), (1, 6, 10))  # patches (t, h, w) of the pictures
CLIP = (3, 4, 6)  # of the video: t counts pairs of frames
PATCH_PIXELS = 3 * 2 * 4 * 4  # two frames of a patch
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
MARKS = {"vision_start_token_id": 97, "vision_end_token_id": 96}
GLM_MARKS = {
    "image_start_token_id": 97,
    "image_end_token_id": 96,
    "video_start_token_id": 95,
    "video_end_token_id": 94,
}


def _tokens(grid: tuple[int, int, int]) -> int:
    t, h, w = grid
    return t * h * w // 4


def qwen_batch(images: list[int], side: str = "left", first_image: int = 0) -> dict[str, Tensor]:
    """Pixels of all patches one after another, ``image_grid_thw``, token types."""
    grid_of = lambda number: QWEN_GRIDS[number % len(QWEN_GRIDS)]
    batch, numbers = rows_with_pictures(images, side, first_image, lambda n: [97, *[IMAGE] * _tokens(grid_of(n)), 96])
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
    every = [n for row in numbers for n in row]
    if every:
        batch["pixel_values"] = torch.cat([noise(n, 4 * _tokens(grid_of(n)), PATCH_PIXELS) for n in every])
        batch["image_grid_thw"] = torch.tensor([grid_of(n) for n in every])
    return batch


def _untyped(inputs: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """The same inputs without token types, for models with one-dimensional positions."""

    def without_types(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {name: x for name, x in inputs(*args, **kwargs).items() if name != "mm_token_type_ids"}

    return without_types


def _video_row(separate_frames: bool, token: int = VIDEO) -> dict[str, Tensor]:
    """One row with a clip, as one block of tokens or with text between the frames."""
    t, h, w = CLIP
    frame = [97, *[token] * (h * w // 4), 96, 20]
    row = frame * t if separate_frames else [97, *[token] * _tokens(CLIP), 96]
    ids = torch.tensor([[5, 6, *row, 8, 9, 10, 11]])
    return {
        "input_ids": ids,
        "mm_token_type_ids": 2 * (ids == token).int(),
        "pixel_values_videos": noise(50, t * h * w, PATCH_PIXELS),
        "video_grid_thw": torch.tensor([CLIP]),
    }


def _qwen_vision(**changes: Any) -> dict[str, Any]:
    return {
        "depth": 6,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 64,
        "initializer_range": 0.2,
    } | changes


def _qwen(model_type: str, vision: dict[str, Any], layers: int = LAYERS, seed: int = 0, **changes: Any) -> Any:
    config = text(f"{model_type}_text", num_hidden_layers=layers, rope_parameters=dict(MROPE), **changes)
    return build(
        model_type,
        seed=seed,
        vision_config=vision,
        text_config=config,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **MARKS,
    )


def qwen2_5_vl(layers: int = LAYERS, seed: int = 0) -> torch.nn.Module:
    """Windowed vision attention, 2 x 2 patch merging, mrope."""
    return _qwen("qwen2_5_vl", _qwen_vision(window_size=16, fullatt_block_indexes=[2, 5]), layers, seed)


def _exaone4_5() -> torch.nn.Module:
    """Qwen2.5-VL's encoder before a text model with sliding layers."""
    return build(
        "exaone4_5",
        vision_config=_qwen_vision(window_size=16, fullatt_block_indexes=[2, 5], num_key_value_heads=2),
        text_config=text("exaone4", head_dim=16, sliding_window=12, sliding_window_pattern=2),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def _qwen2_vl() -> torch.nn.Module:
    vision = _qwen_vision(embed_dim=32, hidden_size=64, mlp_ratio=2)
    for name in ("out_hidden_size", "intermediate_size"):
        vision.pop(name)
    return _qwen("qwen2_vl", vision)


def _deepstack_vision() -> dict[str, Any]:
    return _qwen_vision(num_position_embeddings=16, deepstack_visual_indexes=[1, 3])


def _qwen3_vl() -> torch.nn.Module:
    return _qwen("qwen3_vl", _deepstack_vision(), head_dim=16)


def _qwen3_vl_moe() -> torch.nn.Module:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 2}
    return _qwen("qwen3_vl_moe", _deepstack_vision(), head_dim=16, **experts)


def _qwen3_5(model_type: str) -> torch.nn.Module:
    """A hybrid: linear-attention layers never attend."""
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
    }
    if model_type.endswith("moe"):
        linear |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        linear |= {"shared_expert_intermediate_size": 32}
    vision = _qwen_vision(num_position_embeddings=16)
    return _qwen(model_type, vision, head_dim=16, layer_types=list(HYBRID), layers=len(HYBRID), **linear)


HYBRID = ("linear_attention", "full_attention", "linear_attention", "full_attention", "full_attention")


def _glm(model_type: str) -> torch.nn.Module:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 2}
    moe = model_type.endswith("moe")
    kind = "glm4v" if model_type == "glm46v" else model_type
    vision = _qwen_vision(image_size=32) | {"model_type": f"{kind}_vision", "attention_bias": False}
    rope = dict(MROPE) | {"partial_rotary_factor": 1.0}
    return build(
        model_type,
        vision_config=vision,
        text_config=text(f"{kind}_text", rope_parameters=rope, head_dim=16, **(experts if moe else {})),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **GLM_MARKS,
    )


def _kimi() -> torch.nn.Module:
    """DeepSeek-V3's latent attention: keys of 24 dimensions, values of 16, a key/value head for every query head."""
    vision = {
        "model_type": "kimi_k25_vision",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "patch_size": 4,
        "pos_emb_height": 8,
        "pos_emb_width": 8,
        "initializer_range": 0.2,
    }
    latent = {
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 2,
        "routed_scaling_factor": 1.0,
    }
    model = build(
        "kimi_k25",
        vision_config=vision,
        text_config=text("deepseek_v3", **latent),
        projection_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **MARKS,
    )
    return randomize(model, "model.vision_tower.patch_embed.pos_emb.position_embeddings")


def _kimi_batch(images: list[int], side: str = "left", first_image: int = 0) -> dict[str, Tensor]:
    batch = _untyped(qwen_batch)(images, side, first_image)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"][:, : 3 * 4 * 4].reshape(-1, 3, 4, 4)
    return batch


def kimi_video(t: int = 1) -> dict[str, Tensor]:
    """A clip of ``t`` frames, whose tokens are means over them."""
    _, h, w = CLIP
    return {
        "input_ids": torch.tensor([[5, 6, 97, *[VIDEO] * (h * w // 4), 96, 8, 9, 10, 11]]),
        "pixel_values_videos": noise(50, t * h * w, 3, 4, 4),
        "video_grid_thw": torch.tensor([(t, h, w)]),
    }


SIZES = ((16, 24), (24, 8), (8, 16))  # pixels, height and width


def _pixtral_batch(merge: int) -> Callable[..., dict[str, Tensor]]:
    """Pictures padded to one size, their own in ``image_sizes``."""

    def batch(images: list[int], side: str = "left", first_image: int = 0) -> dict[str, Tensor]:
        size_of = lambda number: SIZES[number % len(SIZES)]
        tokens = lambda n: [IMAGE] * (size_of(n)[0] * size_of(n)[1] // (4 * merge) ** 2)
        inputs, numbers = rows_with_pictures(images, side, first_image, tokens)
        every = [n for row in numbers for n in row]
        if every:
            pixels = torch.zeros(len(every), 3, 24, 24)
            for i, n in enumerate(every):
                h, w = size_of(n)
                pixels[i, :, :h, :w] = noise(n, 3, h, w)
            inputs["pixel_values"] = pixels
            inputs["image_sizes"] = torch.tensor([size_of(n) for n in every])
        return inputs

    return batch


def pixtral_vision() -> dict[str, Any]:
    return {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 4,
        "initializer_range": 0.2,
    }


def _mistral3() -> torch.nn.Module:
    return build(
        "mistral3",
        vision_config=pixtral_vision(),
        text_config=text("mistral", sliding_window=None, head_dim=16),
        image_token_id=IMAGE,
        spatial_merge_size=2,
    )


def _pixtral() -> torch.nn.Module:
    """Pixtral is LLaVA's model class around Pixtral's vision encoder."""
    return build(
        "llava",
        vision_config=pixtral_vision(),
        text_config=text("mistral", sliding_window=None, head_dim=16),
        image_token_id=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )


def _lfm2_vl() -> torch.nn.Module:
    """A hybrid: convolutions between the attention layers."""
    vision = {
        "model_type": "siglip2_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "num_patches": 16,
        "patch_size": 4,
        "vision_use_head": False,
    }
    config = text(
        "lfm2",
        layer_types=["conv", "full_attention", "full_attention", "full_attention"],
        block_auto_adjust_ff_dim=False,
    )
    return build("lfm2_vl", vision_config=vision, text_config=config, image_token_id=IMAGE, projector_hidden_size=64)


def _lfm2_batch(images: list[int], side: str = "left", first_image: int = 0) -> dict[str, Tensor]:
    """Patches padded to one length, their grids in ``spatial_shapes``."""
    grid_of = lambda number: QWEN_GRIDS[number % len(QWEN_GRIDS)]
    inputs, numbers = rows_with_pictures(images, side, first_image, lambda n: [IMAGE] * _tokens(grid_of(n)))
    every = [n for row in numbers for n in row]
    if every:
        longest = max(4 * _tokens(g) for g in QWEN_GRIDS)
        pixels = torch.zeros(len(every), longest, 3 * 4 * 4)
        real = torch.zeros(len(every), longest, dtype=torch.int32)
        for i, n in enumerate(every):
            patches = 4 * _tokens(grid_of(n))
            pixels[i, :patches], real[i, :patches] = noise(n, patches, 3 * 4 * 4), 1
        shapes = torch.tensor([grid_of(n)[1:] for n in every])
        inputs |= {"pixel_values": pixels, "pixel_attention_mask": real, "spatial_shapes": shapes}
    return inputs


def _gemma4(shared: int) -> torch.nn.Module:
    """Sliding and full layers, bidirectional image blocks, per-layer embeddings; optionally layers without own keys."""
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "patch_size": 4,
        "pooling_kernel_size": 2,
        "position_embedding_size": 32,
        "initializer_range": 0.2,
    }
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = text(
        "gemma4_text",
        head_dim=16,
        global_head_dim=32,
        layer_types=types,
        sliding_window=12,
        num_kv_shared_layers=shared,
        vocab_size_per_layer_input=120,
        hidden_size_per_layer_input=8,
        use_bidirectional_attention="vision",
        initializer_range=0.1,
    )
    marks = {"boi_token_id": 97, "eoi_token_id": 96, "audio_token_id": 95, "boa_token_id": 94}
    return build(
        "gemma4",
        vision_config=vision,
        text_config=config,
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **marks,
    )


def _gemma4_patches(grids: list[tuple[int, int]], first: int) -> tuple[Tensor, Tensor]:
    """(n, longest, pixels of a patch) and the patches' (x, y), -1 where there is none."""
    longest = max(h * w for _, h, w in QWEN_GRIDS)
    pixels = torch.zeros(len(grids), longest, 3 * 4 * 4)
    positions = torch.full((len(grids), longest, 2), -1)
    for i, (h, w) in enumerate(grids):
        pixels[i, : h * w] = noise(first + i, h * w, 3 * 4 * 4)
        positions[i, : h * w] = torch.tensor([(x, y) for y in range(h) for x in range(w)])
    return pixels, positions


def _gemma4_batch(images: list[int], side: str = "left", first_image: int = 0) -> dict[str, Tensor]:
    grid_of = lambda number: QWEN_GRIDS[number % len(QWEN_GRIDS)]
    inputs, _ = rows_with_pictures(images, side, first_image, lambda n: [97, *[IMAGE] * _tokens(grid_of(n)), 96])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    if sum(images):
        grids = [grid_of(n)[1:] for n in range(first_image, first_image + sum(images))]
        inputs["pixel_values"], inputs["image_position_ids"] = _gemma4_patches(grids, first_image)
    return inputs


def _gemma4_video() -> dict[str, Tensor]:
    """Three frames, each its own block of tokens."""
    row = [5, 6, *([20, 97, *[VIDEO] * 6, 96] * 3), 8, 9, 10, 11]
    pixels, positions = _gemma4_patches([(4, 6)] * 3, 50)
    ids = torch.tensor([row])
    inputs = {"input_ids": ids, "mm_token_type_ids": 2 * (ids == VIDEO).int()}
    if VERSION < (5, 18):  # clips of one length, in a dimension of their own
        return inputs | {"pixel_values_videos": pixels[None], "video_position_ids": positions[None]}
    frames = {"num_frames_per_video": torch.tensor([3])}
    return inputs | {"pixel_values_videos": pixels, "video_position_ids": positions} | frames


_QWEN = {
    "batch": qwen_batch,
    "blocks": "model.visual.blocks",
    "generated": {"mm_token_type_ids": 0},
}
CASES = [
    Case("qwen2_vl", _qwen2_vl, **_QWEN, video=partial(_video_row, False)),
    Case("qwen2_5_vl", qwen2_5_vl, **_QWEN, video=partial(_video_row, False)),
    Case(
        "exaone4_5",
        _exaone4_5,
        _untyped(qwen_batch),
        "model.visual.blocks",
        video=_untyped(partial(_video_row, False)),
        since=(5, 8),
    ),
    Case("qwen3_vl", _qwen3_vl, **_QWEN, video=partial(_video_row, True)),
    Case("qwen3_vl_moe", _qwen3_vl_moe, **_QWEN, video=partial(_video_row, True)),
    *(
        Case(name, partial(_qwen3_5, name), **_QWEN, attending=(1, 3, 4), video=partial(_video_row, True))
        for name in ("qwen3_5", "qwen3_5_moe")
    ),
    *(
        Case(name, partial(_glm, name), **_QWEN, video=partial(_video_row, True, IMAGE))
        for name in ("glm4v", "glm4v_moe", "glm46v", "glm_ocr")
    ),
    Case(
        "mistral3",
        _mistral3,
        _pixtral_batch(2),
        "model.vision_tower.transformer.layers",
    ),
    Case(
        "pixtral",
        _pixtral,
        _pixtral_batch(1),
        "model.vision_tower.transformer.layers",
    ),
    Case(
        "kimi_k25",
        _kimi,
        _kimi_batch,
        "model.vision_tower.layers",
        video=kimi_video,
        since=(5, 13),
    ),
    Case(
        "lfm2_vl",
        _lfm2_vl,
        _lfm2_batch,
        tower("model.vision_tower.encoder.layers"),
        attending=(1, 2, 3),
    ),
    *(
        Case(
            name,
            partial(_gemma4, shared),
            _gemma4_batch,
            "model.vision_tower.encoder.layers",
            generated={"mm_token_type_ids": 0},
            video=_gemma4_video,
            since=(5, 5),
        )
        for name, shared in (("gemma4", 0), ("gemma4-shared-kv", 2))
    ),
]
