"""Original checkpoints: their tensors by name, renamed, and filled into a model of transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

Rules = Iterable[tuple[str, str | Callable[[re.Match], str]]]


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pth``, bare or under ``model``, without ``module.`` in front."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # unpickling fails in as many ways as there are files
        raise ValueError(f"{path} is not a checkpoint: {' '.join(str(error).split())[:200]}") from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no tensors by name, needed a state dict or one under 'model'")
    return {k.removeprefix("module."): v for k, v in content.items()}


def renamed(state: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """``state`` with every rule applied to every name, in order."""
    found = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = value
    return found


def fill(model: nn.Module, state: Mapping[str, Tensor], path: Path, absent: re.Pattern | None = None) -> None:
    """Loads ``state`` into ``model``; ``ValueError`` unless every tensor has its place and every place its tensor."""
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path} has tensors of other shapes: {' '.join(str(error).split())[:300]}") from error
    missing = [k for k in result.missing_keys if absent is None or not absent.search(k)]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{path} is another model: {len(missing)} tensors missing (first {missing[:1]}), "
            f"{len(result.unexpected_keys)} left over (first {list(result.unexpected_keys)[:1]})"
        )
