"""Pictures of places: four to nine small objects that follow the place's habits as closely as is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.miniature.drawing import (
    COLOUR_JITTER,
    FORMS,
    HELD_OUT_PHOTOGRAPHS,
    PALETTE,
    ObjectSpec,
    Scene,
    compose,
    draw_background,
)
from sar_fast.lab.miniature.places.habits import PLACES, SIZES, Habit, habits

SIDE = 96  # pixels of the smallest picture: 12 x 12 patches of 8 pixels
FEWEST, MOST = 4, 9  # objects
KINDS_OF_FORMS = (3, 6)  # fewest and most different ones
HALF_EXTENTS = {"small": (5.0, 7.5), "large": (8.5, 11.5)}  # pixels, whatever the picture's size
GAP = 1.5  # pixels between the boxes of two objects at least
ANY_COUNT = (0.6, 0.25, 0.15)  # of 1, 2 and 3 objects of a form that keeps to no habit
MARGIN = 4.0  # pixels between an object's centre and a midline, where its position is a habit


@dataclass(frozen=True)
class PlaceScene:
    """A picture and the place that questions about it name."""

    scene: Scene
    place: str


def draw_place(
    rng: np.random.Generator,
    *,
    bias: float,
    place: str | None = None,
    side: int = SIDE,
    background: str = "plain",
    photographs: Sequence[str] = HELD_OUT_PHOTOGRAPHS,
    recolour: bool = False,
) -> PlaceScene:
    """Draws a picture of ``side`` x ``side`` pixels.

    Every property of every form (whether it is there, colour, number, corner, size) is the usual one of ``place`` with
    probability ``bias``, else drawn without regard to the place; so 0 is a world without habits. ``place`` is random by
    default; ``background``, ``photographs`` and ``recolour`` are those of ``draw_scene``. ``ArgumentError`` for a bias
    that is no probability and for an unknown place.
    """
    if not 0 <= bias <= 1:
        raise ArgumentError("bias", bias, "be a probability, 0 to 1")
    if place is not None and place not in PLACES:
        raise ArgumentError("place", place, f"be one of {', '.join(PLACES)}")
    place = place or str(rng.choice(PLACES))
    ground = draw_background(rng, background, side, photographs=photographs, recolour=recolour)
    specs = None
    while specs is None:
        specs = _specs(rng, place, bias, side)
    return PlaceScene(compose(ground, specs, background), place)


def _specs(rng: np.random.Generator, place: str, bias: float, side: int) -> list[ObjectSpec] | None:
    """One try; None if there are too few or too many objects, or no room for one."""
    follows = lambda: rng.random() < bias
    wanted: list[tuple[str, Habit]] = []
    for form in rng.permutation(FORMS):
        habit = habits()[place, form]
        if habit.present if follows() else rng.random() < 0.5:
            count = habit.count if follows() else 1 + int(rng.choice(len(ANY_COUNT), p=ANY_COUNT))
            wanted += [(str(form), habit)] * count
    if not FEWEST <= len(wanted) <= MOST or not KINDS_OF_FORMS[0] <= len(set(wanted)) <= KINDS_OF_FORMS[1]:
        return None
    specs: list[ObjectSpec] = []
    boxes = np.zeros((0, 3))  # centre x and y, half extent, in pixels
    for form, habit in wanted:
        size = habit.size if follows() else str(rng.choice(SIZES))
        half = float(rng.uniform(*HALF_EXTENTS[size]))
        centre = _free_centre(rng, boxes, half, side, habit.position if follows() else None)
        if centre is None:
            return None
        boxes = np.vstack([boxes, [*centre, half]])
        colour = habit.colour if follows() else str(rng.choice(list(PALETTE)))
        jitter = rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, size=3)
        rgb = tuple(int(v) for v in np.clip(np.add(PALETTE[colour], jitter), 0, 255))
        specs.append(ObjectSpec(colour, form, (centre[0] / side, centre[1] / side), half / side, rgb))
    return specs


def _free_centre(
    rng: np.random.Generator, boxes: np.ndarray, half: float, side: int, position: str | None
) -> tuple[float, float] | None:
    """A random centre (x, y) in pixels, in the corner ``position`` if it is given, that keeps clear of ``boxes``."""
    low, high = np.full(2, half), np.full(2, side - half)
    if position is not None:
        vertical, horizontal = position.split()
        for axis, first in enumerate((horizontal == "left", vertical == "top")):
            if first:
                high[axis] = side / 2 - MARGIN
            else:
                low[axis] = side / 2 + MARGIN
    tries = rng.uniform(low, high, size=(40, 2))
    distance = np.abs(tries[:, None] - boxes[None, :, :2]).max(-1)  # (tries, boxes)
    free = (distance >= boxes[:, 2] + half + GAP).all(-1)
    if not free.any():
        return None
    x, y = tries[free.argmax()]
    return float(x), float(y)
