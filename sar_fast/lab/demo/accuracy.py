"""Accuracy of the miniature with and without SAR, on the same drawn questions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from sar_fast.lab.miniature.drawing import Scene
from sar_fast.lab.miniature.questions import Question, is_correct

SETS = {"plain backgrounds": ("plain", "gradient"), "photographs": ("photograph",)}  # photographs never trained on


@dataclasses.dataclass(frozen=True)
class PairedAccuracy:
    """Counts over the same questions: ``gained`` were wrong without SAR and right with it, ``lost`` the reverse;
    ``changed`` replies differ at all."""

    questions: int
    right_off: int
    right_on: int
    gained: int
    lost: int
    changed: int

    def __add__(self, other: PairedAccuracy) -> PairedAccuracy:
        return PairedAccuracy(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    @property
    def p_value(self) -> float:
        """Two-sided exact sign test of gained against lost."""
        n, extreme = self.gained + self.lost, max(self.gained, self.lost)
        return min(1.0, 2 * sum(math.comb(n, i) for i in range(extreme, n + 1)) / 2**n)


def paired_accuracy(
    pairs: Sequence[tuple[Scene, Question]], replies_off: Sequence[str], replies_on: Sequence[str]
) -> dict[str, PairedAccuracy]:
    """Counts for every kind of question that occurs."""
    table: dict[str, PairedAccuracy] = {}
    for (scene, question), off, on in zip(pairs, replies_off, replies_on):
        was, now = is_correct(question, off, scene), is_correct(question, on, scene)
        one = PairedAccuracy(1, was, now, now and not was, was and not now, off != on)
        table[question.kind] = table[question.kind] + one if question.kind in table else one
    return table


def verdict(total: PairedAccuracy) -> str:
    """One sentence on what the sample shows, and no more than it shows."""
    if not total.changed:
        return "SAR changed no answer of this sample."
    rates = f"{100 * total.right_off / total.questions:.1f} % to {100 * total.right_on / total.questions:.1f} %"
    if total.p_value >= 0.05:
        return f"From {rates}: a difference this small is within chance (sign test, p = {total.p_value:.2g})."
    better = "SAR helped" if total.gained > total.lost else "SAR hurt"
    return f"From {rates}: {better} on this sample (sign test, p = {total.p_value:.1g})."
