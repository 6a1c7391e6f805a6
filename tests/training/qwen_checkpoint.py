"""A tiny random Qwen2.5-VL in a folder, with a processor of transformers' classes, as a user would download one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForImageTextToText

from tests.hf.tiny import qwen2_5_vl
from tests.training.samples import CHATML

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
TEMPLATE = CHATML.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")


def write_qwen(folder: Path) -> tuple[Any, Any]:
    """Write the checkpoint; the model and its processor. Needs torchvision, as the processor does."""
    from transformers import Qwen2_5_VLProcessor, Qwen2TokenizerFast, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    letters = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2TokenizerFast(
        vocab=letters, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None,
        extra_special_tokens=[*SPECIALS, "<|video_pad|>"],
    )  # fmt: skip
    patches = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**patches, min_pixels=16 * 16, max_pixels=40 * 40),
        tokenizer,
        Qwen2VLVideoProcessor(**patches),
        chat_template=TEMPLATE,
    )
    config = qwen2_5_vl().config
    config.text_config.vocab_size = len(tokenizer)
    for field, token in (("image", "image_pad"), ("video", "video_pad"), ("vision_start",) * 2, ("vision_end",) * 2):
        setattr(config, f"{field}_token_id", tokenizer.convert_tokens_to_ids(f"<|{token}|>"))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor
