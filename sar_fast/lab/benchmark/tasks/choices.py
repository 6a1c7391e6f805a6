"""Multiple choice: prompts, and what a reply chooses."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from string import ascii_uppercase

from sar_fast.lab.benchmark.tasks.base import Task, option

SUFFIX = "\nAnswer with the option's letter from the given choices directly."
FORMATS = ("letters", "cloze")
PUNCTUATION = re.compile(r"[.()\[\],:;!*#{}]")


class MultipleChoice(Task):
    """A benchmark whose questions have lettered options, or none in the prompt."""

    @dataclasses.dataclass(frozen=True)
    class Options(Task.Options):
        choice_format: str = option(
            "letters",
            "letters (default): options in the prompt; cloze: the question alone, options are its possible answers.",
            FORMATS,
        )

    suffix = SUFFIX

    @property
    def letters(self) -> bool:
        """Whether the prompt has the options."""
        return self.options.choice_format == "letters"

    @property
    def words_after(self) -> str:
        """Nothing after a cloze: the suffix asks for a letter."""
        return super().words_after if self.letters or self.options.prompt_suffix is not None else ""


def build_question(question: str, choices: Sequence[str], context: str = "", *, letters: bool = True) -> str:
    """Context, question and lettered choices, as LLaVA asks ScienceQA and MMBench; cloze leaves the choices out."""
    lines = [context] if context else []
    lines.append(question)
    if letters:
        lines += [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices)]
    return "\n".join(lines)


def parse_letter(reply: str, count: int) -> int | None:
    """The choice whose letter stands alone in the reply, if exactly one does.

    In a reply of more than three words a lone ``A`` is taken for an article.
    """
    words = PUNCTUATION.sub(" ", reply).split()
    found = [n for n, letter in enumerate(ascii_uppercase[:count]) if letter in words]
    if len(found) != 1 or ("A" in words and len(words) > 3):
        return None
    return found[0]


def parse_text(reply: str, choices: Sequence[str]) -> int | None:
    """The choice whose words are in the reply, if exactly one's are and the reply is not much longer than all."""
    reply = reply.lower()
    if len(reply) > 2 * sum(map(len, choices)):
        return None
    found = [n for n, choice in enumerate(choices) if choice.lower() in reply]
    return found[0] if len(found) == 1 else None


def parse_choice(reply: str, choices: Sequence[str], *, letters: bool = True) -> int | None:
    """What the reply chooses, by its letter, else by its words: the matching of MMBench's tool, without a judge."""
    letter = parse_letter(reply, len(choices)) if letters else None
    return parse_text(reply, choices) if letter is None else letter


def option_wordings(choices: Sequence[str], *, letters: bool = True) -> tuple[tuple[str, ...], ...]:
    """What first-token scoring compares: the letters, or the choices themselves."""
    return tuple((word,) for word in (ascii_uppercase[: len(choices)] if letters else choices))
