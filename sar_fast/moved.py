"""Modules under the names that they had before they were sorted: imported all the same, with a warning."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

MOVED = {  # those that documents named, and what is below them
    "sar_fast.analysis": "sar_fast.lab.measure",
    "sar_fast.distributed": "sar_fast.method.distributed",
    "sar_fast.evaluation": "sar_fast.lab",
    "sar_fast.flash": "sar_fast.attention.flash",
    "sar_fast.functional": "sar_fast.attention.functional",
    "sar_fast.integrations.hf": "sar_fast.hf",
    "sar_fast.miniature": "sar_fast.lab.miniature",
    "sar_fast.modules": "sar_fast.hf.module",
    "sar_fast.ops": "sar_fast.attention.ops",
    "sar_fast.pictures": "sar_fast.lab.io.pictures",
    "sar_fast.prior": "sar_fast.method.prior",
    "sar_fast.roles": "sar_fast.method.roles",
    "sar_fast.training": "sar_fast.lab.training",
    "sar_fast.types": "sar_fast.method.state",
    "sar_fast.visibility": "sar_fast.method.visibility",
    "sar_fast.weighting": "sar_fast.method.weighting",
}
STAYS = "sar_fast.weighting"  # a module itself, below which others were


class MovedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module by an old name, and is its loader: the module is the one of the new name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return None if new_name(fullname) is None else importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = new_name(old)
        warnings.warn(f"{old} is now {new}; the old name goes with the next release", FutureWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)  # importlib takes what stands here


def new_name(old: str) -> str | None:
    """The new name of a module, None if it has not moved."""
    parent, below = old, ""
    while parent and old != STAYS:
        if parent in MOVED:
            return MOVED[parent] + below
        parent, _, last = parent.rpartition(".")
        below = f".{last}{below}"
    return None


sys.meta_path.insert(0, MovedFinder())  # first: else what is below a moved package is imported once more
