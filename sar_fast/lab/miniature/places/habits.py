"""What is usual where: the language prior that training teaches and tests break.

Eight places exist as words alone: no picture shows which one it is. In each of them some shapes are usual, and each
shape has a usual colour, number, corner and size there. The tables are drawn once, from a fixed seed, such that neither
the place nor the shape alone says anything about the colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from sar_fast.lab.miniature.drawing import FORMS, PALETTE
from sar_fast.lab.miniature.questions import POSITIONS

PLACES = ("kitchen", "garden", "street", "beach", "office", "forest", "market", "station")
SIZES = ("small", "large")
USUAL_FORMS = 4  # in every place
USUAL_IN = (6, 6, 5, 5, 3, 3, 2, 2)  # places in which the forms are usual, from the most popular on
COUNTS = (1, 1, 2, 3)  # usual numbers of the usual forms of a place, and of its others, in random order
TABLES_SEED = 20_260


@dataclass(frozen=True)
class Habit:
    """What is usual for one form in one place: whether it is there, and how it looks if it is."""

    present: bool
    colour: str
    count: int
    position: str
    size: str


@cache
def habits() -> dict[tuple[str, str], Habit]:
    """(place, form) -> its habit."""
    rng = np.random.default_rng(TABLES_SEED)
    square = (
        np.add.outer(rng.permutation(8), rng.permutation(8)) % 8
    )  # a Latin square: every colour once a row and column
    colours = np.array(list(PALETTE))[rng.permutation(8)][square]
    present = _usual_forms(rng)
    counts, corners = np.zeros(present.shape, dtype=int), np.zeros(present.shape, dtype=int)
    for p in range(len(PLACES)):  # pictures that keep to all habits have seven objects, in all four corners
        for usual in (True, False):
            counts[p, present[p] == usual] = rng.permutation(COUNTS)
            corners[p, present[p] == usual] = rng.permutation(len(POSITIONS))
    return {
        (place, form): Habit(
            bool(present[p, f]),
            str(colours[p, f]),
            int(counts[p, f]),
            POSITIONS[corners[p, f]],
            str(rng.choice(SIZES)),
        )
        for p, place in enumerate(PLACES)
        for f, form in enumerate(FORMS)
    }


@cache
def popular_forms() -> tuple[str, ...]:
    """The four forms that are usual in the most places."""
    often = {form: sum(habits()[place, form].present for place in PLACES) for form in FORMS}
    return tuple(sorted(FORMS, key=lambda form: (-often[form], FORMS.index(form)))[:4])


def usual_form(place: str, colour: str) -> str:
    """The form that usually has ``colour`` in ``place``: there is one, the table being a Latin square."""
    return next(form for form in FORMS if habits()[place, form].colour == colour)


def _usual_forms(rng: np.random.Generator) -> np.ndarray:
    """(places, forms) bool with ``USUAL_FORMS`` in every row and ``USUAL_IN``, in random order, down the columns."""
    columns = np.array(USUAL_IN)[rng.permutation(len(FORMS))]
    while True:
        chosen = np.zeros((len(PLACES), len(FORMS)), dtype=bool)
        for form in np.argsort(-columns, kind="stable"):
            room = USUAL_FORMS - chosen.sum(1)
            places = np.argsort(-(room + rng.random(len(PLACES))))[: columns[form]]
            chosen[places, form] = True
        if (chosen.sum(1) == USUAL_FORMS).all():
            return chosen
