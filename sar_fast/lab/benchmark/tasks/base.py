"""What a benchmark is made of: samples from a table, a judgement of each reply, scores of all."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from sar_fast.base.errors import ArgumentError, check_choice

Record = dict[str, Any]
SCORINGS = ("generate", "first_token")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question about one picture.

    Attributes:
        key: unique in the run; names the sample's record.
        row: number of the table's row that holds the picture.
        prompt: the words beside the picture.
        group: samples of one group are scored together (the two questions of an MME picture, the rotations of a
            multiple-choice question).
        options: wordings of each answer that first-token scoring compares; empty where there is no such list.
        about: what scoring needs, as JSON values; becomes part of the record.
    """

    key: str
    row: int
    prompt: str
    group: str
    options: tuple[tuple[str, ...], ...] = ()
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Skip:
    """A sample, or a group of them, that is not scored, and why.

    Attributes:
        key: what is skipped. reason: in full. kind: the reason in a few words that cases of one kind share.
    """

    key: str
    reason: str
    kind: str


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A field of :class:`Task.Options`: a keyword of ``evaluate`` and a flag of ``experiments/evaluate.py``."""
    metadata = {"help": help, **({} if choices is None else {"choices": [*choices]})}
    return dataclasses.field(default=default, metadata=metadata)


class Task(abc.ABC):
    """A benchmark as lmms-lab publishes it.

    A record is a sample's ``about`` with ``key``, ``group``, ``prompt``, ``reply`` (the model's words), ``image_size``
    (width, height), ``frame`` (the picture's size as the model saw it, or None), and with first-token scoring
    ``log_probabilities``. Skipped samples have ``skipped``, the reason, and no reply.

    Args:
        options: how it is asked; None = the defaults of its :class:`Options`.
        model_type: of the model that is asked.

    Attributes:
        Options: what it can be told, a frozen dataclass of plain values (``option``) that extends this one's.
        name: by which it is asked for.
        hub_id, folder: dataset on the hub, if there is one, and its configuration, which is also the folder of its
            parquet files.
        split: the one that papers report.
        columns: that the table must have, and ``optional`` ones that are used if there.
        suffix: the benchmark's own words after the question.
        max_new_tokens: the longest answer worth generating.
        scorings: ways of answering that make sense.
        objects_to: the kind of :meth:`objection`.
        totals: (name, the group of the scores that it is over, the parts of the whole benchmark) of each total.
        source: where the scoring rule is from.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """How a benchmark is asked."""

        prompt_suffix: str | None = option(None, "Replaces the benchmark's own words after the question; may be empty.")

        def __post_init__(self) -> None:
            for field in dataclasses.fields(self):
                value, choices = getattr(self, field.name), field.metadata.get("choices")
                if choices and value != field.default:
                    check_choice(field.name, value, tuple(choices))

    name: ClassVar[str]
    hub_id: ClassVar[str | None] = None
    folder: ClassVar[str | None] = None
    split: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    suffix: ClassVar[str] = ""
    max_new_tokens: ClassVar[int] = 16
    scorings: ClassVar[tuple[str, ...]] = SCORINGS
    objects_to: ClassVar[str] = ""
    totals: ClassVar[tuple[tuple[str, str, tuple[str, ...]], ...]] = ()
    source: ClassVar[str] = ""

    def __init__(self, options: Options | None = None, *, model_type: str = "") -> None:
        self.options = self.Options() if options is None else options
        self.model_type = model_type

    def misfit(self, reports_frames: Callable[[], bool]) -> ArgumentError | None:
        """The error about an option that the model cannot be asked with; None if there is no such option.

        ``reports_frames``: whether its processor says how large the model sees each picture.
        """
        return None

    @property
    def words_after(self) -> str:
        """What follows the question."""
        return self.suffix if self.options.prompt_suffix is None else self.options.prompt_suffix

    @abc.abstractmethod
    def samples(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Sample], list[Skip]]:
        """Samples of a table without its pictures; ``ValueError`` names the row that is wrong."""

    def settings(self) -> dict[str, Any]:
        """Options, as they are in force, that change the replies or how they are read, beside ``words_after``."""
        return {name: value for name, value in dataclasses.asdict(self.options).items() if name != "prompt_suffix"}

    def objection(self, sample: Sample, size: tuple[int, int]) -> str | None:
        """Why a sample makes no sense with a picture of that (width, height); None if it does."""
        return None

    @abc.abstractmethod
    def judge(self, record: Record) -> dict[str, Any]:
        """``prediction`` (what the reply says, None if nothing) and ``correct``, of one record with a reply."""

    @abc.abstractmethod
    def scores(self, records: Sequence[Record]) -> dict[str, Any]:
        """The benchmark's scores, from judged records; a group that misses a sample is not among them."""

    @abc.abstractmethod
    def headline(self, scores: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """(name, value) rows that are printed."""

    def remarks(self, scores: Mapping[str, Any]) -> list[str]:
        """Sentences without which the scores mislead; they are warnings of the results."""
        return []


def partial_totals(task: Task, scores: Mapping[str, Any]) -> dict[str, str]:
    """Total -> "2 of 10 categories", for the totals that miss a part. Parts of other names say nothing of a whole."""
    partial = {}
    known = {(group, part) for _, group, parts in task.totals for part in parts}
    for total, group, parts in task.totals:
        there = sum(part in scores[group] for part in parts)
        comparable = scores[group] and all((group, part) in known for part in scores[group])
        if comparable and there < len(parts):
            partial[total] = f"{there} of {len(parts)} {group}"
    return partial


def share(correct: Sequence[bool]) -> float:
    """Percentage of True; ``ValueError`` if there is nothing to take it of."""
    if not correct:
        raise ValueError("no sample to score")
    return 100.0 * sum(map(bool, correct)) / len(correct)


def text_of(row: Mapping[str, Any], column: str, number: int) -> str:
    """A row's words; ``ValueError`` names the row if there are none."""
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"row {number}: {column} is {value!r}, needed words")
    return value.strip()
