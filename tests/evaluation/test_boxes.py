"""Boxes in words: every family's way, on a picture that is not square, so that swapped axes show."""

from __future__ import annotations

import pytest

from sar_fast.hf.families import registered_families
from sar_fast.lab.benchmark.tasks.refcoco import RefCOCO
from sar_fast.lab.io.boxes import FORMATS, choose_format
from sar_fast.lab.miniature.questions import BOX_BINS, encode_box

SIZE = (400, 200)  # width, height
BOX = (40.0, 20.0, 120.0, 80.0)


@pytest.mark.parametrize(
    ("name", "reply", "frame"),
    [
        ("fraction", "[0.1, 0.1, 0.3, 0.4]", None),
        ("fraction", "It is at (0.10, 0.1), (0.3,0.40).", None),
        ("square_fraction", "[0.10, 0.30, 0.30, 0.45]", None),  # 100 pixels above and below
        ("thousandths", "(100,100),(300,400)", None),  # Qwen2-VL, its special tokens dropped
        ("thousandths", "<ref>x</ref><box>[[100, 100, 300, 400]]</box>", None),
        ("pixels", "[40, 20, 120, 80]", None),
        ("resized_pixels", '```json\n[{"bbox_2d": [28, 28, 84, 112], "label": "x"}]\n```', (280, 280)),
        ("qwen3", '[{"bbox_2d": [100, 100, 300, 400], "label": "2 cats"}]', None),
        ("internvl", "x[[100, 100, 300, 400]]", None),
        ("paligemma", "<loc0102><loc0102><loc0410><loc0307> x", None),  # y before x, of 1024
    ],
)
def test_formats_agree_on_the_box(name, reply, frame):
    unit = 200 / 1024 if name == "paligemma" else 1e-6
    assert FORMATS[name].read(reply, SIZE, frame) == pytest.approx(BOX, abs=2 * unit + 1e-6)


def test_the_miniatures_bins_stand_for_their_middles():
    reply = encode_box(BOX, SIZE[::-1])
    found = FORMATS["miniature"].read(reply, SIZE, None)
    for value, true, side in zip(found, BOX, (*SIZE, *SIZE)):
        assert abs(value - true) <= side / BOX_BINS / 2 + 1e-9


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I cannot see it.",
        "[0.1, 0.1, 0.3]",
        "0.1 0.1 0.3 0.4",  # no bracket: numbers of a sentence are no box
        "[0.3, 0.1, 0.1, 0.4]",  # right of its right edge
        "[0.1, 0.4, 0.3, 0.4]",  # no height
    ],
)
def test_what_is_no_box_is_none(reply):
    assert FORMATS["fraction"].read(reply, SIZE, None) is None


def test_the_first_box_counts():
    assert FORMATS["fraction"].read("[0.1, 0.1, 0.3, 0.4] or [0, 0, 1, 1]", SIZE, None) == pytest.approx(BOX)


def test_pixels_of_the_resized_picture_need_its_size():
    with pytest.raises(
        ValueError,
        match=r"box_format must be another one for a model whose processor does not report .*; got resized_pixels",
    ):
        FORMATS["resized_pixels"].read("[1, 2, 3, 4]", SIZE, None)


def test_families_have_their_format_and_a_flag_overrules_it():
    named = {t: choose_format(None, t) for family in registered_families() for t in family.box_formats}
    assert len(named) == 6
    assert set(named.values()) <= set(FORMATS)
    assert named["paligemma"] == "paligemma"
    assert choose_format(None, "qwen2_5_vl") == "resized_pixels"
    assert choose_format(None, "llava") == "fraction"
    assert choose_format("pixels", "llava") == "pixels"
    with pytest.raises(ValueError, match=r"box_format must be one of fraction, .*; got 'permille'"):
        choose_format("permille", "llava")


# --- RefCOCO


def row(**change):
    return {"question_id": "5", "answer": ["the cup", "left cup"], "bbox": [40.0, 20.0, 80.0, 60.0]} | change


def make():
    return RefCOCO(RefCOCO.Options(box_format="pixels"))


def score(replies, rows=None):
    task = make()
    samples, _ = task.samples(rows or [row()])
    records = [{**s.about, "reply": reply, "image_size": SIZE, "frame": None} for s, reply in zip(samples, replies)]
    assert len(samples) == len(replies)
    return task.scores([record | task.judge(record) for record in records])


def test_refcoco_scores_every_expression_at_half_an_overlap():
    """The published box is x, y, width, height: (40, 20, 120, 80) is 80 x 60 = 4800 pixels."""
    # its left half: IoU 1/2, which counts; 39 of 80 columns: IoU < 1/2, which does not
    scores = score(["[40, 20, 80, 80]", "[40, 20, 79, 80]"])
    assert scores["overall"]["accuracy"] == 50
    assert scores["overall"]["accuracy_iou_0.3"] == 100
    assert scores["overall"]["accuracy_iou_0.7"] == 0
    assert scores["overall"]["mean_iou"] == pytest.approx((40 / 80 + 39 / 80) / 2)
    assert scores["overall"]["center_accuracy"] == 100


def test_refcoco_takes_corners_not_sides():
    """A reader that took the published width for x2 would call this right."""
    assert score(["[40, 20, 80, 60]", "[40, 20, 120, 80]"])["overall"]["accuracy"] == 50


def test_refcoco_counts_replies_without_a_box():
    scores = score(["nowhere", "[200, 100, 300, 150]"])
    assert scores["unparsed"] == 1
    assert scores["overall"]["accuracy"] == scores["overall"]["center_accuracy"] == 0


def test_refcoco_lists_what_it_cannot_use():
    samples, skips = make().samples([row(bbox=[1.0, 2.0, 0.0, 5.0]), row(question_id="6", answer=["", "cup"])])
    assert [s.key for s in samples] == ["1/1"]
    assert [(s.key, s.reason) for s in skips] == [
        ("row 0", "bbox [1.0, 2.0, 0.0, 5.0] has no area"),
        ("row 1", "expression 0 is empty"),
    ]
    assert [s.kind for s in skips] == ["box has no area", "no expression"]
    samples, skips = make().samples([row(bbox=[0.1, 0.2, 0.4, 0.8])])
    assert (samples, [s.kind for s in skips]) == ([], ["box in fractions of the picture, needed pixels"])


def test_refcoco_objects_to_a_box_outside_of_the_picture():
    task = make()
    (inside, _), _ = task.samples([row()])
    assert task.objection(inside, SIZE) is None
    assert task.objection(inside, (119, 200)) is None  # one pixel: rounding
    assert "lies outside of the picture's 118 x 200 pixels" in task.objection(inside, (118, 200))
    assert "lies outside" in task.objection(inside, (200, 70))


@pytest.mark.parametrize("box", [None, [1, 2, 3], [1, 2, 3, float("nan")], ["1", 2, 3, 4]])
def test_refcoco_names_a_bad_box(box):
    with pytest.raises(ValueError, match=r"row 0: bbox is .*needed x, y, width, height in pixels"):
        make().samples([row(bbox=box)])


def test_refcoco_counts_a_repeated_row_once():
    """An object may occur twice with other expressions, but not with the same."""
    samples, skips = make().samples([row(), row(answer=["mug"]), row()])
    assert [s.key for s in samples] == ["0/0", "0/1", "1/0"]
    assert [(s.key, s.reason, s.kind) for s in skips] == [("row 2", "repeats row 0", "repeated row")]


# --- replies in another format than the one in force

BOXES = [BOX, (210.0, 90.0, 390.0, 190.0), (30.0, 100.0, 130.0, 195.0), (150.0, 10.0, 260.0, 60.0)]
PARTS = {  # numbers per side of the picture, and how they are written
    "fraction": ((1, 1), "[{:.3f}, {:.3f}, {:.3f}, {:.3f}]"),
    "percent": ((100, 100), "[{:.1f}, {:.1f}, {:.1f}, {:.1f}]"),
    "thousandths": ((1000, 1000), "({:.0f},{:.0f}),({:.0f},{:.0f})"),
    "pixels": (SIZE, "[{:.0f}, {:.0f}, {:.0f}, {:.0f}]"),
    "resized_pixels": ((280, 280), '[{{"bbox_2d": [{:.0f}, {:.0f}, {:.0f}, {:.0f}]}}]'),
    "miniature": ((BOX_BINS, BOX_BINS), "{:.0f} {:.0f} {:.0f} {:.0f}"),
}
ALIKE = {"thousandths": ["thousandths", "qwen3", "internvl"]}


def write(name, box):
    (x, y), words = PARTS[name]
    shift = 0.5 if name == "miniature" else 0
    return words.format(*(v / side * part - shift for v, side, part in zip(box, SIZE * 2, (x, y, x, y))))


def read_as(name, replies, boxes=BOXES, frame=(280, 280)):
    task = RefCOCO(RefCOCO.Options(box_format=name))
    records = [
        {"reply": reply, "box": list(box), "image_size": SIZE, "frame": frame} for reply, box in zip(replies, boxes)
    ]
    scores = task.scores([record | task.judge(record) for record in records])
    return scores, task.remarks(scores)


@pytest.mark.parametrize("expected", PARTS)
@pytest.mark.parametrize("written", PARTS)
def test_the_format_that_replies_are_written_in_is_named(written, expected):
    scores, remarks = read_as(expected, [write(written, box) for box in BOXES])
    if written == expected:
        assert scores["overall"]["accuracy"] == 100
        assert (scores["box_format_mismatch"], remarks) == (None, [])
        return
    assert scores["overall"]["accuracy"] < 100
    found = scores["box_format_mismatch"]
    assert found["better"] == ALIKE.get(written, [written])
    assert found["accuracy"][written] == 100
    (remark,) = remarks
    assert f"do not seem to write boxes as box_format {expected}: numbers from" in remark
    assert f"with box_format {written}: 4 of 4 boxes plausible, accuracy 100.00" in remark


def test_a_mismatch_shows_also_where_the_model_finds_nothing():
    """Thousandths of wrong places: nothing is right in any format, but the numbers are none of fractions."""
    scores, (remark,) = read_as("fraction", ["[700, 650, 900, 990]"] * 4, frame=None)
    assert scores["box_format_mismatch"]["better"] == ["thousandths", "qwen3", "internvl"]
    assert "resized_pixels" not in scores["box_format_mismatch"]["accuracy"]  # the processor reports no frame
    assert "numbers from 650 to 990, 0 of 4 boxes plausible, accuracy 0.00; with box_format thousandths" in remark
    _, (remark,) = read_as("thousandths", ["[0.7, 0.6, 0.9, 0.99]"] * 3, BOXES[:3])
    assert "numbers from 0.6 to 0.99" in remark
    _, (remark,) = read_as("pixels", ["[70000, 65000, 90000, 99000]"])
    assert remark.endswith("accuracy 0.00; no other box_format fits")


SWAPPED = {
    "y1, x1, y2, x2": lambda x1, y1, x2, y2: (y1, x1, y2, x2),
    "x, y, width, height": lambda x1, y1, x2, y2: (x1, y1, x2 - x1, y2 - y1),
    "centre x, centre y, width, height": lambda x1, y1, x2, y2: ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1),
}


@pytest.mark.parametrize("order", SWAPPED)
@pytest.mark.parametrize("units", ["fraction", "percent", "thousandths", "pixels"])
@pytest.mark.parametrize("in_force", ["fraction", "percent", "thousandths", "pixels"])
def test_numbers_in_another_order_are_told_though_no_format_reads_them(order, units, in_force):
    side, words = PARTS[units]
    replies = [words.format(*SWAPPED[order](*(v / s * p for v, s, p in zip(box, SIZE * 2, side * 2)))) for box in BOXES]
    scores, (remark,) = read_as(in_force, replies, frame=None)
    assert scores["overall"]["accuracy"] < 100
    assert scores["box_format_mismatch"]["order"] == {"units": units, "order": order, "accuracy": 100}
    end = f"read as {order} in the units of {units}, accuracy 100.00: no box_format has this order"
    assert remark.endswith(end)


def test_formats_that_hold_the_numbers_equally_well_are_all_named():
    """Nothing is right in any of them: which is meant is not known."""
    _, (remark,) = read_as("fraction", ["[1, 90, 4, 99]"] * 4, frame=None)
    assert "with box_format percent: 4 of 4 boxes plausible, accuracy 0.00" in remark
    assert "(thousandths, pixels, qwen3, internvl fit as well)" in remark


def test_weak_and_wordy_models_are_no_mismatch():
    wrong = ["[0.01, 0.01, 0.04, 0.9]", "[0.6, 0.6, 0.9, 0.7]", "It is on the left.", "no"]
    assert read_as("fraction", wrong)[1] == []
    assert read_as("fraction", ["nothing"] * 4)[1] == []
    # one box of twenty is right by chance when fractions are read as those of the padded square
    boxes = [(40.0, 20.0, 120.0, 80.0)] * 20
    replies = ["[0.5, 0.6, 0.6, 0.7]"] * 19 + ["[0.10, 0.30, 0.30, 0.45]"]
    assert read_as("fraction", replies, boxes)[1] == []
