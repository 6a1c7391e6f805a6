"""Checkpoints of the miniature of places, and the same model for larger pictures."""

from __future__ import annotations

import copy

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.miniature.places.scenes import SIDE

SIDES = {96: 144, 144: 324, 192: 576}  # pixels of a picture's side: visual tokens


def at_side(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, side: int
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Copies of a model and its processor for pictures of ``side`` x ``side`` pixels.

    The tower's position embeddings are interpolated (bicubic), as CLIP's are with ``interpolate_pos_encoding``.
    Training saw all of ``SIDES``; ``ArgumentError`` for another one.
    """
    if side not in SIDES:
        raise ArgumentError("side", side, f"be one of {', '.join(map(str, SIDES))} pixels, which training saw")
    config = copy.deepcopy(model.config)
    config.vision_config.image_size, config.image_seq_length = side, SIDES[side]
    with torch.no_grad():
        resized = LlavaForConditionalGeneration(config).to(model.device, model.dtype)
        state = model.state_dict()
        name = next(n for n in state if n.endswith("position_embedding.weight"))
        old = model.model.vision_tower.embeddings
        patches = torch.empty(1, 1 + SIDES[side], old.embed_dim, dtype=old.position_embedding.weight.dtype)
        if side != SIDE:
            state[name] = old.interpolate_pos_encoding(patches, side, side)[0]
        resized.load_state_dict(state)
    resized.generation_config = copy.deepcopy(model.generation_config)
    larger = copy.deepcopy(processor)
    square = {"height": side, "width": side}
    larger.image_processor.size, larger.image_processor.crop_size = dict(square), dict(square)
    return resized.train(model.training), larger
