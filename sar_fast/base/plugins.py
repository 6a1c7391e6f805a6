"""What installed packages bring along: entry points of the groups ``sar_fast.<kind>``, loaded when a name is used."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from sar_fast.base.errors import ArgumentError


def installed(kind: str) -> list[str]:
    """The names that installed packages give to something of a kind: "weightings", "tasks", "families", "backends"."""
    return sorted({point.name for point in importlib.metadata.entry_points(group=f"sar_fast.{kind}")})


def load(kind: str, name: str, argument: str) -> Any:
    """What a package registers by a name, None if none does; errors of its own code are its own.

    Raises:
        ArgumentError: several packages have the name that ``argument`` asks for.
    """
    points = importlib.metadata.entry_points(group=f"sar_fast.{kind}", name=name)
    by_value = {point.value: point for point in points}  # one may be found twice, by two paths
    if not by_value:
        return None
    if len(by_value) > 1:
        raise ArgumentError(argument, f"{name!r} of {' and '.join(sorted(by_value))}", "be one installed package's")
    (point,) = by_value.values()
    return point.load()
