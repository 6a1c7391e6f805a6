"""RefCOCO, RefCOCO+ and RefCOCOg: the box of what an expression refers to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.benchmark.box_check import box_format_mismatch, describe_mismatch
from sar_fast.lab.benchmark.tasks.base import Record, Sample, Skip, Task, option, share
from sar_fast.lab.io.boxes import FORMATS, NEED_FRAMES, box_iou, choose_format
from sar_fast.lab.io.skips import BOX_FRACTIONS, BOX_OUTSIDE, NO_BOX_AREA

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
RIGHT_IOU = 0.5
NO_EXPRESSION = "no expression"
SLACK = 1.0  # pixels that an annotated box may lie beyond its picture: COCO's are rounded


class RefCOCO(Task):
    """Share of expressions whose box is found with an intersection over union of at least 0.5.

    A row is an object with its expressions; each of them is a sample.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(Task.Options):
        box_format: str | None = option(None, "How the model writes boxes. Default: by its family.", (*FORMATS,))

    name = "refcoco"
    hub_id = "lmms-lab/RefCOCO"
    split = "val"
    columns = ("question_id", "answer", "bbox")
    max_new_tokens = 64
    scorings = ("generate",)
    objects_to = BOX_OUTSIDE
    source = "accuracy at IoU 0.5 as in the RefCOCO papers; further numbers as in lmms-eval's refcoco_bbox_rec"

    def __init__(self, options: Options | None = None, *, model_type: str = "") -> None:
        super().__init__(options, model_type=model_type)
        self.format_name = choose_format(self.options.box_format, model_type)
        self.format = FORMATS[self.format_name]

    def misfit(self, reports_frames: Callable[[], bool]) -> ArgumentError | None:
        if self.format_name not in NEED_FRAMES or reports_frames():
            return None
        needed = "be another one, since the model's processor does not report the resized picture's grid"
        return ArgumentError("box_format", self.format_name, needed)

    def settings(self) -> dict[str, Any]:
        return {"box_format": self.format_name}

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Sample], list[Skip]]:
        samples: list[Sample] = []
        skips: list[Skip] = []
        seen: dict[tuple[Any, ...], int] = {}
        for number, row in enumerate(rows):
            key, expressions, box = str(row["question_id"]), row["answer"], row["bbox"]
            expressions = [expressions] if isinstance(expressions, str) else expressions
            if not isinstance(expressions, list) or not all(isinstance(e, str) for e in expressions):
                raise ValueError(f"row {number}: answer is {expressions!r}, needed a list of expressions")
            if not isinstance(box, list) or len(box) != 4 or not all(_finite(v) for v in box):
                raise ValueError(f"row {number}: bbox is {box!r}, needed x, y, width, height in pixels")
            same = seen.setdefault((key, *expressions, *box), number)
            if same != number:  # an object with the same expressions twice would weigh double
                skips.append(Skip(f"row {number}", f"repeats row {same}", "repeated row"))
                continue
            x, y, width, height = box
            if width <= 0 or height <= 0:
                skips.append(Skip(f"row {number}", f"bbox {box} has no area", NO_BOX_AREA))
                continue
            if max(x + width, y + height) <= 1:
                skips.append(Skip(f"row {number}", f"bbox {box} is not in pixels", BOX_FRACTIONS))
                continue
            if not expressions:
                skips.append(Skip(f"row {number}", "answer has no expression", NO_EXPRESSION))
            for turn, expression in enumerate(expressions):
                if not expression.strip():
                    skips.append(Skip(f"row {number}", f"expression {turn} is empty", NO_EXPRESSION))
                    continue
                about = {
                    "question_id": row["question_id"],
                    "expression": expression.strip(),
                    "box": [x, y, x + width, y + height],
                }
                prompt = self.format.prompt.format(expression.strip()) + self.words_after
                samples.append(Sample(f"{number}/{turn}", number, prompt, f"{number}/{turn}", about=about))
        return samples, skips

    def objection(self, sample: Sample, size: tuple[int, int]) -> str | None:
        x1, y1, x2, y2 = sample.about["box"]
        if x1 < -SLACK or y1 < -SLACK or x2 > size[0] + SLACK or y2 > size[1] + SLACK:
            return f"box {sample.about['box']} lies outside of the picture's {size[0]} x {size[1]} pixels"
        return None

    def judge(self, record: Record) -> dict[str, Any]:
        box = self.format.read(record["reply"], record["image_size"], record["frame"])
        iou = 0.0 if box is None else float(box_iou(box, record["box"]))
        return {"prediction": None if box is None else list(box), "iou": iou, "correct": iou >= RIGHT_IOU}

    def scores(self, records: Sequence[Record]) -> dict[str, Any]:
        overall = {"accuracy": share([r["correct"] for r in records])}
        for threshold in THRESHOLDS:
            overall[f"accuracy_iou_{threshold}"] = share([r["iou"] >= threshold for r in records])
        overall["mean_iou"] = sum(r["iou"] for r in records) / len(records)
        overall["center_accuracy"] = share([_center_inside(r["prediction"], r["box"]) for r in records])
        return {
            "overall": overall | {"correct": sum(r["correct"] for r in records), "total": len(records)},
            "unparsed": sum(r["prediction"] is None for r in records),
            "box_format_mismatch": box_format_mismatch(self.format_name, records, RIGHT_IOU),
        }

    def remarks(self, scores: Mapping[str, Any]) -> list[str]:
        mismatch = scores["box_format_mismatch"]
        return [] if mismatch is None else [describe_mismatch(mismatch)]

    def headline(self, scores: Mapping[str, Any]) -> list[tuple[str, Any]]:
        overall = scores["overall"]
        return [("accuracy at IoU 0.5", overall["accuracy"]), ("mean IoU", overall["mean_iou"])]


class RefCOCOPlus(RefCOCO):
    """Expressions without words of place."""

    name = "refcoco+"
    hub_id = "lmms-lab/RefCOCOplus"


class RefCOCOg(RefCOCO):
    """Longer expressions."""

    name = "refcocog"
    hub_id = "lmms-lab/RefCOCOg"


def _center_inside(prediction: Sequence[float] | None, box: Sequence[float]) -> bool:
    """Whether the centre of the prediction lies in the box."""
    if prediction is None:
        return False
    x, y = (prediction[0] + prediction[2]) / 2, (prediction[1] + prediction[3]) / 2
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
