"""``--template``: a Jinja file in place of a model's chat template, tried before anything is loaded or written."""

from __future__ import annotations

from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

TOKENS = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")  # that a processor hands to templates
TOKENS |= dict.fromkeys(("image_token", "boi_token", "eoi_token"), "<image>")


def read_template(path: str) -> str:
    """The template in a file; ``ValueError`` unless it renders a picture's question with the words in it."""
    if not Path(path).is_file():
        raise ValueError(f"template is {path!r}, needed a Jinja file; the model's own is used without the flag")
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
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}]
    (text,), _ = render_jinja_template([turns], chat_template=template, add_generation_prompt=True, **TOKENS)
    return text
