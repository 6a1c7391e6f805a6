"""The prompts of a sample: its query, and paraphrases by templates."""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter
from typing import Any

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.io.chat_template import placeholder_in
from sar_fast.lab.io.skips import PLACEHOLDER, SampleSkipped

DEFAULT_TEMPLATES = (
    "the {} in the image",
    "a photo of the {}",
    "the location of the {}",
    "focus on the {}",
    "where is the {} in this picture?",
)


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """The templates, if each has exactly one place for the object's name, and no other; else ``ArgumentError``."""
    if isinstance(templates, str) or not templates:
        raise ArgumentError("templates", repr(templates), "be a list of texts, one or more")
    for template in templates:
        try:
            places = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
        except ValueError:  # a single brace
            places = None
        if places != [""] or template.count("{}") != 1:
            needed = "be texts with exactly one {}, where the object's name goes, and no other brace (doubled ones are "
            raise ArgumentError("templates", repr(template), f"{needed}written once)")
    return tuple(templates)


def check_words(processor: Any, words: Sequence[str]) -> None:
    """:class:`SampleSkipped` if a prompt has what stands for a picture: the model would look for a second one."""
    for prompt in words:
        if marker := placeholder_in(processor, prompt):
            raise SampleSkipped(PLACEHOLDER, f"{marker!r} in {prompt!r}")
