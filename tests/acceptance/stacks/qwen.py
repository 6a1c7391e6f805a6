"""A tiny random Qwen2.5-VL checkpoint, with the real models' token ids, which ms-swift knows by number."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from tests.hf.tiny import qwen2_5_vl

FIRST = 151643  # then come the special tokens, in this order
SPECIALS = (
    *("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start"),
    *("quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
)
IDS = {f"<|{name}|>": FIRST + number for number, name in enumerate(SPECIALS)}


def make_qwen(folder: Path) -> None:
    """Write model and processor; letters are the only other tokens."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2TokenizerFast(
        vocab=letters | IDS, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None,
        extra_special_tokens=list(IDS),
    )  # fmt: skip
    patches = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    images = Qwen2VLImageProcessor(**patches, min_pixels=16 * 16, max_pixels=40 * 40)
    config = qwen2_5_vl().config
    config.text_config.vocab_size = FIRST + len(IDS)
    for field, name in (("image", "image_pad"), ("video", "video_pad"), ("vision_start",) * 2, ("vision_end",) * 2):
        setattr(config, f"{field}_token_id", IDS[f"<|{name}|>"])
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(**patches)).save_pretrained(folder)
