"""Command lines of the scripts in ``experiments/``: YAML files and flags, for groups of dataclass fields."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

from sar_fast.base.errors import ArgumentError, arguments_named
from sar_fast.lab.run.foreign_flags import hint

Parsed = TypeVar("Parsed")


class OneLineParser(HfArgumentParser):
    """A parser whose errors are one line, without the list of all flags."""

    def error(self, message: str) -> None:
        raise ValueError(re.sub(r"/--[\w-]+", "", message))  # a flag's other spelling, with dashes


def parse_groups(groups: Sequence[type], argv: Sequence[str]) -> tuple[Any, ...]:
    """One instance of each dataclass, from YAML or JSON files and flags; a later value replaces an earlier one.

    ``config.yaml --learning_rate 1e-5`` and ``config.yaml learning_rate=1e-5`` are the same. ``ValueError`` for an
    unknown flag says what to do instead of another trainer's, or names a known one that is spelt nearly so.
    """
    return parse_words(groups, expand(argv))


def parse_words(groups: Sequence[type], words: Sequence[str]) -> tuple[Any, ...]:
    """:func:`parse_groups` of words that :func:`expand` made."""
    parser = OneLineParser(groups, allow_abbrev=False)
    known = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    for word in words:
        name = word.split("=", 1)[0]
        if name.startswith("--") and name not in known:
            raise ValueError(f"unknown flag {name}{hint(name, known)}")
    with arguments_named({option.removeprefix("--"): option for option in known}):
        *parsed, left = parser.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
    if left:
        raise ValueError(f"cannot make sense of {' '.join(left)}; flags begin with --")
    return tuple(parsed)


def expand(argv: Sequence[str]) -> list[str]:
    """Files become flags, ``key=value`` becomes ``--key value``."""
    words: list[str] = []
    for word in argv:
        if not word.startswith("-") and word.endswith((".yaml", ".yml", ".json")) and not _is_value(words):
            words += _file_flags(Path(word))
        elif not word.startswith(("-", "{")) and "=" in word and not _is_value(words):
            words += ["--" + word.split("=", 1)[0], word.split("=", 1)[1]]
        else:
            words.append(word)
    return words


def _is_value(words: Sequence[str]) -> bool:
    """Whether the next word belongs to the flag before it."""
    return bool(words) and words[-1].startswith("--") and "=" not in words[-1]


def _file_flags(path: Path) -> list[str]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, needed names and values")
    return as_flags(values)


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Names and values of a YAML file as flags; None leaves one out."""
    text = lambda value: json.dumps(value) if isinstance(value, dict) else str(value)
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(text, value)]
        elif value is not None:  # YAML takes the word no for False
            words += [f"--{name}", "no" if value is False and str(name).endswith("_strategy") else text(value)]
    return words


def need(group: Any, flag: str, value: Any, names: Sequence[str]) -> None:
    """``ArgumentError`` for the first of ``names`` that is set although ``flag`` is not ``value``."""
    if getattr(group, flag) != value:
        refuse(group, names, f"without {{{flag}}}{'' if value is True else f' {value}'}")


def refuse(group: Any, names: Sequence[str], why: str) -> None:
    """``ArgumentError``, "must be left out ``why``", for the first of ``names`` that is not at its default."""
    missing = dataclasses.MISSING
    defaults = {
        f.name: f.default if f.default_factory is missing else f.default_factory() for f in dataclasses.fields(group)
    }
    for name in names:
        if getattr(group, name) != defaults[name]:
            raise ArgumentError(name, getattr(group, name), f"be left out {why}")


def at_least(group: Any, least: int, *names: str) -> None:
    """``ArgumentError`` for the first of ``names`` whose number is below ``least``; None is no number."""
    _check(group, names, lambda value: value >= least, f"be at least {least}")


def above(group: Any, bound: int, *names: str) -> None:
    """``ArgumentError`` for the first of ``names`` whose number is not > ``bound``; None is no number."""
    _check(group, names, lambda value: value > bound, f"be > {bound}")


def below_one(group: Any, *names: str) -> None:
    """``ArgumentError`` for the first of ``names`` whose number is not in [0, 1); None is no number."""
    _check(group, names, lambda value: 0 <= value < 1, "be at least 0 and below 1")


def _check(group: Any, names: Sequence[str], good: Callable[[Any], bool], needed: str) -> None:
    for name in names:
        value = getattr(group, name)
        if value is not None and not good(value):
            raise ArgumentError(name, value, needed)
        if value is not None and math.isinf(value):
            raise ArgumentError(name, value, f"{needed} and finite")


def arguments_of_process(parse: Callable[[Sequence[str]], Parsed]) -> Parsed:
    """This process's arguments; a bad one ends it with one line on stderr and exit code 2."""
    try:
        return parse(sys.argv[1:])
    except (ValueError, TypeError, FileNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
