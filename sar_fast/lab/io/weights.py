"""Which model a result is of, by content: what tells it from others that lay in the same place."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
        digest.update(_form(name, tensor) + _sample(tensor))
    return digest.hexdigest()


def frozen_stamp(model: nn.Module) -> str:
    """A hash of what a training leaves as it is: the values of frozen tensors as of :func:`live_stamp`; of parameters
    that learn, name, shape and dtype."""
    digest = hashlib.blake2b(type(model).__name__.encode(), digest_size=16)
    learning = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(_form(name, tensor) + (b"" if name in learning else _sample(tensor)))
    return digest.hexdigest()


def _form(name: str, tensor: Tensor) -> bytes:
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode()


def _sample(tensor: Tensor) -> bytes:
    """Up to 4,096 elements spread evenly, as bytes."""
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // SAMPLED)].contiguous()
    return some.view(torch.uint8).cpu().numpy().tobytes()
