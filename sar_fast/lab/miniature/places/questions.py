"""Questions about pictures of places, what is usual there, and what the picture shows."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np

from sar_fast.lab.miniature.drawing import FORMS, PALETTE, DrawnObject
from sar_fast.lab.miniature.places.habits import habits, popular_forms, usual_form
from sar_fast.lab.miniature.places.scenes import PlaceScene
from sar_fast.lab.miniature.questions import quadrant

KINDS = ("colour", "shape", "existence", "attribute", "count", "position", "comparison")
CHANCE = {
    "colour": 1 / 8,
    "shape": 1 / 8,
    "existence": 1 / 2,
    "attribute": 1 / 2,
    "count": 1 / 3,
    "position": 1 / 4,
    "comparison": 1 / 2,
}
ABSENT = ("random", "popular", "adversarial")  # how an absent form is chosen, as in POPE (Li et al., EMNLP 2023)
RELATIONS = {"left": "left of", "above": "above", "larger": "larger than"}
CLEAR = {"left": 6.0, "above": 6.0, "larger": 2.0}  # pixels of difference from which a relation is asked about

# The first wording of a kind is the canonical one, the only one that evaluation asks.
WORDINGS = {
    "colour": ("what colour is the {form}?", "what is the colour of the {form}?"),
    "shape": ("what shape is the {colour} object?", "which shape is {colour}?"),
    "existence": ("is there a {form}?", "can you see a {form}?"),
    "attribute": ("is there a {colour} {form}?", "can you see a {colour} {form}?"),
    "count": ("how many {forms} are there?", "what is the number of {forms}?"),
    "position": ("where is the {form}?", "in which corner is the {form}?"),
    "comparison": ("is the {form} {relation} the {other}?",) * 2,
}


@dataclass(frozen=True)
class PlaceQuestion:
    """A question, the answer that the picture gives, and the one that the place's habits give.

    ``targets`` are the indices of the objects that it is about, none where the right answer is that there is none.
    ``usual`` is None where habits say nothing. ``absent`` says how an absent form was chosen.
    """

    kind: str
    text: str
    answer: str
    usual: str | None
    targets: tuple[int, ...]
    absent: str | None = None


def ask_place(drawn: PlaceScene, rng: np.random.Generator, *, paraphrase: bool = False) -> list[PlaceQuestion]:
    """All that can be asked about a picture with one right answer, in the order of ``KINDS``.

    As many existence and attribute questions have the answer no as yes, where there is enough that is absent;
    ``paraphrase`` words half of the questions in the second way.
    """
    facts = [fact for find in _FACTS for fact in find(drawn, rng)]
    questions = []
    for kind, words, answer, usual, targets, *absent in facts:
        wording = WORDINGS[kind][int(paraphrase and rng.random() < 0.5)]
        text = f"In the {drawn.place}, {wording.format(**words)}"
        questions.append(PlaceQuestion(kind, text, answer, usual, targets, *absent))
    return questions


def _single(drawn: PlaceScene) -> list[tuple[int, DrawnObject]]:
    """Objects whose form occurs once, by their indices."""
    forms = Counter(o.shape for o in drawn.scene.objects)
    return [(i, o) for i, o in enumerate(drawn.scene.objects) if forms[o.shape] == 1]


def _colours(drawn, rng):
    for index, item in _single(drawn):
        yield "colour", {"form": item.shape}, item.colour, habits()[drawn.place, item.shape].colour, (index,)


def _shapes(drawn, rng):
    colours = Counter(o.colour for o in drawn.scene.objects)
    for index, item in enumerate(drawn.scene.objects):
        if colours[item.colour] == 1:
            yield "shape", {"colour": item.colour}, item.shape, usual_form(drawn.place, item.colour), (index,)


def _existence(drawn, rng):
    there = {o.shape for o in drawn.scene.objects}
    usual = lambda form: "yes" if habits()[drawn.place, form].present else "no"
    for form in sorted(there):
        targets = tuple(i for i, o in enumerate(drawn.scene.objects) if o.shape == form)
        yield "existence", {"form": form}, "yes", usual(form), targets
    missing = [form for form in FORMS if form not in there]
    for form in rng.permutation(missing)[: len(there)]:
        yield "existence", {"form": str(form)}, "no", usual(str(form)), (), _absence(drawn.place, str(form))


def plural(form: str) -> str:
    return f"{form}es" if form.endswith("s") else f"{form}s"


def _absence(place: str, form: str) -> str:
    """How the choice of an absent form is called: usual here, popular everywhere, or neither."""
    if habits()[place, form].present:
        return "adversarial"
    return "popular" if form in popular_forms() else "random"


def _attributes(drawn, rng):
    there = {(o.colour, o.shape) for o in drawn.scene.objects}
    usual = lambda colour, form: "yes" if habits()[drawn.place, form].colour == colour else "no"
    for colour, form in sorted(there):
        targets = tuple(i for i, o in enumerate(drawn.scene.objects) if (o.colour, o.shape) == (colour, form))
        yield "attribute", {"colour": colour, "form": form}, "yes", usual(colour, form), targets
    colours, forms = {c for c, _ in there}, {f for _, f in there}
    near = [(c, f) for c in PALETTE for f in FORMS if (c, f) not in there and f in forms]
    for _ in there:  # a form that is there, in another colour: half of the time one that another object has
        shown = [pair for pair in near if pair[0] in colours]
        choice = shown if shown and rng.random() < 0.5 else near
        colour, form = choice[int(rng.integers(len(choice)))]
        yield "attribute", {"colour": colour, "form": form}, "no", usual(colour, form), ()


def _counts(drawn, rng):
    forms = Counter(o.shape for o in drawn.scene.objects)
    for form, count in sorted(forms.items()):
        targets = tuple(i for i, o in enumerate(drawn.scene.objects) if o.shape == form)
        yield "count", {"forms": plural(form)}, str(count), str(habits()[drawn.place, form].count), targets


def _positions(drawn, rng):
    for index, item in _single(drawn):
        position = quadrant(item.box, drawn.scene.image.shape[:2])
        if position is not None:
            yield "position", {"form": item.shape}, position, habits()[drawn.place, item.shape].position, (index,)


def _comparisons(drawn, rng):
    single = _single(drawn)
    for (i, first), (j, second) in itertools.pairwise(single):
        relation = str(rng.choice(list(RELATIONS)))
        difference = _measure(relation, second.box) - _measure(relation, first.box)
        if abs(difference) < CLEAR[relation]:
            continue
        words = {"form": first.shape, "relation": RELATIONS[relation], "other": second.shape}
        here = habits()
        usual = _usual_relation(relation, here[drawn.place, first.shape], here[drawn.place, second.shape])
        yield "comparison", words, "yes" if difference > 0 else "no", usual, (i, j)


def _measure(relation: str, box: tuple[int, int, int, int]) -> float:
    """What is less where the relation holds: the centre's x or y, or minus the width, in pixels."""
    x1, y1, x2, y2 = box
    return {"left": (x1 + x2) / 2, "above": (y1 + y2) / 2, "larger": x1 - x2}[relation]


def _usual_relation(relation, first, second) -> str | None:
    words = {
        "left": (first.position.split()[1], second.position.split()[1], "left"),
        "above": (first.position.split()[0], second.position.split()[0], "top"),
        "larger": (first.size, second.size, "large"),
    }
    mine, other, holds = words[relation]
    return None if mine == other else "yes" if mine == holds else "no"


_FACTS = (_colours, _shapes, _existence, _attributes, _counts, _positions, _comparisons)
