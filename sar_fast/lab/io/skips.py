"""Why a sample cannot be asked or scored, in words that results count and list."""

from __future__ import annotations

NO_BOX_AREA = "box has no area"
BOX_OUTSIDE = "box outside the image"
BOX_FRACTIONS = "box in fractions of the picture, needed pixels"
UNREADABLE = "unreadable image"
PLACEHOLDER = "words with the placeholder of a picture"
REFUSED = "refused by the model's processor"


class SampleSkipped(Exception):
    """A sample that cannot be scored; ``reason`` is one of the module's, counted and listed in the results."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
