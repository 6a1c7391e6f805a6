"""Rules by name: registered here, by an installed package, or in a file."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sar_fast.weighting.constant import Equal, Fixed
from sar_fast.weighting.protocol import Weighting, check_weighting
from sar_fast.weighting.softmax import SoftmaxOverHeads

ENTRY_POINTS = "sar_fast.weightings"
_rules: dict[str, Any] = {"softmax": SoftmaxOverHeads, "equal": Equal, "fixed": Fixed}


def register_weighting(name: str, rule: Any = None) -> Any:
    """Make a rule known by name, to ``SARConfig.to_dict``, command lines and result folders.

    Args:
        name: any text without ``:``; a name that another rule has is an error.
        rule: a class whose instances are rules and whose keyword arguments are its options (a dataclass, or with a
            method ``options()`` that gives them as JSON's values), or a rule without options. None: as a decorator.

    Returns:
        The rule.
    """
    if not isinstance(name, str) or not name or ":" in name:
        raise ValueError(f"name must be a text without ':'; got {name!r}")
    if rule is None:
        return lambda found: register_weighting(name, found)
    if not inspect.isclass(rule):
        check_weighting(rule)
    known = _rules.setdefault(name, rule)
    if known is not rule and not _same_source(known, rule):
        raise ValueError(f"name {name!r} is another weighting's: {known!r}")
    _rules[name] = rule
    return rule


def _same_source(known: Any, rule: Any) -> bool:
    """Whether a cell of a notebook, or a module, ran again."""
    where = lambda x: (getattr(x, "__module__", None), getattr(x, "__qualname__", None))
    return where(known) == where(rule) != (None, None)


def registered() -> list[str]:
    """The names that are known, those of installed packages too."""
    return sorted({*_rules, *(point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS))})


def find_weighting(spec: str | os.PathLike[str] | Mapping[str, Any], **sizes: int) -> Weighting:
    """The rule that a text or a mapping names.

    Args:
        spec: ``NAME`` of a registered rule, ``FILE.py:NAME`` of one in a file, or ``{"name": ..., "options": {...}}``,
            also as JSON, where ``name`` is either; or a folder that a training left, for the rule and what it learned.
        sizes: what a model says of itself (``layers``, ``heads``); given to rules that ask for it and were not told.

    Raises:
        ValueError, TypeError: unknown names, files that cannot be read, options that the rule does not take.
    """
    from sar_fast.weighting import files

    folder = files.folder_of(spec)
    if folder is not None:
        return files.load_weighting(folder, **sizes)
    name, options = read_spec(spec)
    rule = _from_file(name) if ":" in name else _by_name(name)
    if not inspect.isclass(rule):
        if options:
            raise ValueError(f"weighting: {name!r} takes no options; got {sorted(options)}")
        return check_weighting(rule)
    taken = inspect.signature(rule).parameters
    options = {**{n: size for n, size in sizes.items() if n in taken}, **options}
    unknown = sorted(set(options) - set(taken))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise ValueError(
            f"weighting: {name!r} has no option {', '.join(unknown)}; it takes {', '.join(taken) or 'none'}"
        )
    missing = [n for n, p in taken.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    missing = [n for n in missing if n not in options]
    if missing:
        raise ValueError(f"weighting: {name!r} needs the option {', '.join(missing)}")
    return check_weighting(rule(**options))


def read_spec(spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name, options) of what a text or a mapping says; ``ValueError`` or ``TypeError`` if it says nothing."""
    needed = 'a name, FILE.py:NAME, or {"name": ..., "options": {...}}'
    if isinstance(spec, str) and spec.lstrip().startswith("{"):
        try:
            spec = json.loads(spec)
        except json.JSONDecodeError as error:
            raise ValueError(f"weighting must be {needed}; {error} in {spec!r}") from error
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        raise TypeError(f"weighting must be {needed}; got {type(spec).__name__}")
    name, options = spec.get("name"), spec.get("options") or {}
    if not isinstance(name, str) or not isinstance(options, Mapping) or set(spec) - {"name", "options"}:
        raise ValueError(f"weighting must be {needed}; got {dict(spec)!r}")
    return name, dict(options)


def _by_name(name: str) -> Any:
    if name not in _rules:
        for point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
            return register_weighting(name, point.load())
        raise ValueError(f"weighting: {name!r} is not known; known are {', '.join(registered())}, or FILE.py:NAME")
    return _rules[name]


def _from_file(name: str) -> Any:
    """A rule of a Python file, which is known by ``FILE.py:NAME`` from then on."""
    path, _, attribute = name.rpartition(":")
    file = Path(path)
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"weighting: {name!r} must be FILE.py:NAME; no such Python file {path!r}")
    module_name = f"sar_fast_weighting_{file.stem}_{abs(hash(file.resolve())):x}"
    module = sys.modules.get(module_name)
    if module is None:
        found = importlib.util.spec_from_file_location(module_name, file)
        module = importlib.util.module_from_spec(found)
        sys.modules[module_name] = module  # a class of it can be pickled
        try:
            found.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    if not hasattr(module, attribute):
        raise ValueError(f"weighting: {path} has no {attribute!r}")
    return _rules.setdefault(name, getattr(module, attribute))


def weighting_to_dict(weighting: Weighting) -> dict[str, Any]:
    """``{"name": ..., "options": {...}}`` of a registered rule, JSON's values; ``find_weighting`` inverts it."""
    for name, rule in _rules.items():
        if rule is weighting:
            return {"name": name, "options": {}}
        if rule is type(weighting):
            return {"name": name, "options": {n: _plain(v) for n, v in _options(weighting).items()}}
    called = getattr(weighting, "__qualname__", type(weighting).__qualname__)
    raise ValueError(
        f"weighting: {called} is not registered, so that it cannot be written by name; "
        f"register_weighting('its name', {called}) makes it known"
    )


def _options(weighting: Any) -> Mapping[str, Any]:
    if hasattr(weighting, "options"):
        return weighting.options()
    if dataclasses.is_dataclass(weighting):
        return {f.name: getattr(weighting, f.name) for f in dataclasses.fields(weighting) if f.init}
    taken = inspect.signature(type(weighting)).parameters
    if taken:
        raise ValueError(
            f"weighting: {type(weighting).__qualname__} takes {', '.join(taken)}, and does not say which it got; make "
            "it a dataclass or give it a method options()"
        )
    return {}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
