"""What installed packages bring along: entry points of the groups ``sar_fast.<kind>``, loaded when a name is used."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from sar_fast.base.errors import ArgumentError
from sar_fast.base.wording import reason


def installed(kind: str) -> list[str]:
    """The names that installed packages give to something of a kind: "weightings", "tasks", "families", "backends"."""
    return sorted(_points(kind).names)


def owners(kind: str, name: str) -> list[str]:
    """The installed packages that have a name, each once."""
    return sorted({owner(point) for point in _points(kind, name=name)})


def load(kind: str, name: str, argument: str) -> Any:
    """What a package registers by a name, None if none does.

    Raises:
        ArgumentError: several packages have the name that ``argument`` asks for.
        ImportError: the package that has it cannot be imported.
    """
    points = {point.value: point for point in _points(kind, name=name)}  # one may be found twice, by two paths
    if not points:
        return None
    if len(points) > 1:
        came = f"{name!r} of {' and '.join(sorted(map(owner, points.values())))}"
        raise ArgumentError(argument, came, "be one installed package's")
    (point,) = points.values()
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{argument} {name!r} of {owner(point)} cannot be imported: {reason(error)}") from error


def owner(point: importlib.metadata.EntryPoint) -> str:
    """How messages call the package of an entry point."""
    return f"the package {point.dist.name}" if point.dist else point.value


def _points(kind: str, **chosen: str) -> Any:
    return importlib.metadata.entry_points(group=f"sar_fast.{kind}", **chosen)
