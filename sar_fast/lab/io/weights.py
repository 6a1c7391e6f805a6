"""Which model a result is of, by content: what tells it from others that lay in the same place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sar_fast.lab.io.model_source import MINIATURE_PATH, ModelSource
from sar_fast.lab.io.stamps import model_stamp


def model_facts(source: ModelSource) -> dict[str, Any]:
    """Name and weights, by content; of an adapter its base's too. A folder goes by its last name, as it may move."""
    facts = _named(source.name, source.adapter or source.weights)
    if source.adapter is None:
        return facts
    base = _named(source.base_name, source.weights)
    return facts | {"base_model": base["model"], "base_weights": base["weights"]}


def _named(name: str, place: str) -> dict[str, Any]:
    weights = weights_stamp(place)
    return {"model": Path(name).name if weights else name, "weights": weights}


def weights_stamp(name: str) -> str | None:
    """What tells a folder's model from others that lay there before, by content; None for a hub id."""
    folder = MINIATURE_PATH if name == "miniature" else Path(name).expanduser()
    return model_stamp(folder) if folder.is_dir() else None
