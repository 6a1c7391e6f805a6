"""What a plain installation leaves out: which extra of setup.py brings a package, and the line that says so."""

from __future__ import annotations

import importlib.util
import sys

EXTRA_OF = {
    "accelerate": "train",
    "datasets": "train",
    "peft": "train",
    "pyarrow": "train",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "matplotlib": "reports",
    "pandas": "reports",
    "scipy": "reports",
    "skimage": "reports",
    "deepspeed": "deepspeed",
    "lmms_eval": "lmms-eval",
    "llamafactory": "llamafactory",
}
TRAINING = ("accelerate", "datasets", "pyarrow")  # what the modules of trainings and evaluations import at once
_DISTRIBUTION_OF = {"skimage": "scikit-image", "lmms_eval": "lmms-eval"}


class MissingExtraError(ImportError):
    """Says what needs which package, and how to install it."""


def need(what: str, *modules: str) -> None:
    """:class:`MissingExtraError`, "``what`` needs ...", unless all modules are installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        packages = ", ".join(_DISTRIBUTION_OF.get(name, name) for name in missing)
        wanted = ",".join(dict.fromkeys(EXTRA_OF[name] for name in missing))
        raise MissingExtraError(f"{what} needs {packages}: pip install 'sar_fast[{wanted}]'")


def need_or_exit(what: str, *modules: str) -> None:
    """:func:`need` of a script: one line on stderr and exit code 2."""
    try:
        need(what, *modules)
    except MissingExtraError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
