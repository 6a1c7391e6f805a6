"""Errors about arguments: which one, what came, what is needed; each front end has its own word for the argument."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping


class ArgumentError(ValueError):
    """A value that an argument must not have.

    Args:
        argument: its name in Python.
        came: what was given, as it is to be shown.
        needed: what it must do, ``"be > 0"``, ``"have shape (3,)"``; other arguments in braces, ``"be left out without
            {model}"``.
    """

    # no __init__: torch.compile does not trace one of an exception

    @property
    def argument(self) -> str:
        return self.args[0]

    @property
    def came(self) -> object:
        return self.args[1]

    @property
    def needed(self) -> str:
        return self.args[2]

    def __str__(self) -> str:
        return self.worded({})

    def worded(self, names: Mapping[str, str]) -> str:
        """One line, with a front end's own words for the arguments in ``names``."""
        needed = re.sub(r"\{(\w+)\}", lambda other: names.get(other[1], other[1]), self.needed)
        return f"{names.get(self.argument, self.argument)} must {needed}; got {self.came}"


class ArgumentTypeError(ArgumentError, TypeError):
    """A value of a type that an argument must not have."""


@contextlib.contextmanager
def arguments_named(names: Mapping[str, str]) -> Iterator[None]:
    """An :class:`ArgumentError` within names the arguments as ``names`` says: ``{"beta": "--sar_beta"}``."""
    try:
        yield
    except ArgumentError as error:
        renamed = lambda text: re.sub(r"\{(\w+)\}", lambda other: names.get(other[1], other[0]), text)
        raise type(error)(names.get(error.argument, error.argument), error.came, renamed(error.needed)) from error


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise :class:`ArgumentError` naming the argument unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(name, repr(value), f"be one of {', '.join(map(repr, choices))}")
