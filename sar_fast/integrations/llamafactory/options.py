"""SAR's keys among LLaMA-Factory's own: told apart, and checked as ``experiments/train.py`` checks its flags."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sar_fast.lab.io.model_source import MINIATURE, MINIATURE_PATH
from sar_fast.lab.run.flags import OneLineParser, as_flags, parse_groups
from sar_fast.lab.training.arguments import AnalysisArguments, ControlArguments, SARArguments

GROUPS = (SARArguments, ControlArguments, AnalysisArguments)
NAMES = frozenset(field.name for group in GROUPS for field in dataclasses.fields(group))
MODEL = "model_name_or_path"
Given = dict[str, Any] | list[str]  # of a YAML file, or flags: both are LLaMA-Factory's own forms


@dataclasses.dataclass
class Options:
    """What LLaMA-Factory does not know."""

    sar: SARArguments
    control: ControlArguments
    analysis: AnalysisArguments

    def to_dict(self) -> dict[str, Any]:
        """Plain values by group."""
        return dataclasses.asdict(self)


PLAIN = Options(SARArguments(), ControlArguments(), AnalysisArguments())  # what llamafactory-cli trains, and measured


def split(given: Given) -> tuple[Options, Given]:
    """(ours, LLaMA-Factory's own) of a YAML file's keys or of flags; ``ValueError`` names one of ours that is bad.

    The model ``miniature`` becomes the path of the one that is shipped.
    """
    if isinstance(given, dict):
        theirs = {key: value for key, value in given.items() if key not in NAMES}
        if theirs.get(MODEL) == MINIATURE:
            theirs[MODEL] = str(MINIATURE_PATH)
        return Options(*parse_groups(GROUPS, as_flags({k: v for k, v in given.items() if k in NAMES}))), theirs
    ours, theirs = [], []
    for words in _flags(given):
        if words == [f"--{MODEL}", MINIATURE]:
            words = [words[0], str(MINIATURE_PATH)]
        (ours if _name(words[0]).removeprefix("no_") in NAMES else theirs).extend(words)
    return Options(*parse_groups(GROUPS, ours)), theirs


def check_names(theirs: Given, groups: Sequence[type]) -> None:
    """``ValueError`` for a key that is neither ours nor a field of LLaMA-Factory's dataclasses, or a flag's bad value.

    LLaMA-Factory would answer with all of its help. Values of a YAML file are its own to check.
    """
    known = NAMES | {field.name for group in groups for field in dataclasses.fields(group)}
    if isinstance(theirs, dict):
        _refuse_unknown("key ", map(str, theirs), known)
        return
    words = list(_flags(theirs))
    negations = {f"no_{name}" for name in known}  # of switches
    _refuse_unknown("flag --", (_name(flag[0]) for flag in words), known | negations)
    OneLineParser(groups, allow_abbrev=False).parse_args([word for flag in words for word in flag])


def value_of(theirs: Given, name: str) -> Any:
    """What a key or a flag of LLaMA-Factory was given, None if it was not."""
    if isinstance(theirs, dict):
        return theirs.get(name)
    return next((words[1:] for words in _flags(theirs) if _name(words[0]) == name), None)


def _flags(words: Iterable[str]) -> Iterator[list[str]]:
    """Each flag with its values, ``--name=value`` as two words; what comes before the first one by itself."""
    flag: list[str] = []
    for word in words:
        if word.startswith("--"):
            if flag:
                yield flag
            flag = word.split("=", 1)
        else:
            flag.append(word)
    if flag:
        yield flag


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _refuse_unknown(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"unknown {kind}{name}" + (f"; did you mean {near[0]}?" if near else ""))
