"""Whether replies write boxes in the format that they are read in, or rather in another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sar_fast.lab.io.boxes import FORMATS, NEED_FRAMES, Box, Corners, Size, box_iou

GAIN = 0.1  # of all replies: so many more boxes have to be right in another format before it is named
SLACK = 0.05  # of the picture's sides: how far a plausible box may reach beyond them
UNITS = ("fraction", "percent", "thousandths", "pixels", "resized_pixels")  # formats that differ in these alone
ORDERS: dict[str, Corners] = {  # in which a model may write, and no format reads
    "y1, x1, y2, x2": lambda y1, x1, y2, x2: (x1, y1, x2, y2),
    "x, y, width, height": lambda x, y, width, height: (x, y, x + width, y + height),
    "centre x, centre y, width, height": lambda x, y, width, height: (
        x - width / 2, y - height / 2, x + width / 2, y + height / 2
    ),
}  # fmt: skip


def box_format_mismatch(name: str, records: Sequence[Mapping[str, Any]], right_iou: float) -> dict[str, Any] | None:
    """What the formats make of the replies, if ``name`` does not seem to be theirs; None if it does.

    It does not if another format or another order makes clearly more boxes right, or if most of its boxes are not
    plausible: not in the picture, or smaller than a pixel.

    Args:
        name: the format in force.
        records: with ``reply``, ``image_size``, ``frame`` and ``box``, the true (x1, y1, x2, y2).
        right_iou: intersection over union from which on a box is right.

    Returns:
        ``in_force``; ``boxes``: number of replies with a box in any format; ``numbers``: [smallest, largest] in them;
        ``plausible`` (number) and ``accuracy`` (percent of all replies) by format; ``better``: formats that fit, best
        and equally good ones, maybe none; ``order``: ``units``, ``order`` and ``accuracy`` if the numbers are clearly
        better read in an order that no format has, else None.
    """
    names = [n for n in FORMATS if n not in NEED_FRAMES or all(r["frame"] is not None for r in records)]
    numbers = {number: found for number, r in enumerate(records) if (found := _numbers(names, r["reply"]))}
    if not numbers:
        return None
    written = [records[number] for number in numbers]
    plausible = {n: sum(_is_plausible(box, r["image_size"]) for r, box in _read(written, n)) for n in names}
    right = {n: _right(written, right_iou, n) for n in names}
    clearly = GAIN * len(records)
    merit = {n: (right[n] if right[n] >= clearly else 0, plausible[n]) for n in names}  # a few may be right by chance
    best = max(merit.values())
    order = _order(written, right_iou, names, max(right.values()) + max(2, clearly))
    trusted = 2 * plausible[name] >= len(numbers)
    if trusted and best[0] - right[name] < clearly and order is None:
        return None
    fits = order is None and best > merit[name] and (best[0] or 2 * best[1] >= len(numbers))
    values = [value for found in numbers.values() for value in found]
    percent = lambda count: 100.0 * count / len(records)
    return {
        "in_force": name,
        "boxes": len(numbers),
        "numbers": [min(values), max(values)],
        "plausible": plausible,
        "accuracy": {n: percent(right[n]) for n in names},
        "better": [n for n in names if merit[n] == best] if fits else [],
        "order": order and {**order, "accuracy": percent(order["accuracy"])},
    }


def describe_mismatch(mismatch: Mapping[str, Any]) -> str:
    """The warning for what :func:`box_format_mismatch` found."""
    name, better, boxes = mismatch["in_force"], mismatch["better"], mismatch["boxes"]
    low, high = mismatch["numbers"]
    of = lambda n: f"{mismatch['plausible'][n]} of {boxes} boxes plausible, accuracy {mismatch['accuracy'][n]:.2f}"
    found = f"replies do not seem to write boxes as box_format {name}: numbers from {low:g} to {high:g}, {of(name)}"
    if order := mismatch["order"]:
        read = f"read as {order['order']} in the units of {order['units']}, accuracy {order['accuracy']:.2f}"
        return f"{found}; {read}: no box_format has this order"
    if not better:
        return f"{found}; no other box_format fits"
    alike = f" ({', '.join(better[1:])} fit{'s' if len(better) == 2 else ''} as well)" if better[1:] else ""
    return f"{found}; with box_format {better[0]}: {of(better[0])}{alike}"


def _read(
    records: Sequence[Mapping[str, Any]], name: str, corners: Corners | None = None
) -> Iterator[tuple[Mapping[str, Any], Box]]:
    """(record, box) of those in which a format finds one."""
    for record in records:
        box = FORMATS[name].read(record["reply"], record["image_size"], record["frame"], corners)
        if box is not None:
            yield record, box


def _right(records: Sequence[Mapping[str, Any]], right_iou: float, name: str, corners: Corners | None = None) -> int:
    return sum(bool(box_iou(box, r["box"]) >= right_iou) for r, box in _read(records, name, corners))


def _order(
    records: Sequence[Mapping[str, Any]], right_iou: float, names: Sequence[str], least: float
) -> dict[str, Any] | None:
    """``units``, ``order`` and ``accuracy`` (a number) of the best order, if it makes ``least`` boxes right."""
    tried = [
        {"units": units, "order": order, "accuracy": _right(records, right_iou, units, corners)}
        for order, corners in ORDERS.items()
        for units in UNITS
        if units in names
    ]
    best = max(tried, key=lambda reading: reading["accuracy"])
    return best if best["accuracy"] >= least else None


def _numbers(names: Sequence[str], reply: str) -> list[float]:
    """The numbers of a reply's first box, in any format."""
    found = next(filter(None, (FORMATS[name].pattern.search(reply) for name in names)), None)
    return [float(number) for number in found.groups()] if found else []


def _is_plausible(box: Box, size: Size) -> bool:
    x1, y1, x2, y2 = box
    x, y = SLACK * size[0], SLACK * size[1]
    inside = x1 >= -x and y1 >= -y and x2 <= size[0] + x and y2 <= size[1] + y
    return inside and x2 - x1 >= 1 and y2 - y1 >= 1
