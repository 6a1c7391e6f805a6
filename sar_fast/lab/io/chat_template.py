"""How a question about a picture becomes a prompt: by a chat template, or in LLaVA-1.5's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.io.model_errors import first_line

TOKENS = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")  # that a processor hands to templates
TOKENS |= dict.fromkeys(("image_token", "boi_token", "eoi_token"), "<image>")


def build_prompt(processor: Any, question: str) -> str:
    """The prompt of one picture and one question: the processor's chat template, or else LLaVA-1.5's words.

    Raises:
        ArgumentError: ``question`` is empty or holds what stands for a picture; the template of ``model`` is broken.
    """
    if not question.strip():
        raise ArgumentError("question", repr(question), "be some words")
    if marker := placeholder_in(processor, question):
        raise ArgumentError("question", repr(question), f"be without {marker!r}, which stands for a picture")
    if not getattr(processor, "chat_template", None):
        return llava_prompt(question, getattr(processor, "image_token", "<image>"))
    content = [{"type": "image"}, {"type": "text", "text": question}]
    try:
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    except TemplateError as error:
        raise ArgumentError("model", first_line(error), "be one whose chat template can be rendered") from error


def llava_prompt(question: str, image_token: str = "<image>") -> str:
    """LLaVA-1.5's words around a question."""
    return f"USER: {image_token}\n{question} ASSISTANT:"


def placeholder_in(processor: Any, words: str) -> str | None:
    """The processor's placeholder of a picture in a user's words: it would be taken for a picture. None if none is."""
    known = {getattr(processor, name, None) for name in ("image_token", "boi_token", "video_token")}
    return next((token for token in sorted(filter(None, known)) if str(token) in words), None)


def tokenizer_of(processor: Any) -> Any:
    """The processor's tokenizer; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def read_template(path: str) -> str:
    """The template in a file; ``ValueError`` unless it renders a picture's question with the words in it."""
    if not Path(path).is_file():
        raise ArgumentError("template", repr(path), "be a Jinja file; without it the model's own is used")
    try:
        template = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"template {path} is not UTF-8 text: {error}") from error
    try:
        one, other = (_render(template, words) for words in ("What is this?", "Where is it?"))
    except Exception as error:  # a template is a program: it can fail in any way
        line = getattr(error, "lineno", None)
        place = f", line {line}" if line else ""
        raise ValueError(f"template {path}{place} cannot be rendered: {' '.join(str(error).split())}") from error
    if one == other:
        raise ValueError(f"template {path} leaves out the user's words; needed a place for the text of a content")
    return template


def _render(template: str, words: str) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}]
    (text,), _ = render_jinja_template([turns], chat_template=template, add_generation_prompt=True, **TOKENS)
    return text
