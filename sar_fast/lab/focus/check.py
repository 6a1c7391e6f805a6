"""Rows of a grounding table, looked at one by one before an analysis does: ``sar-fast data check``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sar_fast.base.wording import cut
from sar_fast.lab.benchmark.tasks.refcoco import SLACK
from sar_fast.lab.focus.dataset import to_sample
from sar_fast.lab.focus.samples import DatasetMasks, GroundingSample, box_problem, check_size
from sar_fast.lab.io.records import DEFAULT_COLUMNS
from sar_fast.lab.io.skips import SampleSkipped

OWN = ("object_prompt", "bbox")  # columns that chat records do not have


def is_grounding(row: Any, columns: Mapping[str, str]) -> bool:
    """Whether a table whose first row is this one is a grounding table, not one of chat records."""
    if not isinstance(row, Mapping):
        return False
    tried = (names for layout in DEFAULT_COLUMNS.values() for role, names in layout.items() if role != "images")
    if not set().union(*tried).isdisjoint(row) or not {"messages", "prompt", "response"}.isdisjoint(columns):
        return False
    return any(columns.get(name, name) in row for name in OWN)


def grounding_verdicts(
    rows: Iterable[tuple[int, Any]], columns: Mapping[str, str], media: Path
) -> Iterator[dict[str, Any]]:
    """Per row: ``record`` (its number), ``id``, ``reason`` ("" if it is good) and what it counts as."""
    seen: dict[str, int] = {}
    for number, row in rows:
        verdict = {"record": number, "id": "", "reason": "", "images": 1, "boxes": 0, "masks": 0}
        try:
            sample = to_sample(row, number, "row", columns, media)
        except ValueError as error:
            verdict["reason"] = str(error).removeprefix("row").lstrip(": ")
        else:
            first = seen.setdefault(sample.id, number)
            twice = f"id {sample.id!r} is in record {first} already" if first != number else ""
            verdict["reason"] = twice or _problem(sample)
            verdict |= {
                "id": "" if sample.id == str(number) else cut(sample.id, 100),
                "boxes": int(sample.bbox is not None),
                "masks": int(sample.mask is not None),
            }
        yield verdict


def _problem(sample: GroundingSample) -> str:
    try:
        width, height = check_size(sample.image).size
        if sample.mask is None and sample.bbox is None:
            return "neither bbox nor mask nor segmentation"
        DatasetMasks().mask(sample)
    except SampleSkipped as problem:
        return str(problem)
    if sample.bbox is None:
        return ""
    if problem := box_problem(sample.bbox, (width, height)):  # of one that has a mask too
        return f"{problem}: {list(sample.bbox)}"
    x1, y1, x2, y2 = sample.bbox
    if x1 < -SLACK or y1 < -SLACK or x2 > width + SLACK or y2 > height + SLACK:
        return f"bbox {list(sample.bbox)} lies outside of the picture's {width} x {height} pixels"
    return ""
