"""Heads whose outputs the picture changes most, made stronger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.base.scalars import is_integer, kind, number
from sar_fast.method.values import Statistics
from sar_fast.method.weighting.heads import check_finite, heads_kept, largest


class ReinforceHeads:
    """Vision-aware head reinforcement, VHR (He et al., ACL 2025, arXiv 2412.13949).

    In each layer the ``share`` of the heads with the largest divergence, how far the picture moves a head's output
    (:func:`~.measure.head_divergence.head_divergence`), weighs ``factor``, the others 1: for every query, of
    the prompt and of what is generated, as the paper's heads are chosen once. With ``share=0.5`` these are the heads
    above the layer's median, the paper's. Heads with divergence 0 are never among them; of equal heads those with the
    lower index are. The weights are constants.

    The paper applies it to the second layer and the last 14 (LLaVA) or 18 (InstructBLIP), and measures a layer after
    the earlier ones are reinforced.

    Args:
        divergence: layer index, as the keys of ``handle.stats`` -> (B, H) for these samples, or (H,) for any; tensors
            or lists, finite and >= 0. A key may be a text ("3"), as JSON has it.
        share: of a layer's heads, in (0, 1]; rounded down, one at least.
        factor: their weight, any finite number; the paper's alpha.

    Raises:
        TypeError, ValueError: naming the option. In a call: a layer that ``divergence`` lacks, another number of heads
            or samples than it has. A call without a layer index needs the divergence of one layer.
    """

    needs_statistics = False

    def __init__(
        self,
        divergence: Mapping[int, Tensor | Sequence[float] | Sequence[Sequence[float]]],
        share: float = 0.5,
        factor: float = 2.0,
    ) -> None:
        self.divergence = _read(divergence)
        share = number("share", share, "a number in (0, 1]")
        if not 0 < share <= 1:
            raise ArgumentError("share", repr(share), "be in (0, 1]")
        self.share, self.factor = float(share), check_finite("factor", factor)
        self._reinforced = {layer: self._choose(x) for layer, x in self.divergence.items()}

    def _choose(self, divergence: Tensor) -> Tensor:
        x = divergence if divergence.dim() == 2 else divergence[None]
        return largest(x, heads_kept(self.share, x.shape[-1])) & (x > 0)

    def __call__(self, statistics: Statistics, layer: int | None = None) -> Tensor:
        """c (B, H), or (1, H) where the divergence is any sample's, in the statistics' dtype."""
        if layer is None and len(self._reinforced) == 1:
            (layer,) = self._reinforced
        known = ", ".join(map(str, sorted(self._reinforced)))
        if layer is None:
            raise ArgumentError(
                "weighting", f"ReinforceHeads with layers {known}", "have no layers for a call without a layer index"
            )
        if layer not in self._reinforced:
            raise ArgumentError(
                "weighting", f"ReinforceHeads with layers {known}", f"have a divergence of layer {layer}"
            )
        reinforced, (batch, heads) = self._reinforced[layer], statistics.av.shape
        if reinforced.shape[1] != heads or reinforced.shape[0] not in (1, batch):
            raise ArgumentError(
                "weighting",
                f"ReinforceHeads with {tuple(self.divergence[layer].shape)} in layer {layer}",
                f"have a divergence of {heads} heads, for each of the {batch} samples or for any",
            )
        one = torch.ones_like(statistics.av[:1, :1])
        return torch.where(reinforced.to(one.device), self.factor * one, one)

    def options(self) -> dict[str, object]:
        divergence = {str(layer): x.tolist() for layer, x in self.divergence.items()}
        return {"divergence": divergence, "share": self.share, "factor": self.factor}

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.options() == other.options()

    def __hash__(self) -> int:
        return hash((type(self), tuple(sorted(self.divergence)), self.share, self.factor))

    def __repr__(self) -> str:
        layers = sorted(self.divergence)
        return f"ReinforceHeads(divergence of layers {layers}, share={self.share}, factor={self.factor})"


def _read(divergence: object) -> dict[int, Tensor]:
    """Layer -> (B, H) or (H,) constants."""
    if not isinstance(divergence, Mapping):
        raise ArgumentTypeError("divergence", kind(divergence), "be a mapping from layer indices to tensors")
    if not divergence:
        raise ArgumentError("divergence", "none", "have at least one layer")
    found = {}
    for key, values in divergence.items():
        layer = int(key) if isinstance(key, str) and key.isdecimal() else key
        if not is_integer(layer) or layer < 0:
            raise ArgumentError("divergence", repr(key), "have layer indices >= 0 as keys")
        if layer in found:
            raise ArgumentError("divergence", f"{key!r} twice, as a text and as an int", "have each layer once")
        found[layer] = _table(f"divergence[{key!r}]", values)
    return found


def _table(name: str, values: object) -> Tensor:
    try:
        x = values.detach() if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(name, f"{kind(values)} ({error})", "be a tensor or lists of numbers") from error
    if not x.is_floating_point():
        raise ArgumentTypeError(name, x.dtype, "be floating point")
    if x.dim() not in (1, 2) or x.numel() == 0:
        raise ArgumentError(name, tuple(x.shape), "have shape (batch, heads) or (heads,)")
    if not bool((x.isfinite() & (x >= 0)).all()):
        raise ArgumentError(name, f"values from {x.min().item()} to {x.max().item()}", "be finite and >= 0")
    return x
