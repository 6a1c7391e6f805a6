"""MME: accuracy plus accuracy+ over the two questions of a picture."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sar_fast.lab.benchmark.tasks.base import Record, Sample, Skip, Task, share, text_of

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
YES_NO = (("Yes", "yes"), ("No", "no"))


def parse_yes_no(reply: str) -> str | None:
    """``"yes"``, ``"no"`` or None, by MME's own rule: the first four characters hold ``yes``, else ``no``."""
    start = reply.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


class MME(Task):
    """Two yes/no questions per picture; a category's score is 100 x accuracy + 100 x accuracy+ (at most 200)."""

    name = "mme"
    hub_id = "lmms-lab/MME"
    split = "test"
    columns = ("question_id", "question", "answer", "category")
    totals = (
        ("overall", "categories", PERCEPTION + COGNITION),
        ("perception", "categories", PERCEPTION),
        ("cognition", "categories", COGNITION),
    )
    suffix = "\nAnswer the question using a single word or phrase."
    source = "calculation.py of the MME evaluation tool (BradyFU/Awesome-Multimodal-Large-Language-Models)"

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Sample], list[Skip]]:
        by_picture: dict[str, list[Sample]] = defaultdict(list)
        for number, row in enumerate(rows):
            category = row["category"]
            if category not in PERCEPTION + COGNITION:
                near = difflib.get_close_matches(str(category), PERCEPTION + COGNITION, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"row {number}: category is {category!r}, which MME does not have{hint}")
            answer = text_of(row, "answer", number).lower()
            if answer not in ("yes", "no"):
                raise ValueError(f"row {number}: answer is {row['answer']!r}, needed Yes or No")
            question = text_of(row, "question", number)
            picture = f"{category}/{row['question_id']}"
            pair = by_picture[picture]
            if len(pair) == 2:
                raise ValueError(f"row {number} is a third question about {picture}")
            if any((other.about["question"], other.about["answer"]) == (question, answer) for other in pair):
                raise ValueError(f"row {number}: {picture} has this question in row {pair[0].row} already")
            prompt = question.replace(" Please answer yes or no.", "") + self.words_after
            about = {"category": category, "question_id": row["question_id"], "question": question, "answer": answer}
            pair.append(Sample(str(number), number, prompt, picture, YES_NO, about))
        whole = [sample for pair in by_picture.values() if len(pair) == 2 for sample in pair]
        skips = [
            Skip(picture, "one question of two: accuracy+ is not defined", "picture with one question")
            for picture, pair in by_picture.items()
            if len(pair) == 1
        ]
        return sorted(whole, key=lambda sample: sample.row), skips

    def judge(self, record: Record) -> dict[str, Any]:
        prediction = parse_yes_no(record["reply"])
        return {"prediction": prediction, "correct": prediction == record["answer"]}

    def scores(self, records: Sequence[Record]) -> dict[str, Any]:
        by_category: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            by_category[record["category"]].append(record)
        categories = {name: _category(by_category[name]) for name in PERCEPTION + COGNITION if name in by_category}
        overall = {
            "accuracy": share([r["correct"] for r in records]),
            "score": sum(c["score"] for c in categories.values()),
            "correct": sum(c["correct"] for c in categories.values()),
            "total": len(records),
        }
        return {
            "overall": overall,
            "perception": _total(categories, PERCEPTION),
            "cognition": _total(categories, COGNITION),
            "categories": categories,
            "missing_categories": [name for name in PERCEPTION + COGNITION if name not in categories],
            "unparsed": sum(r["prediction"] is None for r in records),
        }

    def headline(self, scores: Mapping[str, Any]) -> list[tuple[str, Any]]:
        rows = [(name, c["score"]) for name, c in scores["categories"].items()]
        return [*rows, ("perception", scores["perception"]), ("cognition", scores["cognition"])]


def _category(records: Sequence[Record]) -> dict[str, Any]:
    """``accuracy`` over questions and ``accuracy_plus`` over pictures, in percent; ``score`` is their sum."""
    pictures: dict[str, list[bool]] = defaultdict(list)
    for record in records:
        pictures[record["group"]].append(record["correct"])
    accuracy, plus = share([r["correct"] for r in records]), share([all(pair) for pair in pictures.values()])
    correct = sum(r["correct"] for r in records)
    return {
        "accuracy": accuracy,
        "accuracy_plus": plus,
        "score": accuracy + plus,
        "correct": correct,
        "total": len(records),
    }


def _total(categories: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> float | None:
    """Sum of the scores of those categories that are there; None if none is."""
    there = [categories[name]["score"] for name in names if name in categories]
    return sum(there) if there else None
