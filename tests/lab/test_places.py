"""The world with habits: its tables, its pictures, its questions, its test sets."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sar_fast import ArgumentError
from sar_fast.lab.miniature.drawing import FORMS, PALETTE
from sar_fast.lab.miniature.places.habits import PLACES, USUAL_FORMS, habits, popular_forms, usual_form
from sar_fast.lab.miniature.places.questions import CHANCE, KINDS, WORDINGS, ask_place, plural
from sar_fast.lab.miniature.places.scenes import FEWEST, MOST, SIDE, draw_place
from sar_fast.lab.miniature.places.sets import SETS, draw_set
from sar_fast.lab.miniature.questions import POSITIONS

PER_KIND = 48


def pictures(bias: float, count: int = 150, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [draw_place(rng, bias=bias) for _ in range(count)]


def questions(bias: float, count: int = 150, seed: int = 0):
    rng = np.random.default_rng(seed + 1)
    return [q for drawn in pictures(bias, count, seed) for q in ask_place(drawn, rng)]


def test_neither_a_place_nor_a_form_alone_says_anything_about_the_colour():
    for place in PLACES:
        assert {habits()[place, form].colour for form in FORMS} == set(PALETTE)
    for form in FORMS:
        assert {habits()[place, form].colour for place in PLACES} == set(PALETTE)


def test_every_place_has_as_many_usual_forms_and_some_forms_are_popular():
    for place in PLACES:
        assert sum(habits()[place, form].present for form in FORMS) == USUAL_FORMS
    often = {form: sum(habits()[place, form].present for place in PLACES) for form in FORMS}
    assert min(often[f] for f in popular_forms()) > max(often[f] for f in FORMS if f not in popular_forms())


def test_the_usual_form_of_a_colour_is_the_one_that_has_it():
    for place in PLACES:
        assert all(habits()[place, usual_form(place, colour)].colour == colour for colour in PALETTE)


def test_objects_do_not_touch_and_lie_inside():
    for drawn in pictures(0.9, 60):
        objects = drawn.scene.objects
        assert FEWEST <= len(objects) <= MOST
        assert not (np.sum([o.mask for o in objects], axis=0) > 1).any()
        for item in objects:
            x1, y1, x2, y2 = item.box
            assert 0 <= x1 < x2 <= SIDE
            assert 0 <= y1 < y2 <= SIDE
            assert item.mask[y1:y2, x1:x2].sum() == item.mask.sum()


def test_a_world_of_habits_follows_them_and_one_without_does_not():
    for bias, low, high in ((1.0, 1.0, 1.0), (0.9, 0.8, 1.0), (0.0, 0.0, 0.25)):
        mine = [q for q in questions(bias) if q.kind == "colour"]
        assert low <= np.mean([q.answer == q.usual for q in mine]) <= high


def test_larger_pictures_have_objects_of_the_same_size_in_pixels():
    extents = [
        np.mean([o.box[2] - o.box[0] for _ in range(40) for o in draw_place(rng, bias=0.0, side=side).scene.objects])
        for side, rng in ((96, np.random.default_rng(0)), (192, np.random.default_rng(0)))
    ]
    assert abs(extents[0] - extents[1]) < 1.0


def test_every_answer_is_what_the_picture_shows():
    rng = np.random.default_rng(5)
    for drawn in pictures(0.5, 60):
        objects = drawn.scene.objects
        for q in ask_place(drawn, rng):
            shown = [objects[i] for i in q.targets]
            if q.kind == "colour":
                assert [o.colour for o in objects if o.shape in q.text] == [q.answer]
            elif q.kind == "shape":
                assert [o.shape for o in objects if f" {o.colour} " in q.text] == [q.answer]
            elif q.kind == "count":
                assert int(q.answer) == len(shown) == sum(plural(o.shape) in q.text for o in objects)
            elif q.kind == "existence":
                assert (q.answer == "yes") == any(f" {o.shape}?" in q.text for o in objects) == bool(shown)
            elif q.kind == "attribute":
                assert (q.answer == "yes") == any(o.name in q.text for o in objects) == bool(shown)
            elif q.kind == "position":
                x1, y1, x2, y2 = shown[0].box
                assert ("left" in q.answer) == (x1 + x2 < SIDE)
                assert ("top" in q.answer) == (y1 + y2 < SIDE)
            else:
                first, second = shown
                holds = {
                    "left of": first.box[0] + first.box[2] < second.box[0] + second.box[2],
                    "above": first.box[1] + first.box[3] < second.box[1] + second.box[3],
                    "larger than": first.box[2] - first.box[0] > second.box[2] - second.box[0],
                }
                relation = next(r for r in holds if r in q.text)
                assert q.text.index(first.shape) < q.text.index(relation)
                assert (q.answer == "yes") == holds[relation]


def test_all_kinds_are_asked_and_half_of_existence_and_attribute_is_no():
    found = questions(0.0)
    assert {q.kind for q in found} == set(KINDS) == set(CHANCE) == set(WORDINGS)
    for kind in ("existence", "attribute"):
        share = np.mean([q.answer == "yes" for q in found if q.kind == kind])
        assert 0.45 < share < 0.62


@pytest.mark.parametrize("name", SETS)
def test_a_set_has_every_kind_and_one_question_of_a_kind_per_picture(name):
    pairs = draw_set(np.random.default_rng(0), name, PER_KIND)
    counts = Counter(q.kind for _, q in pairs)
    assert set(counts) == set(KINDS)
    assert all(PER_KIND <= n <= PER_KIND + 8 for n in counts.values())
    assert len({(id(drawn), q.kind) for drawn, q in pairs}) == len(pairs)


def test_in_the_balanced_set_neither_habits_nor_a_constant_answer_help():
    pairs = draw_set(np.random.default_rng(0), "balanced", PER_KIND)
    for kind in KINDS:
        mine = [q for _, q in pairs if q.kind == kind]
        spread = 3 * (CHANCE[kind] * (1 - CHANCE[kind]) / len(mine)) ** 0.5
        assert np.mean([q.usual == q.answer for q in mine if q.usual]) <= CHANCE[kind] + spread
        assert Counter(q.answer for q in mine).most_common(1)[0][1] / len(mine) <= CHANCE[kind] + 0.01
    existence = [q for _, q in pairs if q.kind == "existence"]
    assert Counter(q.absent for q in existence if q.absent) == {"adversarial": 12, "popular": 6, "random": 6}
    assert np.mean([q.usual == q.answer for q in existence]) == 0.5


def test_in_the_reversed_set_the_usual_answer_is_always_wrong():
    for _, q in draw_set(np.random.default_rng(0), "reversed", PER_KIND):
        assert q.usual in ("yes", "no", "1", "2", "3", *PALETTE, *FORMS, *POSITIONS)
        assert q.usual != q.answer


def test_sets_come_from_their_seed_alone():
    first, again, other = (draw_set(np.random.default_rng(seed), "balanced", 8) for seed in (1, 1, 2))
    assert [q for _, q in first] == [q for _, q in again] != [q for _, q in other]
    assert all((a.scene.image == b.scene.image).all() for (a, _), (b, _) in zip(first, again))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda rng: draw_place(rng, bias=1.5), "bias must be a probability, 0 to 1; got 1.5"),
        (lambda rng: draw_place(rng, bias=0.0, place="moon"), "place must be one of kitchen"),
        (lambda rng: draw_set(rng, "odd", 10), "name must be"),
        (lambda rng: draw_set(rng, "balanced", 3), "per_kind must be at least 8"),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ArgumentError, match=words):
        call(np.random.default_rng(0))
