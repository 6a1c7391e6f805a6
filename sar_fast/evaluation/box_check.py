"""Whether replies write boxes in the format that they are read in, or rather in another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sar_fast.evaluation.boxes import FORMATS, NEED_FRAMES, Box, Size
from sar_fast.miniature.questions import box_iou

GAIN = 0.1  # of all replies: so many more boxes have to be right in another format before it is named
SLACK = 0.05  # of the picture's sides: how far a plausible box may reach beyond them


def box_format_mismatch(name: str, records: Sequence[Mapping[str, Any]], right_iou: float) -> dict[str, Any] | None:
    """What the formats make of the replies, if ``name`` does not seem to be theirs; None if it does.

    It does not if another format makes clearly more boxes right, or if most of its boxes are not plausible: not in the
    picture, or smaller than a pixel.

    Args:
        name: the format in force.
        records: with ``reply``, ``image_size``, ``frame`` and ``box``, the true (x1, y1, x2, y2).
        right_iou: intersection over union from which on a box is right.

    Returns:
        ``in_force``; ``boxes``: number of replies with a box in any format; ``numbers``: [smallest, largest] in them;
        ``plausible`` (number) and ``accuracy`` (percent of all replies) by format; ``better``: formats that fit, best
        and equally good ones, maybe none.
    """
    names = [n for n in FORMATS if n not in NEED_FRAMES or all(r["frame"] is not None for r in records)]
    numbers = {number: found for number, r in enumerate(records) if (found := _numbers(names, r["reply"]))}
    if not numbers:
        return None
    plausible, right = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for record in (records[number] for number in numbers):
        for n in names:
            box = FORMATS[n].read(record["reply"], record["image_size"], record["frame"])
            plausible[n] += box is not None and _is_plausible(box, record["image_size"])
            right[n] += box is not None and box_iou(box, tuple(record["box"])) >= right_iou
    clearly = GAIN * len(records)
    merit = {n: (right[n] if right[n] >= clearly else 0, plausible[n]) for n in names}  # a few may be right by chance
    best = max(merit.values())
    trusted = 2 * plausible[name] >= len(numbers)
    if trusted and best[0] - right[name] < clearly:
        return None
    fits = best > merit[name] and (best[0] or 2 * best[1] >= len(numbers))
    values = [value for found in numbers.values() for value in found]
    return {
        "in_force": name,
        "boxes": len(numbers),
        "numbers": [min(values), max(values)],
        "plausible": plausible,
        "accuracy": {n: 100.0 * right[n] / len(records) for n in names},
        "better": [n for n in names if merit[n] == best] if fits else [],
    }


def describe_mismatch(mismatch: Mapping[str, Any]) -> str:
    """The warning for what :func:`box_format_mismatch` found."""
    name, better, boxes = mismatch["in_force"], mismatch["better"], mismatch["boxes"]
    low, high = mismatch["numbers"]
    of = lambda n: f"{mismatch['plausible'][n]} of {boxes} boxes plausible, accuracy {mismatch['accuracy'][n]:.2f}"
    found = f"replies do not seem to write boxes as --box_format {name}: numbers from {low:g} to {high:g}, {of(name)}"
    if not better:
        return f"{found}; no other --box_format fits"
    alike = f" ({', '.join(better[1:])} read alike, with other prompts)" if better[1:] else ""
    return f"{found}; with --box_format {better[0]}: {of(better[0])}{alike}"


def _numbers(names: Sequence[str], reply: str) -> list[float]:
    """The numbers of a reply's first box, in any format."""
    found = next(filter(None, (FORMATS[name].pattern.search(reply) for name in names)), None)
    return [float(number) for number in found.groups()] if found else []


def _is_plausible(box: Box, size: Size) -> bool:
    x1, y1, x2, y2 = box
    x, y = SLACK * size[0], SLACK * size[1]
    inside = x1 >= -x and y1 >= -y and x2 <= size[0] + x and y2 <= size[1] + y
    return inside and x2 - x1 >= 1 and y2 - y1 >= 1
