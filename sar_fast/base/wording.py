"""Values in messages: what came, cut short, so that a picture written as text does not fill the screen."""

from __future__ import annotations

import reprlib

LONGEST = 300  # characters of a path or of another error's words

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 2, 3, 3, 3
_SHORT.maxstring = _SHORT.maxother = 100


def quote(value: object) -> str:
    """A value as Python writes it, long ones without their middle; whatever it is, it can be printed."""
    return _SHORT.repr(value)


def describe(value: object) -> str:
    """A value as messages name it: its type and what it is; "missing" for None."""
    return "missing" if value is None else f"{type(value).__name__} {quote(value)}"


def cut(text: str, longest: int = LONGEST) -> str:
    """The text on one line, or its head and its length if it is longer; what cannot be printed is escaped."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
    return line if len(line) <= longest else f"{line[:longest]}... ({len(line)} characters)"


def reason(error: BaseException) -> str:
    """An error's own words on one line; its type where it has none."""
    return cut(str(error)) or type(error).__name__
