"""TextVQA: VQA accuracy against ten people's answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sar_fast.lab.benchmark.tasks.base import Record, Sample, Skip, Task, text_of

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {word: str(value) for value, word in enumerate(NUMBERS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905  (a list would take a hundred lines)
# the scorers mend a contraction that lacks one of its apostrophes, and take the one from somebody'd
MENDED = {
    word[:place] + word[place + 1 :]: word for word in CONTRACTIONS for place, c in enumerate(word) if c == "'"
} | {"somebody'd": "somebodyd"}


def normalise(answer: str) -> str:
    """An answer as the VQA challenge compares it: lower case, no punctuation or articles, digits for numbers."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    bare = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if beside_space else " ")
    bare = re.sub(r"\.(?!\d)", "", bare)
    words = [NUMBER_WORDS.get(word, word) for word in bare.split()]
    return " ".join(MENDED.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(reply: str, answers: Sequence[str]) -> float:
    """Mean over the people of min(1, m / 3), m the number of the others who gave this answer; 0 to 1."""
    given, said = normalise(reply), [normalise(answer) for answer in answers]
    matches = said.count(given)
    credits = [min(1.0, (matches - (answer == given)) / 3) for answer in said]
    return sum(credits) / len(credits)


class TextVQA(Task):
    """VQA accuracy, mean over questions, in percent."""

    name = "textvqa"
    hub_id = "lmms-lab/textvqa"
    split = "validation"
    columns = ("question_id", "question", "answers")
    suffix = "\nAnswer the question using a single word or phrase."
    scorings = ("generate",)
    source = "TextVQA's evaluator (EvalAI answer processing of facebookresearch/mmf, leave-one-out over ten answers)"

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Sample], list[Skip]]:
        samples: dict[str, Sample] = {}
        for number, row in enumerate(rows):
            key, answers = str(row["question_id"]), row["answers"]
            if key in samples:
                raise ValueError(f"row {number}: question_id {key} is in row {samples[key].row} already")
            if not isinstance(answers, list) or len(answers) < 2 or not all(isinstance(a, str) for a in answers):
                raise ValueError(f"row {number}: answers is {answers!r}, needed a list of people's answers")
            if not any(answer.strip() for answer in answers):
                raise ValueError(
                    f"row {number} has no answers: the organisers keep those of some splits; use validation"
                )
            question = text_of(row, "question", number).capitalize()
            samples[key] = Sample(
                key, number, question + self.words_after, key, about={"question": question, "answers": answers}
            )
        return list(samples.values()), []

    def judge(self, record: Record) -> dict[str, Any]:
        accuracy = vqa_accuracy(record["reply"], record["answers"])
        return {"prediction": normalise(record["reply"]), "accuracy": accuracy, "correct": accuracy == 1}

    def scores(self, records: Sequence[Record]) -> dict[str, Any]:
        accuracy = 100.0 * sum(r["accuracy"] for r in records) / len(records)
        return {
            "overall": {"accuracy": accuracy, "total": len(records)},
            "unparsed": sum(not r["prediction"] for r in records),
        }

    def headline(self, scores: Mapping[str, Any]) -> list[tuple[str, Any]]:
        return [("accuracy", scores["overall"]["accuracy"])]
