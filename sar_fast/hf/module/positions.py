"""Rotary positions of :class:`SARAttention`: its own, or those of the model that a module was taken from."""

from __future__ import annotations

import inspect
import sys
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split convention, of the first R of D channels.

    x (B, S, heads, D), cos and sin (B or 1, S, R) with R <= D -> (B, S, heads, D).
    """
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos[:, :, None] + torch.cat([-second, first], dim=-1) * sin[:, :, None]
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def half_split(x: Tensor, position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (B or 1, S, head_dim) in x's dtype, of positions (B or 1, S) with base ``theta``."""
    exponent = torch.arange(0, head_dim, 2, device=x.device, dtype=torch.float32) / head_dim
    angle = position_ids[..., None].float() * theta**-exponent  # [B or 1, S, D / 2]
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def check_embeddings(embeddings: Any, batch: int, length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) of a call, or a ``ValueError`` that says what they must be: nothing may broadcast by accident."""
    pair = isinstance(embeddings, (tuple, list)) and len(embeddings) == 2
    if pair and all(isinstance(t, Tensor) for t in embeddings):
        cos, sin = embeddings
        fits = cos.shape == sin.shape and cos.dim() == 3 and cos.shape[0] in (1, batch) and cos.shape[1] == length
        if fits and cos.shape[2] % 2 == 0 and 0 < cos.shape[2] <= head_dim:
            return cos, sin
        got = f"shapes {tuple(cos.shape)} and {tuple(sin.shape)}"
    else:
        got = type(embeddings).__name__
    raise ArgumentError(
        "position_embeddings",
        got,
        (f"be (cos, sin), each ({batch} or 1, {length}, R) with R even and at most head_dim, {head_dim}"),
    )


class ModelPositions:
    """The rotary embedding that a module's model would give it; no submodule, so that no cast reaches its frequencies.

    Args:
        rotary: the model's rotary embedding, or None where none was found: a call then needs ``position_embeddings``.
        layer_type: of the layer, for models whose layers rotate differently.
    """

    def __init__(self, rotary: nn.Module | None, layer_type: str | None) -> None:
        self.rotary, self.layer_type = rotary, layer_type

    def __call__(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if self.rotary is None:
            raise ArgumentError(
                "position_embeddings", "None", "be given: the rotary embedding of the module's model was not found"
            )
        if self.layer_type is None:
            return self.rotary(x, position_ids)
        return self.rotary(x, position_ids, self.layer_type)


def model_positions(module: nn.Module) -> ModelPositions:
    """The rotary embedding of the model that attention ``module`` belongs to, built from the module's config."""
    config = getattr(module, "config", None)
    for owner in type(module).__mro__:
        namespace = vars(sys.modules.get(owner.__module__, object))
        found = [c for n, c in namespace.items() if n.endswith("RotaryEmbedding") and isinstance(c, type)]
        if found:  # a file with several has one per tower: that of the text's is named as its attention is
            cls = max(found, key=lambda c: SequenceMatcher(None, c.__name__, type(module).__name__).ratio())
            try:
                rotary = cls(config)
            except (TypeError, AttributeError, KeyError, ValueError):
                break
            per_layer = "layer_type" in inspect.signature(cls.forward).parameters
            return ModelPositions(rotary, layer_type_of(module) if per_layer else None)
    return ModelPositions(None, None)


def layer_type_of(module: nn.Module) -> str | None:
    """What the module's config says of its layer, or None."""
    own = getattr(module, "layer_type", None)
    types = getattr(getattr(module, "config", None), "layer_types", None)
    return own if own is not None or types is None else types[module.layer_idx]
