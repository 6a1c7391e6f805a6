"""MMBench: multiple choice with circular evaluation. A question is right if it is right in every rotation."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sar_fast.lab.benchmark.tasks.base import Record, Sample, Skip, share, text_of
from sar_fast.lab.benchmark.tasks.choices import MultipleChoice, build_question, option_wordings, parse_choice

LETTERS = "ABCDEF"
ABILITIES = (
    "attribute_reasoning",
    "coarse_perception",
    "finegrained_perception (cross-instance)",
    "finegrained_perception (instance-level)",
    "logic_reasoning",
    "relation_reasoning",
)
CIRCULAR, UNROTATED = "accuracy, circular", "accuracy, unrotated"
ROTATION = 1_000_000  # a published row's index is that of its question plus this times the rotation


class MMBench(MultipleChoice):
    """Accuracy over questions, all rotations of which must be right, and plain accuracy of the unrotated ones.

    The published tables hold every rotation as a row of its own; where a table has none, they are made here.
    """

    name = "mmbench"
    hub_id = "lmms-lab/MMBench"
    folder = "en"
    split = "dev"
    columns = ("index", "question", "answer", "A", "B")
    optional = ("C", "D", "E", "F", "hint", "category", "L2-category")
    totals = ((CIRCULAR, "abilities", ABILITIES), (UNROTATED, "abilities", ABILITIES))
    source = "circular evaluation of open-compass/MMBench; replies matched as its tool does, without a judge model"

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Sample], list[Skip]]:
        indices = [_index(row["index"], number) for number, row in enumerate(rows)]
        published = any(index >= ROTATION for index in indices)
        groups: dict[int, dict[int, Sample]] = defaultdict(dict)
        sizes: dict[int, int] = {}
        for number, row in enumerate(rows):
            turn, base = divmod(indices[number], ROTATION)
            choices, answer = _choices(row, number)
            if turn == 0:
                sizes[base] = len(choices)
            if turn in groups[base]:
                raise ValueError(f"row {number}: index {row['index']} is in row {groups[base][turn].row} already")
            turns = [turn] if published else range(len(choices))
            for r in turns:
                shift = 0 if published else r
                rotated = choices[shift:] + choices[:shift]
                groups[base][r] = self._sample(row, number, base, r, rotated, (answer - shift) % len(choices))
        samples = [sample for group in groups.values() for sample in group.values()]
        skips = []
        for base, group in groups.items():
            if sorted(group) != list(range(sizes.get(base, -1))):
                reason = f"rotations {sorted(group)} of {sizes.get(base, 'unknown')}"
                skips.append(Skip(f"question {base}", reason, "question without all rotations"))
        broken = {skip.key for skip in skips}
        kept = [sample for sample in samples if f"question {sample.group}" not in broken]
        return sorted(kept, key=lambda s: (s.row, s.about["rotation"])), skips

    def _sample(
        self, row: Mapping[str, Any], number: int, base: int, turn: int, choices: list[str], answer: int
    ) -> Sample:
        question = text_of(row, "question", number)
        hint = row.get("hint")
        prompt = build_question(question, choices, hint.strip() if _given(hint) else "", letters=self.letters)
        about = {
            "index": base,
            "rotation": turn,
            "question": question,
            "choices": choices,
            "answer": answer,
            "category": row.get("category"),
            "ability": row.get("L2-category"),
        }
        return Sample(
            f"{base}/{turn}",
            number,
            prompt + self.words_after,
            str(base),
            option_wordings(choices, letters=self.letters),
            about,
        )

    def judge(self, record: Record) -> dict[str, Any]:
        prediction = parse_choice(record["reply"], record["choices"], letters=self.letters)
        return {"prediction": prediction, "correct": prediction == record["answer"]}

    def scores(self, records: Sequence[Record]) -> dict[str, Any]:
        groups: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            groups[record["group"]].append(record)
        right = {name: all(r["correct"] for r in group) for name, group in groups.items()}
        by: dict[str, dict[str, list[bool]]] = {"category": defaultdict(list), "ability": defaultdict(list)}
        for name, group in groups.items():
            for label, found in by.items():
                if group[0][label] is not None:
                    found[group[0][label]].append(right[name])
        plain = [r["correct"] for r in records if r["rotation"] == 0]
        return {
            "overall": {
                "accuracy": share(list(right.values())),
                "accuracy_without_rotations": share(plain),
                "correct": sum(right.values()),
                "total": len(right),
            },
            "categories": {name: share(hits) for name, hits in sorted(by["category"].items())},
            "abilities": {name: share(hits) for name, hits in sorted(by["ability"].items())},
            "unparsed": sum(r["prediction"] is None for r in records),
        }

    def headline(self, scores: Mapping[str, Any]) -> list[tuple[str, Any]]:
        overall = scores["overall"]
        return [
            *scores["abilities"].items(),
            (CIRCULAR, overall["accuracy"]),
            (UNROTATED, overall["accuracy_without_rotations"]),
        ]


def _index(value: Any, number: int) -> int:
    digits = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if not digits.isdecimal():
        raise ValueError(f"row {number}: index is {value!r}, needed a whole number")
    return int(digits)


def _choices(row: Mapping[str, Any], number: int) -> tuple[list[str], int]:
    """(choices up to the first that is not there, number of the right one); nothing may be written as the word nan."""
    letters = list(itertools.takewhile(lambda letter: _given(row.get(letter)), LETTERS))
    choices = [str(row[letter]) for letter in letters]
    if len(choices) < 2:
        raise ValueError(f"row {number}: {len(choices)} choices, needed two or more")
    answer = row["answer"]
    if not _given(answer):
        raise ValueError(f"row {number} has no answer: the organisers keep those of some splits; use one that has them")
    if answer not in letters:
        raise ValueError(f"row {number}: answer is {answer!r}, needed one of {', '.join(letters)}")
    return choices, LETTERS.index(answer)


def _given(value: Any) -> bool:
    """Whether a cell holds something: published tables write nothing as None, NaN or the word nan."""
    return value is not None and value == value and str(value).strip().lower() not in ("", "nan", "none")
