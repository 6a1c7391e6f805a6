"""Decode state on the KV cache: it lives, is reordered, repeated, cropped, reset and copied with the cache.

``attach`` turns a cache into an instance of a subclass of its own class that carries a :class:`CacheState`; caches of
other generations, and the model, know nothing of it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from sar_fast.types import SARState


@dataclasses.dataclass
class CacheState:
    """What decoding needs of the tokens before: roles over the cached positions, and each layer's running state.

    Attributes:
        visual_mask: (B, L) bool, visual positions up to the last call that brought any.
        norms: (B, L) fp32, feature norms of those positions, 0 elsewhere; the prior is their share of the row's sum.
        layers: layer index -> state.
        snapshots: per layer, (cache length, state) after every call, so that cropping to a call's end is exact.
        packed: the cache was filled by packed sequences, and cannot be continued.
        length: positions that passes under SAR filled, with pictures or without; not counted on static caches.
    """

    visual_mask: Tensor | None = None
    norms: Tensor | None = None
    layers: dict[int, SARState] = dataclasses.field(default_factory=dict)
    snapshots: dict[int, list[tuple[int, SARState]]] = dataclasses.field(default_factory=dict)
    packed: bool = False
    length: int = 0

    def clear(self) -> None:
        """Forget everything, as a reset cache has."""
        self.__init__()

    def store(self, layer: int, state: SARState, length: int, *, keep_snapshots: bool) -> None:
        """Set a layer's state after a call that brought the cache to ``length``.

        Without snapshots the tensors are updated in place, so that a compiled or captured decode step sees one state.
        """
        old = self.layers.get(layer)
        if not keep_snapshots and old is not None and old.av_sum.shape == state.av_sum.shape:
            for kept, new in zip(old.tensors(), state.tensors()):
                kept.copy_(new)
            return
        self.layers[layer] = state
        if not keep_snapshots:
            return
        log = self.snapshots.setdefault(layer, [])
        while log and log[-1][0] >= length:  # a recomputed call replaces its own entry
            log.pop()
        log.append((length, state))

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows ``rows`` (int64), in that order; of the snapshots, only the last.

        Beam search reorders after every token: selecting in all of them would make it quadratic.
        """
        self.visual_mask = self.visual_mask.index_select(0, rows.to(self.visual_mask.device))
        self.norms = self.norms.index_select(0, rows.to(self.norms.device))
        self.layers = {i: s.index_select(rows) for i, s in self.layers.items()}
        self.snapshots = {i: [(log[-1][0], self.layers[i])] for i, log in self.snapshots.items()}

    def crop(self, length: int) -> None:
        """Go back to the state when the cache held ``length`` positions."""
        if length == 0:
            self.clear()
            return
        self.length = min(self.length, length)
        for layer, log in self.snapshots.items():
            kept = [entry for entry in log if entry[0] <= length]
            if not kept or kept[-1][0] != length:
                ends = [n for n, _ in log]
                raise ValueError(
                    f"cache.crop: SAR's running sums are known at the ends of calls, {ends}, not at length {length}; "
                    'crop to one of those, or use SARConfig(decode="prompt") or "step", which keep no sums'
                )
            self.snapshots[layer] = kept
            self.layers[layer] = kept[-1][1]
        if self.visual_mask is not None and self.visual_mask.shape[1] > length:
            self.visual_mask, self.norms = self.visual_mask[:, :length], self.norms[:, :length]


class _SARCacheMixin:
    """Cache methods that move batch rows or positions, extended to the SAR state. Mixed in before the cache's class."""

    sar_state: CacheState

    def __reduce__(self) -> tuple:
        """Classes made at run time cannot be found by name: a pickle has the cache's own, and takes the state along."""
        return _restore, (type(self).__mro__[2],), self.__dict__

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._sar_select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._sar_select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.sar_state.visual_mask is not None:
            rows = torch.arange(self.sar_state.visual_mask.shape[0], device=self.sar_state.visual_mask.device)
            self._sar_select(rows.repeat_interleave(repeats))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        self.sar_state.crop(self.get_seq_length())

    def reset(self) -> None:
        super().reset()
        self.sar_state.clear()

    def _sar_select(self, rows: Tensor) -> None:
        if self.sar_state.visual_mask is not None:
            self.sar_state.select(rows)


@functools.cache
def _with_state(cls: type) -> type:
    return type(f"SAR{cls.__name__}", (_SARCacheMixin, cls), {"__module__": cls.__module__})


def _restore(cls: type) -> Any:
    """An empty cache of class ``cls`` that carries SAR state, for ``pickle`` and ``copy`` to fill."""
    carrying = _with_state(cls)
    return carrying.__new__(carrying)


def attach(cache: Any, *, rows: bool = True) -> CacheState:
    """The cache's SAR state; a cache that has none yet gets an empty one.

    Args:
        rows: the state is to follow the cache's rows and positions. False while it says of no row that it has pictures,
            in a graph that is being traced, which cannot change the cache's class.
    """
    if state_of(cache) is None:
        cache.sar_state = CacheState()
    if rows and not isinstance(cache, _SARCacheMixin):
        cache.__class__ = _with_state(type(cache))
    return cache.sar_state


def state_of(cache: Any) -> CacheState | None:
    """The cache's SAR state if it carries one."""
    return getattr(cache, "sar_state", None)
