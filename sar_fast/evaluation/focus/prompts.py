"""The prompts of a sample: its query, and paraphrases by templates."""

from __future__ import annotations

from collections.abc import Sequence

DEFAULT_TEMPLATES = (
    "the {} in the image",
    "a photo of the {}",
    "the location of the {}",
    "focus on the {}",
    "where is the {} in this picture?",
)


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """The templates, if each has exactly one place for the object's name."""
    if isinstance(templates, str) or not templates:
        raise ValueError(f"templates must be a non-empty list of texts; got {templates!r}")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"templates: {template!r} needs exactly one {{}}, where the object's name goes")
    return tuple(templates)
