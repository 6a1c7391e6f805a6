"""ScienceQA, the questions with a picture."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sar_fast.lab.benchmark.tasks.base import Record, Sample, Skip, share, text_of
from sar_fast.lab.benchmark.tasks.choices import MultipleChoice, build_question, option_wordings, parse_text

OPTIONS = ("A", "B", "C", "D", "E")
SUBJECTS = ("natural science", "social science", "language science")
SAID = re.compile(r"The answer is ([A-Z]).")  # the last point is any character, as in the original


def parse_scienceqa(reply: str, count: int) -> int | None:
    """The choice of a reply that is a letter, starts with ``X. ``, or says ``The answer is X.`` once; else None."""
    if reply in OPTIONS:
        letter = reply
    elif reply[:1] in OPTIONS and reply[1:3] == ". ":
        letter = reply[0]
    else:
        said = SAID.findall(reply)
        letter = said[0] if len(said) == 1 else ""
    return OPTIONS.index(letter) if letter in OPTIONS[:count] else None


class ScienceQA(MultipleChoice):
    """Accuracy over questions, and over those of each subject."""

    name = "scienceqa"
    hub_id = "lmms-lab/ScienceQA"
    folder = "ScienceQA-IMG"
    split = "test"
    columns = ("question", "choices", "answer")
    optional = ("hint", "subject")
    totals = (("accuracy", "subjects", SUBJECTS),)
    source = "eval_science_qa.py of haotian-liu/LLaVA"

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Sample], list[Skip]]:
        samples = []
        for number, row in enumerate(rows):
            choices, answer = row["choices"], row["answer"]
            if not isinstance(choices, list) or len(choices) < 2:
                raise ValueError(f"row {number}: choices is {choices!r}, needed a list of two or more")
            if not all(isinstance(choice, str) and choice.strip() for choice in choices):
                raise ValueError(f"row {number}: choices is {choices!r}, needed words in each")
            if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
                raise ValueError(f"row {number}: answer is {answer!r}, needed 0 to {len(choices) - 1}")
            question, hint = text_of(row, "question", number), (row.get("hint") or "").strip()
            prompt = build_question(question, choices, f"Context: {hint}" if hint else "", letters=self.letters)
            about = {"question": question, "choices": choices, "answer": answer, "subject": row.get("subject")}
            options = option_wordings(choices, letters=self.letters)
            samples.append(Sample(str(number), number, prompt + self.words_after, str(number), options, about))
        return samples, []

    def judge(self, record: Record) -> dict[str, Any]:
        if self.letters:
            prediction = parse_scienceqa(record["reply"], len(record["choices"]))
        else:
            prediction = parse_text(record["reply"], record["choices"])
        return {"prediction": prediction, "correct": prediction == record["answer"]}

    def scores(self, records: Sequence[Record]) -> dict[str, Any]:
        subjects: dict[str, list[bool]] = defaultdict(list)
        for record in records:
            if record["subject"] is not None:
                subjects[record["subject"]].append(record["correct"])
        correct = [r["correct"] for r in records]
        return {
            "overall": {"accuracy": share(correct), "correct": sum(correct), "total": len(correct)},
            "subjects": {name: share(hits) for name, hits in sorted(subjects.items())},
            "unparsed": sum(r["prediction"] is None for r in records),
        }

    def headline(self, scores: Mapping[str, Any]) -> list[tuple[str, Any]]:
        return [*scores["subjects"].items(), ("accuracy", scores["overall"]["accuracy"])]
