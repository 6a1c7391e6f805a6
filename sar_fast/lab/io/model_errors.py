"""What is wrong with a model that somebody named, in the words of whoever asked for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

ARGUMENTS = {name: name for name in ("model", "base_model", "device", "dtype")}
FLAGS = {name: f"--{name}" for name in ARGUMENTS} | {"model": "--model_name_or_path"}  # of experiments/*.py


class ModelError(ValueError):
    """One line about a model, its base, its device or its dtype.

    Args:
        text: the message, with ``{model}``, ``{base_model}``, ``{device}`` and ``{dtype}`` where it names an argument.
        values: what else the text has in braces.
    """

    def __init__(self, text: str, **values: Any) -> None:
        self.text, self.values = text, values
        super().__init__(self.worded())

    def worded(self, **names: str) -> str:
        """The message with a front end's own names of the arguments; by default they are called as they are here."""
        return self.text.format(**{**ARGUMENTS, **names}, **self.values)


@contextlib.contextmanager
def flags_named() -> Iterator[None]:
    """A :class:`ModelError` within becomes a ``ValueError`` that names the flags of ``experiments/*.py``."""
    try:
        yield
    except ModelError as error:
        raise ValueError(error.worded(**FLAGS)) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message; its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
