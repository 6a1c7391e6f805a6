"""A call of a model's processor, whose refusal of a picture or of words is an error of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from sar_fast.base.wording import reason


class ProcessorRefusal(ValueError):
    """A model's processor makes no input of a picture or of words: a shape that it cannot resize, a placeholder.

    ``why`` is the processor's own error, type and words, on one line.
    """

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


def call_processor(processor: Any, texts: Sequence[str], pictures: Sequence[Image.Image], **options: Any) -> Any:
    """What the processor makes of ``texts`` and, if there are any, ``pictures``, in the order of their placeholders.

    ``options`` are further ones of the processor. Errors of packages that are missing, and of memory, are left alone.

    Raises:
        ProcessorRefusal: whatever else the processor raises; it names the pictures' sizes.
    """
    if pictures:
        options["images"] = list(pictures)
    try:
        return processor(text=list(texts), **options)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # processors refuse sizes and texts with whatever their arithmetic runs into
        sizes = ", ".join(f"{picture.width} x {picture.height}" for picture in pictures)
        shown = f"pictures of {sizes} pixels with their words" if pictures else "the words"
        message = f"the model's processor refuses {shown}: {reason(error)}"
        raise ProcessorRefusal(message, f"{type(error).__name__}: {reason(error)}") from error
