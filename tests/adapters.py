"""Adapters on the miniature whose weights are far from doing nothing, as PEFT writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from sar_fast.hf import apply_sar
from sar_fast.lab.io.answering import build_inputs
from sar_fast.lab.io.model_source import MINIATURE_PATH
from sar_fast.lab.miniature.drawing import draw_scene

TARGETS = r".*language_model.*\.(q_proj|v_proj|o_proj)"
QUESTION = "What colour is the circle?"


def base_model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(MINIATURE_PATH)


def lora(**changes: Any) -> Any:
    """A LoRA configuration of rank 4, with changes."""
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **changes})


def write_adapter(folder: Path, config: Any = None, processor: bool = True) -> Path:
    """An adapter of random weights in ``folder``, with the processor's files as train.py leaves them."""
    from peft import get_peft_model

    wrapped = get_peft_model(base_model(), config or lora())
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    if processor:
        AutoProcessor.from_pretrained(MINIATURE_PATH).save_pretrained(folder)
    return folder


def usual_mode(folder: Path) -> int:
    """Permissions of any new file."""
    (folder / "file").touch()
    mode = (folder / "file").stat().st_mode & 0o777
    (folder / "file").unlink()
    return mode


def picture() -> Image.Image:
    return Image.fromarray(draw_scene(np.random.default_rng(3), size=64, objects=2).image)


@torch.no_grad()
def logits(model: Any, config: Any = None) -> torch.Tensor:
    """Of the last position of a prompt with a picture, with SAR where ``config`` is given."""
    inputs = build_inputs(model, AutoProcessor.from_pretrained(MINIATURE_PATH), [picture()], [QUESTION])
    if config is None:
        return model(**inputs).logits[:, -1]
    with apply_sar(model, config):
        return model(**inputs).logits[:, -1]
