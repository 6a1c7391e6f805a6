"""Which model a result is of, by content: what tells it from others that lay in the same place."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sar_fast.lab.io.model_source import MINIATURE, MINIATURE_PATH, ModelSource
from sar_fast.lab.io.stamps import model_stamp

SAMPLED = 4096  # elements of a tensor


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
    folder = MINIATURE_PATH if name == MINIATURE else Path(name).expanduser()
    return model_stamp(folder) if folder.is_dir() else None


def live_stamp(model: nn.Module) -> str:
    """A hash of a model in memory: its configuration, and of every tensor its name, shape, dtype and up to 4,096
    elements spread evenly."""
    digest = hashlib.blake2b(model.config.to_json_string().encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLED)].contiguous()
        digest.update(some.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
