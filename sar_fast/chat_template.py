"""``--template``: a Jinja file in place of a model's chat template, tried before anything is loaded or written."""

from __future__ import annotations

from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

TOKENS = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")  # that a processor hands to templates
TOKENS |= dict.fromkeys(("image_token", "boi_token", "eoi_token"), "<image>")


def read_template(path: str, *, picture: bool = True) -> str:
    """The template in a file; ``ValueError`` unless it renders the words of a user and, with ``picture``, a picture."""
    if not Path(path).is_file():
        raise ValueError(f"template is {path!r}, needed a Jinja file; the model's own is used without the flag")
    try:
        template = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"template {path} is not UTF-8 text: {error}") from error
    image, words = {"type": "image"}, {"type": "text", "text": "What is this?"}
    try:
        whole = _render(template, [image, words])
        without_picture, without_words = _render(template, [words]), _render(template, [image])
    except Exception as error:  # a template is a program: it can fail in any way
        line = getattr(error, "lineno", None)
        place = f", line {line}" if line else ""
        raise ValueError(f"template {path}{place} cannot be rendered: {' '.join(str(error).split())}") from error
    if whole == without_words:
        raise ValueError(f"template {path} leaves out the user's words; needed a place for content[...]['text']")
    if picture and whole == without_picture:
        raise ValueError(f"template {path} leaves out the picture; needed its placeholder where a content is an image")
    return template


def _render(template: str, content: list[dict[str, str]]) -> str:
    (text,), _ = render_jinja_template(
        [[{"role": "user", "content": content}]], chat_template=template, add_generation_prompt=True, **TOKENS
    )
    return text
