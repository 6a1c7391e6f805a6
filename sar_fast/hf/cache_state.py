"""Decode state on the KV cache: it lives, is reordered, repeated, cropped, reset and copied with the cache.

``attach`` turns a cache into an instance of a subclass of its own class that carries a :class:`CacheState`; caches of
other generations, and the model, know nothing of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sar_fast.base.errors import ArgumentError
from sar_fast.config import PAPER_OPTIONS, SARConfig
from sar_fast.method.state import SARState

RULE = (*PAPER_OPTIONS, "weighting")  # fields of the config that make one rule
SAME_CONFIG = ("activation_layer_k", *RULE, "row_statistics", "text_queries", "prior_source", "decode")  # for one state


@dataclasses.dataclass
class Switch:
    """Whether weights go on from the state of a cache that came from here; one for a model's caches and copies."""

    on: bool = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Switch:
        return self


@dataclasses.dataclass
class CacheState:
    """What decoding needs of the tokens before: roles over the cached positions, and each layer's running state.

    Attributes:
        visual_mask: (B, L) bool, visual positions up to the last call that brought any.
        norms: (B, L) fp32, feature norms of those positions, 0 elsewhere.
        prior: (B, L) fp32, their share of the row's sum; None = to be found again.
        layers: layer index -> state.
        snapshots: per layer, (cache length, state) after every call that changed it, for cropping.
        packed: the cache was filled by packed sequences, and cannot be continued.
        length: positions that passes under SAR filled, with pictures or without; not counted on static caches.
        unseen: positions came while SAR was off; what tells on static caches.
        decode: ``SARConfig.decode`` of the layers' states.
        config: the options that it was filled under, once known.
        switch: off once SAR was removed from the model that filled it.
    """

    visual_mask: Tensor | None = None
    norms: Tensor | None = None
    prior: Tensor | None = None
    layers: dict[int, SARState] = dataclasses.field(default_factory=dict)
    snapshots: dict[int, list[tuple[int, SARState]]] = dataclasses.field(default_factory=dict)
    packed: bool = False
    length: int = 0
    unseen: bool = False
    decode: str = "running"
    config: SARConfig | None = None
    switch: Switch = dataclasses.field(default_factory=Switch)

    def belong_to(self, config: SARConfig, switch: Switch) -> None:
        """The pass that starts runs under ``config``; ``ValueError`` if visual tokens came under another."""
        self.switch = switch
        if config is self.config:
            return
        if self.config is not None and self.visual_mask is not None:
            same = () if self.config.rule != config.rule else RULE  # however it is written
            differs = lambda name: name not in same and getattr(self.config, name) != getattr(config, name)
            other = {name: (getattr(self.config, name), getattr(config, name)) for name in filter(differs, SAME_CONFIG)}
            if other:
                filled, now = (", ".join(f"{n}={both[i]!r}" for n, both in other.items()) for i in (0, 1))
                raise ArgumentError(
                    "past_key_values",
                    f"one filled under SARConfig({filled}), continued under SARConfig({now})",
                    "be continued with the same options; or a new cache, and the whole prompt",
                )
        self.config = config

    def set_visual(self, visual_mask: Tensor, norms: Tensor, prior: Tensor | None = None) -> None:
        """The visual positions (B, L), their norms, and what the prior is if that is known."""
        self.visual_mask, self.norms, self.prior = visual_mask, norms, prior

    def leave_inference_mode(self) -> None:
        """What was made under ``torch.inference_mode`` may not be written, nor saved for backward, outside it.

        To be called before a pass; the newest tensors tell, so that snapshots are not looked at in every step.
        """
        newest = [self.visual_mask, *(state.av_sum for state in self.layers.values())]
        if torch.is_inference_mode_enabled() or not any(x is not None and x.is_inference() for x in newest):
            return
        self._replace(lambda x: x.clone() if x.is_inference() else x, every_snapshot=True)

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows ``rows`` (int64), in that order; of the snapshots, only the last.

        Beam search reorders after every token: selecting in all of them would make it quadratic.
        """
        self._replace(lambda x: x.index_select(0, rows.to(x.device)), every_snapshot=False)

    def _replace(self, change: Callable[[Tensor], Tensor], *, every_snapshot: bool) -> None:
        other = lambda state: SARState(*map(change, state.tensors()))
        if self.visual_mask is not None:
            self.visual_mask, self.norms = change(self.visual_mask), change(self.norms)
            self.prior = None if self.prior is None else change(self.prior)
        self.layers = {i: other(s) for i, s in self.layers.items()}
        for i, log in self.snapshots.items():
            before = [(n, other(s)) for n, s in log[:-1]] if every_snapshot else []
            self.snapshots[i] = [*before, (log[-1][0], self.layers[i])]

    def clear(self) -> None:
        """Forget everything, as a reset cache has."""
        self.__init__()

    def store(self, layer: int, state: SARState, length: int | None, decode: str) -> None:
        """Set a layer's state after a call under ``decode`` that brought a cache which grows to ``length``.

        Where it does not grow, and ``length`` is None, the tensors are updated in place, so that a compiled or captured
        decode step sees one state; such caches cannot be cropped.
        """
        self.decode = decode
        old = self.layers.get(layer)
        if length is not None:
            self.layers[layer] = state
            if decode != "step":
                self._keep_snapshot(layer, state, length)
        elif old is not None and old.av_sum.shape == state.av_sum.shape:
            torch._foreach_copy_(old.tensors(), state.tensors())  # one launch
        else:  # others may hold the call's own tensors
            self.layers[layer] = SARState(*(x.clone() for x in state.tensors()))

    def _keep_snapshot(self, layer: int, state: SARState, length: int) -> None:
        log = self.snapshots.setdefault(layer, [])
        while log and log[-1][0] >= length:  # a recomputed call replaces its own entry
            log.pop()
        log.append((length, state))

    def check_crop(self, length: int) -> None:
        """``ValueError`` unless the layers' states are known where the cache holds ``length`` positions."""
        if not length or not self.snapshots or not self._changes(length):
            return
        ends = [n for n, _ in next(iter(self.snapshots.values()))]  # all layers'
        before = max((n for n in ends if n <= length), default=0)
        if self.decode == "running" and length != before:
            raise ArgumentError(
                "cache.crop's length",
                length,
                (
                    f"be the end of a call, one of {ends}: SAR's running sums are known there; "
                    'SARConfig(decode="prompt") or "step" keep none'
                ),
            )
        if self.decode == "prompt" and bool(self.visual_mask[:, before:length].any()):
            raise ArgumentError(
                "cache.crop's length",
                length,
                f"be {before} or less, or keep all pictures of a call, as its frozen weights are of them all",
            )

    def _changes(self, length: int) -> bool:
        """Whether cropping to ``length`` changes the layers' states: frozen weights go with their pictures alone."""
        if self.decode == "running":
            return True
        cut = self.visual_mask is not None and self.visual_mask.shape[1] > length
        return self.decode == "prompt" and cut and bool(self.visual_mask[:, length:].any())

    def crop(self, length: int) -> None:
        """Go back to the state when the cache held ``length`` positions, which :meth:`check_crop` allows."""
        if length == 0:
            self.clear()
            return
        self.length = min(self.length, length)
        if self._changes(length):
            self.snapshots = {i: [entry for entry in log if entry[0] <= length] for i, log in self.snapshots.items()}
            self.layers = {i: log[-1][1] for i, log in self.snapshots.items() if log}
            self.snapshots = {i: log for i, log in self.snapshots.items() if log}
        if self.visual_mask is not None and self.visual_mask.shape[1] > length:
            self.visual_mask, self.norms = self.visual_mask[:, :length], self.norms[:, :length]
            self.prior = None


class _SARCacheMixin:
    """Cache methods that add or move rows or positions, extended to the SAR state; before the cache's class."""

    sar_state: CacheState

    def __reduce__(self) -> tuple:
        """Classes made at run time cannot be found by name: a pickle has the cache's own, and takes the state along."""
        return _restore, (type(self).__mro__[2],), self.__dict__

    def update(self, *args: Any, **kwargs: Any) -> Any:
        if not self.sar_state.switch.on:
            self.sar_state.unseen = True
        return super().update(*args, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        rows = self._sar_rows(beam_idx)
        super().reorder_cache(beam_idx)
        self._sar_select(rows)

    def batch_select_indices(self, indices: Any) -> None:
        rows = self._sar_rows(indices)
        super().batch_select_indices(indices)
        self._sar_select(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        rows = self._sar_rows(slice(None))
        self._sar_select(None if rows is None else rows.repeat_interleave(repeats))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """As the cache's own: negative = how many to drop; positive = how many stay, where a version takes that."""
        state, now = self.sar_state, int(self.get_seq_length())
        if not state.switch.on:  # nobody will ask for the sums again
            state.clear()
        (tokens,) = (*args, *kwargs.values())
        state.check_crop(min(now, tokens) if tokens > 0 else now + tokens)
        super().crop(*args, **kwargs)
        state.crop(self.get_seq_length())

    def reset(self) -> None:
        super().reset()
        self.sar_state.clear()

    def _sar_rows(self, indices: Any) -> Tensor | None:
        """The rows that an index of the batch dimension takes, int64; None where the state says nothing of rows."""
        mask = self.sar_state.visual_mask
        if mask is None:
            return None
        indices = indices.to(mask.device) if isinstance(indices, Tensor) else indices
        return torch.arange(mask.shape[0], device=mask.device)[indices]

    def _sar_select(self, rows: Tensor | None) -> None:
        if rows is not None:
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
