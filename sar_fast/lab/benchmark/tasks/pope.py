"""POPE: object hallucination, as accuracy, precision, recall, F1 and the share of yes, per way of choosing objects."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from sar_fast.lab.benchmark.tasks.base import Record, Sample, Skip, Task, text_of
from sar_fast.lab.benchmark.tasks.mme import YES_NO

CATEGORIES = ("random", "popular", "adversarial")
MEANS = ("f1", "accuracy", "yes_ratio")  # over the categories, that are printed
NEGATIONS = ("No", "not", "no")


def parse_pope(reply: str) -> str:
    """``"no"`` if the first sentence has the word No, no or not, else ``"yes"``, whatever it says: POPE's own rule."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in NEGATIONS for word in words) else "yes"


def is_clear(reply: str) -> bool:
    """Whether the reply says what POPE's rule takes it for: everything without a No, no or not is a yes, NO as well."""
    words = reply.lower().replace(".", " ").replace(",", " ").split()
    said = next((word for word in words if word in ("yes", "no", "not")), None)
    return parse_pope(reply) == "no" or said == "yes"


class POPE(Task):
    """Yes/no questions about objects; ``yes`` is the positive class, and the yes-ratio is that of the predictions."""

    name = "pope"
    hub_id = "lmms-lab/POPE"
    split = "test"
    columns = ("question_id", "question", "answer", "category")
    optional = ("image_source",)
    totals = tuple((f"mean {metric}", "categories", CATEGORIES) for metric in MEANS)
    suffix = "\nAnswer the question using a single word or phrase."
    source = "evaluate.py of AoiDragon/POPE"

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Sample], list[Skip]]:
        samples: dict[tuple[Any, ...], Sample] = {}
        for number, row in enumerate(rows):
            category = row["category"]
            if category not in CATEGORIES:
                near = difflib.get_close_matches(str(category), CATEGORIES, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"row {number}: category is {category!r}, needed {', '.join(CATEGORIES)}{hint}")
            answer = text_of(row, "answer", number).lower()
            if answer not in ("yes", "no"):
                raise ValueError(f"row {number}: answer is {row['answer']!r}, needed yes or no")
            question = text_of(row, "question", number)
            same = (category, row["question_id"], row.get("image_source"), question)
            if same in samples:
                raise ValueError(
                    f"row {number}: {category} question {row['question_id']} is in row {samples[same].row} already"
                )
            about = {"category": category, "question_id": row["question_id"], "question": question, "answer": answer}
            samples[same] = Sample(str(number), number, question + self.words_after, str(number), YES_NO, about)
        return list(samples.values()), []

    def judge(self, record: Record) -> dict[str, Any]:
        prediction = parse_pope(record["reply"])
        return {
            "prediction": prediction,
            "correct": prediction == record["answer"],
            "unclear": not is_clear(record["reply"]),
        }

    def scores(self, records: Sequence[Record]) -> dict[str, Any]:
        categories = {
            name: binary_scores([r["answer"] for r in mine], [r["prediction"] for r in mine])
            for name in CATEGORIES
            if (mine := [r for r in records if r["category"] == name])
        }
        overall = {
            metric: _mean([scores[metric] for scores in categories.values()])
            for metric in ("accuracy", "precision", "recall", "f1", "yes_ratio")
        }
        return {
            "overall": overall | {"total": len(records)},
            "categories": categories,
            "missing_categories": [name for name in CATEGORIES if name not in categories],
            "unclear": sum(r["unclear"] for r in records),
        }

    def headline(self, scores: Mapping[str, Any]) -> list[tuple[str, Any]]:
        rows = [(f"{name}, F1", c["f1"]) for name, c in scores["categories"].items()]
        return [*rows, *((f"mean {name}", scores["overall"][name]) for name in MEANS)]


def binary_scores(answers: Sequence[str], predictions: Sequence[str]) -> dict[str, Any]:
    """Percentages with ``yes`` as the positive class; None where a denominator is 0."""
    pairs = list(zip(answers, predictions))
    true_yes, false_yes = pairs.count(("yes", "yes")), pairs.count(("no", "yes"))
    true_no, false_no = pairs.count(("no", "no")), pairs.count(("yes", "no"))
    return {
        "accuracy": _percent(true_yes + true_no, len(pairs)),
        "precision": _percent(true_yes, true_yes + false_yes),
        "recall": _percent(true_yes, true_yes + false_no),
        "f1": _percent(2 * true_yes, 2 * true_yes + false_yes + false_no),
        "yes_ratio": _percent(true_yes + false_yes, len(pairs)),
        "total": len(pairs),
    }


def _percent(part: int, whole: int) -> float | None:
    return 100.0 * part / whole if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean over the categories; None if one of them has no value."""
    return None if any(v is None for v in values) else sum(values) / len(values)
