"""Errors that a user can mend: one line on stderr, exit code 2, no traceback."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

OPTION_OF = {  # names that library errors begin with, as the option that sets them
    "activation_layer_k": "--k",
    "beta": "--beta",
    "decode": "--decode",
    "normalize": "--normalize",
    "backend": "--backend",
    "model": "--model",
    "k": "--k",
    "max_samples": "--max-samples",
    "output_dir": "--output_dir",
    "epochs": "--epochs",
}


class UserError(Exception):
    """Names the option, says what came and what is needed."""

    @classmethod
    def of(cls, error: Exception) -> UserError:
        """A library's ``ValueError`` or ``TypeError``, with the argument's name turned into the option's."""
        message = " ".join(str(error).split())
        for argument, option in OPTION_OF.items():
            for separator in (":", " ", "="):
                if message.startswith(argument + separator):
                    return cls(option + message[len(argument) :])
        return cls(message)


class Commands(TyperGroup):
    """A command group that ends a :class:`UserError` as promised."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error
