"""The miniature's checkpoint: where it lies, how it is loaded, how it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.io.model_source import MINIATURE_PATH
from sar_fast.lab.io.models import load_miniature_processor
from sar_fast.lab.miniature.questions import build_prompt


def load_miniature(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", path: str | Path = MINIATURE_PATH
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Loads the shipped model, in eval mode, and its processor. Needs no network and no torchvision.

    The processor always resizes with Pillow, so that the same picture gives the same input on every machine.
    ``path`` may name another checkpoint that ``experiments/miniature/train.py`` wrote; ``FileNotFoundError`` if there
    is none.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"path is {path}, needed a folder with the miniature's config.json")
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype, local_files_only=True)
    return model.to(device).eval(), load_miniature_processor(path)


@torch.no_grad()
def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: Sequence[np.ndarray | Image.Image],
    questions: Sequence[str],
    batch_size: int = 64,
) -> list[str]:
    """Greedy answers to ``questions[i]`` about ``images[i]``, in words.

    An image is RGB, (H, W, 3) uint8 or Pillow, of any size; it is stretched to the model's square input.
    ``ValueError`` if there are not as many questions as images.
    """
    if len(images) != len(questions):
        raise ArgumentError("questions", f"{len(questions)} for {len(images)} images", "be one per image")
    replies: list[str] = []
    for start in range(0, len(images), batch_size):
        inputs = processor(
            images=list(images[start : start + batch_size]),
            text=[build_prompt(q) for q in questions[start : start + batch_size]],
            padding=True,
            return_tensors="pt",
        ).to(model.device, model.dtype)
        output = model.generate(**inputs)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        replies += processor.batch_decode(new_tokens, skip_special_tokens=True)
    return replies
