"""Errors that a user can mend: one line on stderr, exit code 2, no traceback."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from sar_fast.base.errors import ArgumentError
from sar_fast.base.extras import EXTRA_OF, MissingExtraError, need
from sar_fast.lab.run.foreign_flags import hint

OPTION_OF = {  # names that library errors begin with, as the option that sets them
    "activation_layer_k": "--k",
    "beta": "--beta",
    "decode": "--decode",
    "normalize": "--normalize",
    "weighting": "--weighting",
    "backend": "--backend",
    "model": "--model",
    "k": "--k",
    "output_dir": "--output_dir",
    "max_samples": "--max_samples",
    "epochs": "--epochs",
    "question": "--question",
}
UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # click's, which typer brings or, if older, imports
INTERRUPTED = 130  # what a shell shows for a command that Ctrl-C ended


class UserError(Exception):
    """Names the option, says what came and what is needed."""

    @classmethod
    def of(cls, error: Exception) -> UserError:
        """A library's ``ValueError`` or ``TypeError``, with the argument's name turned into the option's."""
        if isinstance(error, ArgumentError):
            return cls(" ".join(error.worded(OPTION_OF).split()))
        message = " ".join(str(error).split())
        for argument, option in OPTION_OF.items():
            for separator in (":", " ", "="):
                if message.startswith(argument + separator):
                    return cls(option + message[len(argument) :])
        return cls(message)


def one_spelling(name: str) -> str:
    """Options of commands and flags of scripts have one name, with ``_``; ``-`` is taken for it."""
    return name.replace("-", "_")


class Commands(TyperGroup):
    """A command group in which all that a user can mend ends in one line: a :class:`UserError`, unknown and missing
    options, files that cannot be read or written, packages that are not installed, too little memory; and Ctrl-C."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except typer.Abort:  # Ctrl-C, of older typers
            code = INTERRUPTED
        except Exception as error:
            line = _line(error)
            if line is None:
                raise
            sys.stderr.write(line and f"error: {line}\n")
            sys.exit(2)
        if code == INTERRUPTED:
            sys.stderr.write("interrupted\n")
        sys.exit(code or 0)


def _line(error: Exception) -> str | None:
    """The line that says what to mend; empty if all was said, None if it is nothing that a user can mend."""
    if isinstance(error, UsageError):
        return _usage(error)
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    elif isinstance(error, ModuleNotFoundError) and (name := str(error.name).partition(".")[0]) in EXTRA_OF:
        try:
            need("this command", name)
        except MissingExtraError as missing:
            return str(missing)
        return None  # installed, and broken
    elif isinstance(error, ArgumentError):
        text = error.worded(OPTION_OF)
    elif type(error).__name__ == "ProcessorRefusal":  # without importing torch
        text = f"--image and --question: {error}"
    elif isinstance(error, UserError | MissingExtraError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        text = str(error)
    else:
        return None
    return " ".join(text.split()) or type(error).__name__


def _usage(error: Any) -> str:
    if type(error).__name__ == "NoArgsIsHelpError":  # the help has been printed
        return ""
    if hasattr(error, "possibilities"):
        options = {option for parameter in error.ctx.command.params for option in parameter.opts}
        return f"unknown option {error.option_name}{hint(error.option_name, options | {'--help'})}"
    cause = error.__cause__
    came = f"; got {cause.errors()[0]['input']!r}" if hasattr(cause, "errors") else ""  # pydantic's words leave it out
    more = f" ({error.ctx.command_path} --help)" if error.ctx else ""
    return " ".join(error.format_message().split()) + came + more
