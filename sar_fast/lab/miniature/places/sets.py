"""Test sets of questions about places: like training, without habits, and against them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np

from sar_fast.base.errors import ArgumentError, check_choice
from sar_fast.lab.miniature.drawing import BACKGROUNDS, FORMS, HELD_OUT_PHOTOGRAPHS, PALETTE
from sar_fast.lab.miniature.places.questions import KINDS, PlaceQuestion, ask_place
from sar_fast.lab.miniature.places.scenes import SIDE, PlaceScene, draw_place
from sar_fast.lab.miniature.questions import POSITIONS

SETS = ("biased", "balanced", "reversed")
BIAS = 0.9  # of training's pictures, and of the biased set
Pair = tuple[PlaceScene, PlaceQuestion]


def draw_set(
    rng: np.random.Generator,
    name: str,
    per_kind: int,
    *,
    side: int = SIDE,
    photographs: Sequence[str] = HELD_OUT_PHOTOGRAPHS,
) -> list[Pair]:
    """About ``per_kind`` questions of every kind, at most one of a kind per picture, in the order of ``KINDS``.

    Args:
        name: ``"biased"``: pictures and questions as in training. ``"balanced"``: pictures without habits, every answer
            as often as the others of its kind, and the usual answer right no more often than by chance; half of the
            absent forms are adversarial, the others popular and random. ``"reversed"``: of these the questions whose
            usual answer is wrong.
        per_kind: rounded up so that all answers are as often; side: of the pictures, in pixels.

    ``ArgumentError`` for a name that is not known and fewer than 8 questions.
    """
    check_choice("name", name, SETS)
    if per_kind < 8:
        raise ArgumentError("per_kind", per_kind, "be at least 8, so that each answer is there")
    quotas = {kind: _quotas(kind, name, per_kind) for kind in KINDS}
    found: dict[str, list[Pair]] = {kind: [] for kind in KINDS}
    while any(quota.total() for quota in quotas.values()):
        background = str(rng.choice(BACKGROUNDS))
        bias = BIAS if name == "biased" else 0.0
        drawn = draw_place(rng, bias=bias, side=side, background=background, photographs=photographs)
        questions = ask_place(drawn, rng)
        for kind, quota in quotas.items():
            mine = [q for q in questions if q.kind == kind and quota[_cell(q, name)] > 0]
            if mine:
                chosen = mine[int(rng.integers(len(mine)))]
                quota[_cell(chosen, name)] -= 1
                found[kind].append((drawn, chosen))
    return [pair for kind in KINDS for pair in found[kind]]


def _cell(question: PlaceQuestion, name: str) -> tuple:
    """What a question counts as among the quotas of its kind; one that no quota names is not taken."""
    if name == "biased":
        return ()
    if name == "reversed":
        usual = None if question.usual in (None, question.answer) else "wrong"
        return question.answer, usual
    if question.kind == "existence":
        return question.answer, question.usual, question.absent
    if question.kind == "comparison":
        return question.answer, question.usual
    return (question.answer,)


def _quotas(kind: str, name: str, per_kind: int) -> Counter:
    """How many questions of every cell there are to be."""
    if name == "biased":
        return Counter({(): per_kind})
    answers = {"colour": tuple(PALETTE), "shape": FORMS, "count": ("1", "2", "3"), "position": POSITIONS}
    of_kind = answers.get(kind, ("yes", "no"))
    if name == "reversed":
        cells = [(answer, "wrong") for answer in of_kind]
    elif kind == "existence":
        absent = {"adversarial": 2, "popular": 1, "random": 1}
        yes = [("yes", usual, None) for usual in ("yes", "no")] * 2
        no = [("no", "yes" if how == "adversarial" else "no", how) for how, n in absent.items() for _ in range(n)]
        cells = yes + no
    elif kind == "comparison":
        cells = list(itertools.product(of_kind, ("yes", "no")))
    else:
        cells = [(answer,) for answer in of_kind]
    each = -(-per_kind // len(cells))
    return Counter({cell: each * cells.count(cell) for cell in cells})
