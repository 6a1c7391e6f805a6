"""Models, pictures and prompts: every command gets them here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from sar_fast import models
from sar_fast.cli.errors import UserError
from sar_fast.model_errors import ModelError, first_line
from sar_fast.models import MINIATURE as MINIATURE
from sar_fast.pictures import PictureError, find_picture, open_picture, picture_name
from sar_fast.processors import ProcessorRefusal, call_processor

OPTIONS = {"model": "--model", "base_model": "--base-model", "device": "--device", "dtype": "--dtype"}


@contextlib.contextmanager
def options_named(**others: str) -> Iterator[None]:
    """A :class:`ModelError` within becomes a :class:`UserError` that names the options of ``sar-fast``, or others."""
    try:
        yield
    except ModelError as error:
        raise UserError(error.worded(**{**OPTIONS, **others})) from error


def load_model(
    name: str, device: str = "auto", dtype: str = "auto", base_model: str | None = None
) -> tuple[nn.Module, Any]:
    """:func:`sar_fast.models.load_model` of a model or an adapter by name."""
    with options_named():
        return models.load_model(models.find_model(name, base_model), device, dtype)


def open_image(image: str | Path) -> Image.Image:
    """The picture of ``--image`` as it is shown, mode RGB."""
    try:
        place = find_picture(image, Path())
    except PictureError as error:
        raise UserError(f"--image {error}") from error
    try:
        return open_picture(place)
    except PictureError as error:
        raise UserError(f"--image {picture_name(str(image))!r} {error}") from error


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
            raise UserError(f"--model: its chat template cannot be rendered: {first_line(error)}") from error
    return f"USER: {getattr(processor, 'image_token', '<image>')}\n{question} ASSISTANT:"


def placeholder_in(processor: Any, words: str) -> str | None:
    """The processor's placeholder of a picture in a user's words: it would be taken for a picture. None if none is."""
    known = {getattr(processor, name, None) for name in ("image_token", "boi_token", "video_token")}
    return next((token for token in sorted(filter(None, known)) if str(token) in words), None)


def build_inputs(model: nn.Module, processor: Any, pictures: Sequence[Any], questions: Sequence[str]) -> Any:
    """Model inputs of a batch, question i about picture i, on the model's device and in its dtype."""
    texts = [build_prompt(processor, q) for q in questions]
    try:
        inputs = call_processor(processor, texts, pictures, padding=True, return_tensors="pt")
    except ProcessorRefusal as error:
        raise UserError(f"--image and --question: {error}") from error
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
