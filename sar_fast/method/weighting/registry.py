"""Rules by name: registered here, by an installed package, or in a file."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sar_fast.base import json_text, plugins
from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.base.scalars import kind
from sar_fast.base.wording import reason
from sar_fast.method.weighting.constant import Equal, Fixed
from sar_fast.method.weighting.heads import HeadScales, SuppressHeads, ThresholdHeads, TopHeads
from sar_fast.method.weighting.protocol import Weighting, check_weighting
from sar_fast.method.weighting.softmax import SoftmaxOverHeads
from sar_fast.method.weighting.vision_aware import ReinforceHeads

KIND = "weightings"  # of entry points
_rules: dict[str, Any] = {
    "softmax": SoftmaxOverHeads,
    "equal": Equal,
    "fixed": Fixed,
    "top_heads": TopHeads,
    "threshold_heads": ThresholdHeads,
    "suppress_heads": SuppressHeads,
    "reinforce_heads": ReinforceHeads,
    "head_scales": HeadScales,
}


def register_weighting(name: str, rule: Any = None) -> Any:
    """Make a rule known by name, to ``SARConfig.to_dict``, command lines and result folders.

    Args:
        name: any text without ``:``; a name that another rule has is an error.
        rule: a class whose instances are rules and whose keyword arguments are its options (a dataclass, a class that
            keeps them as attributes, or one with a method ``options()`` that gives them as JSON's values), or a rule
            without options. None: used as a decorator.

    Returns:
        The rule.
    """
    if not isinstance(name, str) or not name or ":" in name:
        raise ArgumentError("name", repr(name), "be a text without ':'")
    if rule is None:
        return lambda found: register_weighting(name, found)
    if not inspect.isclass(rule):
        check_weighting(rule)
    known = _rules.setdefault(name, rule)
    if known is not rule and not _same_source(known, rule):
        raise ArgumentError("name", f"{name!r}, which is that of {known!r}", "be one that no other weighting has")
    _rules[name] = rule
    return rule


def _same_source(known: Any, rule: Any) -> bool:
    """Whether a cell of a notebook, or a module, ran again; of an instance, with the same values."""
    if hasattr(known, "__qualname__") and hasattr(rule, "__qualname__"):
        distinct = "<lambda>" not in rule.__qualname__ and getattr(rule, "__closure__", None) is None
        return distinct and (known.__module__, known.__qualname__) == (rule.__module__, rule.__qualname__)
    values = lambda x: repr(getattr(x, "__dict__", x))  # with __slots__ it is the dataclass's own text
    return _same_source(type(known), type(rule)) and values(known) == values(rule)


def registered() -> list[str]:
    """The names that are known, those of installed packages too."""
    return sorted({*_rules, *plugins.installed(KIND)})


def make_weighting(spec: str | Mapping[str, Any], sizes: Mapping[str, int]) -> Weighting:
    """The rule of :func:`~.find.find_weighting` that is a name or in a Python file."""
    name, options = read_spec(spec)
    rule = _from_file(name) if ":" in name else _by_name(name)
    if not inspect.isclass(rule):
        if options:
            raise ArgumentError("weighting", sorted(options), f"be without options: {name!r} takes none")
        return check_weighting(rule)
    taken, more = _parameters(rule)
    options = {**{n: size for n, size in sizes.items() if n in taken}, **options}
    unknown = sorted(map(str, set(options) - set(taken)))
    if unknown and not more:
        raise ArgumentError(
            "weighting", ", ".join(unknown), f"have options that {name!r} takes, {', '.join(taken) or 'none'}"
        )
    missing = [n for n, p in taken.items() if p.default is p.empty and n not in options]
    if missing:
        raise ArgumentError("weighting", f"{name!r} without", f"have the option {', '.join(missing)}")
    return check_weighting(rule(**options))


def _parameters(rule: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """What a class takes by name, and whether it takes more than it names."""
    every = inspect.signature(rule).parameters
    named = {n: p for n, p in every.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in every.values())


def read_spec(spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name, options) of what a text or a mapping says; ``ValueError`` or ``TypeError`` if it says nothing."""
    needed = 'a name, FILE.py:NAME, or {"name": ..., "options": {...}}'
    if isinstance(spec, str) and spec.lstrip().startswith("{"):
        try:
            spec = json.loads(spec)
        except json.JSONDecodeError as error:
            raise ArgumentError("weighting", f"{spec!r} ({error})", f"be {needed}") from error
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        raise ArgumentTypeError("weighting", type(spec).__name__, f"be {needed}")
    name, options = spec.get("name"), spec.get("options")
    options = {} if options is None else options
    if not isinstance(name, str) or not isinstance(options, Mapping) or set(spec) - {"name", "options"}:
        raise ArgumentError("weighting", repr(dict(spec)), f"be {needed}")
    return name, dict(options)


def _by_name(name: str) -> Any:
    if name in _rules:
        return _rules[name]
    found = plugins.load(KIND, name, "weighting")
    if found is None:
        raise ArgumentError("weighting", repr(name), f"be one of {', '.join(registered())}, or FILE.py:NAME")
    return register_weighting(name, found)


def _from_file(name: str) -> Any:
    """A rule of a Python file, which runs once, and is known by ``FILE.py:NAME`` from then on."""
    path, _, attribute = name.rpartition(":")
    file = Path(path)
    if file.suffix != ".py" or not file.is_file():
        raise ArgumentError("weighting", f"{name!r}: no such Python file {path!r}", "be FILE.py:NAME")
    place = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]  # the same in every process, for pickles
    module_name = f"sar_fast_weighting_{file.stem.replace('.', '_')}_{place}"
    module = sys.modules.get(module_name)
    if module is None:
        found = importlib.util.spec_from_file_location(module_name, file)
        try:
            found.loader.get_code(module_name)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"weighting: {path} cannot be read as Python; {reason(error)}") from error
        module = importlib.util.module_from_spec(found)
        sys.modules[module_name] = module  # a class of it can be pickled
        try:
            found.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    if not hasattr(module, attribute):
        raise ValueError(f"weighting: {path} has no {attribute!r}")
    rule = getattr(module, attribute)
    if not callable(rule):
        raise ArgumentTypeError("weighting", f"{kind(rule)} from {name!r}", "be a rule, a callable or a class of one")
    _rules[name] = rule  # a relative path may have meant another file before
    return rule


def is_registered(weighting: Weighting) -> bool:
    """Whether :func:`weighting_to_dict` has a name for it."""
    return any(rule is weighting or rule is type(weighting) for rule in _rules.values())


def weighting_to_dict(weighting: Weighting) -> dict[str, Any]:
    """``{"name": ..., "options": {...}}`` of a registered rule, JSON's values; ``find_weighting`` inverts it."""
    for name, rule in _rules.items():
        if rule is weighting:
            return {"name": name, "options": {}}
        if rule is type(weighting):
            return {"name": name, "options": {n: _plain(name, n, v) for n, v in _options(weighting).items()}}
    called = getattr(weighting, "__qualname__", type(weighting).__qualname__)
    raise ArgumentError(
        "weighting",
        called,
        f"be registered, so that it can be written by name; register_weighting('its name', {called}) makes it known",
    )


def _options(weighting: Any) -> Mapping[str, Any]:
    if hasattr(weighting, "options"):
        return weighting.options()
    if dataclasses.is_dataclass(weighting):
        return {f.name: getattr(weighting, f.name) for f in dataclasses.fields(weighting) if f.init}
    taken, _ = _parameters(type(weighting))
    unsaid = [n for n in taken if not hasattr(weighting, n)]
    if unsaid:
        raise ArgumentError(
            "weighting",
            f"{type(weighting).__qualname__}, which takes {', '.join(unsaid)}",
            "say which options it got: be a dataclass, keep its arguments as attributes, or have a method options()",
        )
    return {n: getattr(weighting, n) for n in taken}


def _plain(rule: str, option: str, value: Any) -> Any:
    """An option as JSON's values: tensors, NumPy's arrays and numbers as lists and numbers."""
    value = value.tolist() if hasattr(value, "tolist") else value
    try:
        json_text.dumps(value)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            "weighting", f"option {option} of {rule!r}: {error}", "have options that are values of JSON"
        ) from error
    return value
