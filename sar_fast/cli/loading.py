"""Models, pictures and prompts: every command gets them here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import nn

from sar_fast.cli.errors import UserError
from sar_fast.cli.options import MINIATURE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name!r} cannot be used here: {_first_line(error)}") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 on the CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UserError(f"--dtype must be auto, {', '.join(DTYPES)}; got {name!r}")
    return DTYPES[name]


def load_model(name: str, device: str = "auto", dtype: str = "auto") -> tuple[nn.Module, Any]:
    """(model in eval mode, processor) of ``miniature``, of a folder, or of a Hugging Face hub id."""
    from transformers.utils.logging import disable_progress_bar

    place = choose_device(device)
    number = choose_dtype(dtype, place)
    disable_progress_bar()
    if name == MINIATURE:
        from sar_fast.miniature.checkpoint import load_miniature

        return load_miniature(number, place)

    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    path = Path(name).expanduser()
    if is_missing_folder(name):
        raise UserError(f"--model {name!r} is no folder on this machine")
    source = str(path) if path.is_dir() else name
    try:
        AutoConfig.from_pretrained(source)  # the processor asks for five files; without network each waits in turn
        processor = AutoProcessor.from_pretrained(source)
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=number)
    except ImportError as error:
        needed = next((p for p in ("torchvision", "sentencepiece", "tiktoken", "timm") if p in str(error)), None)
        reason = f"needs {needed}: pip install {needed}" if needed else f"needs a package: {_first_line(error)}"
        build = " (the build that matches your torch)" if needed == "torchvision" else ""
        raise UserError(f"--model {name!r} {reason}{build}") from error
    except Exception as error:  # a folder can be broken in as many ways as there are files in it
        raise UserError(
            f"--model {name!r} cannot be loaded as an image-text-to-text model: {_first_line(error)}"
        ) from error
    return model.to(place).eval(), processor


def is_missing_folder(name: str) -> bool:
    """Whether a model's name can only be a folder, and is none: the hub would answer something about repository ids."""
    path = Path(name).expanduser()
    return not path.is_dir() and (path.exists() or name.startswith((".", "~", os.sep)) or name.count("/") > 1)


def open_image(path: Path) -> Image.Image:
    """The picture as RGB."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"--image {str(path)!r} does not exist") from error
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"--image {str(path)!r} cannot be read as a picture: {_first_line(error)}") from error


def build_prompt(processor: Any, question: str) -> str:
    """The prompt of one picture and one question: the processor's chat template, or else LLaVA-1.5's words."""
    if not question.strip():
        raise UserError("--question is empty, needed some words")
    if marker := placeholder_in(processor, question):
        raise UserError(f"--question has {marker!r}, which stands for a picture; leave it out")
    if getattr(processor, "chat_template", None):
        from jinja2 import TemplateError

        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        try:
            return processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise UserError(f"--model: its chat template cannot be rendered: {_first_line(error)}") from error
    return f"USER: {getattr(processor, 'image_token', '<image>')}\n{question} ASSISTANT:"


def placeholder_in(processor: Any, words: str) -> str | None:
    """The processor's placeholder of a picture in a user's words: it would be taken for a picture. None if none is."""
    known = {getattr(processor, name, None) for name in ("image_token", "boi_token", "video_token")}
    return next((token for token in sorted(filter(None, known)) if str(token) in words), None)


def build_inputs(model: nn.Module, processor: Any, pictures: Sequence[Any], questions: Sequence[str]) -> Any:
    """Model inputs of a batch, question i about picture i, on the model's device and in its dtype."""
    texts = [build_prompt(processor, q) for q in questions]
    inputs = processor(images=list(pictures), text=texts, padding=True, return_tensors="pt")
    return inputs.to(model.device, model.dtype)


def tokenizer_of(processor: Any) -> Any:
    """The processor's tokenizer; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


@torch.no_grad()
def answer(
    model: nn.Module, processor: Any, pictures: Sequence[Any], questions: Sequence[str], max_new_tokens: int = 32
) -> list[str]:
    """Greedy answers to question i about picture i, as one batch."""
    inputs = build_inputs(model, processor, pictures, questions)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [reply.strip() for reply in tokenizer_of(processor).batch_decode(new, skip_special_tokens=True)]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
