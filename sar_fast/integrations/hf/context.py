"""What one forward pass knows: token roles, the prior, and the cache. Passed down as the keyword ``sar_context``."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import sys
import threading
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sar_fast.cache_state import CacheState
from sar_fast.config import SARConfig
from sar_fast.distributed import Shards
from sar_fast.integrations.hf.packing import Packing
from sar_fast.integrations.hf.refusals import refuse_features_not_finite
from sar_fast.roles import TokenRoles, roles_from_visual

HERE = os.path.dirname(__file__)


# What runs on this thread's stack, each attribute there once it was set (a graph loses writes over a class's default):
#   passes: ((context, its caller's frame or None), ...), forward passes, the innermost last
#   collecting: (base model whose vision call runs, norms of its patches) or None
#   drafts: (model, (1, S) ids, the draft's length) or None
#   drafting: whether an assistant runs
this_thread = threading.local()


def enter_pass(context: SARContext) -> None:
    """A pass starts, in the frame that called this package.

    A pass that ``KeyboardInterrupt`` ends tells nobody: it runs as long as that frame is on the stack. Where a graph
    breaks inside this package, some of its frames end before the pass does.
    """
    frame = None if torch.compiler.is_compiling() else sys._getframe(1)
    while frame is not None and os.path.dirname(frame.f_code.co_filename) == HERE:
        frame = frame.f_back
    outer = () if frame is None else [p for p in _on_stack() if p[1] is not None]
    this_thread.passes = (*outer, (context, frame))


def leave_pass(context: SARContext) -> None:
    """The pass of ``context`` ends, and what ran inside it."""
    this_thread.passes = tuple(itertools.takewhile(lambda entry: entry[0] is not context, _passes()))


def running_pass() -> SARContext | None:
    """The context of the innermost pass that runs on this thread's stack."""
    if not torch.compiler.is_compiling() and _passes():
        this_thread.passes = _on_stack()
    return _passes()[-1][0] if _passes() else None


def _passes() -> tuple[tuple[SARContext, FrameType | None], ...]:
    return getattr(this_thread, "passes", ())


def _on_stack() -> tuple[tuple[SARContext, FrameType | None], ...]:
    """The passes whose frame is on the stack, and those that were traced, which have none."""
    frame, alive = sys._getframe(1), set()
    while frame is not None:
        alive.add(id(frame))
        frame = frame.f_back
    return tuple(p for p in _passes() if p[1] is None or id(p[1]) in alive)


@dataclasses.dataclass
class SARContext:
    """Context of one forward pass of one model.

    Attention functions read it and say that they were reached, no more, so recomputation is safe.

    Attributes:
        config: the options in force.
        roles: visual and text masks (B, S) of the new positions.
        past_length: number of cached positions before this pass; a static cache gives a 0-dim tensor.
        placeholders: modality -> (B, S) bool, the positions that this pass's vision features fill.
        past: state of the cache before this pass, or None.
        recorder: the handle that collects statistics.
        packing: the sequences that are packed into the rows, or None.
        shards: how the layers' heads are split over ranks, or None.
        drafts: how many of the last tokens are a draft that this pass checks (assisted decoding); each of them counts
            as a decode step of its own, so that accepting or dropping it changes nothing else.
        cache: the cache that the decoder layers use in this pass, once they run.
        queries: how many of the last positions the layers attend with; None = all.
        reached: the re-weighted layers that have attended in this pass.
        visual_mask, norms, prior: (B, L) over the positions up to the newest visual tokens' pass; there once the
            features of all modalities are.
    """

    config: SARConfig
    roles: TokenRoles
    past_length: int | Tensor
    placeholders: dict[str, Tensor]
    past: CacheState | None
    recorder: Any
    packing: Packing | None = None
    shards: Shards | None = None
    drafts: int = 0
    cache: Any = None
    queries: int | None = None
    reached: set[int] = dataclasses.field(default_factory=set)
    visual_mask: Tensor | None = None
    norms: Tensor | None = None
    prior: Tensor | None = None

    def __post_init__(self) -> None:
        self._received: dict[str, list[Tensor]] = {}
        self._totals: dict[str, int] = {}
        self._elsewhere: dict[torch.device, SARContext] = {}
        if isinstance(self.past_length, Tensor):  # the cache's own counter, which this pass advances
            self.past_length = self.past_length.clone()
        if self.past_visual and not self.placeholders:
            home = self.roles.visual_mask.device
            self._set(self.past.visual_mask.to(home), self.past.norms.to(home))

    @property
    def past_visual(self) -> bool:
        """Whether the cache already holds visual tokens."""
        return self.past is not None and self.past.visual_mask is not None

    @property
    def active(self) -> bool:
        """Whether any visual token is in sight."""
        return bool(self.placeholders) or self.past_visual

    @property
    def needs_roles(self) -> bool:
        """Whether re-weighting needs to know where pictures and text are."""
        return self.active and self.config.measures

    @property
    def reweights(self) -> bool:
        """Whether the marked layers do in this pass: without a visual token only under weights that need none."""
        return self.config.activation_layer_k > 0 and (self.active or not self.config.weighs_by_statistics)

    def on(self, device: torch.device) -> SARContext:
        """This context for layers on ``device``; only a model spread over several has more than one."""
        if device == self.roles.text_mask.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = other = copy.copy(self)
            other.roles = TokenRoles(*(x.to(device) for x in self.roles))
            for name in ("past_length", "visual_mask", "norms", "prior"):
                value = getattr(self, name)
                setattr(other, name, value.to(device) if isinstance(value, Tensor) else value)
            if self.packing is not None:
                other.packing = dataclasses.replace(self.packing, cu_seqlens=self.packing.cu_seqlens.to(device))
        return self._elsewhere[device]

    def last_queries(self, count: int) -> SARContext:
        """This context for a layer that computes its last ``count`` positions alone."""
        own = copy.copy(self)
        own.queries, own._elsewhere = count, {}
        return own

    def add_norms(self, modality: str, norms: Tensor) -> None:
        """Bring norms (n,) of a modality's visual tokens in placeholder order: of all of them, or of the next ones."""
        parts = self._received.setdefault(modality, [])
        if torch.compiler.is_compiling() or self._complete(modality):  # the features come again, all of them
            parts.clear()
        parts.append(norms)
        if not torch.compiler.is_compiling() and sum(map(len, parts)) > self._total_of(modality):
            _refuse_count(modality, self._total_of(modality), sum(map(len, parts)))
        self._set_if_complete()

    def add_encoded_norms(self, modality: str, norms: Tensor) -> None:
        """As :meth:`add_norms`, of features encoded before: all at once, where ``generate`` may have repeated rows."""
        self._received[modality] = [_per_placeholder(modality, norms, self.placeholders[modality])]
        self._set_if_complete()

    def missing(self) -> str:
        """Which vision features have not come, for messages."""
        came = {m: sum(map(len, self._received.get(m, []))) for m in self.placeholders}
        return ", ".join(f"{n} of {self._total_of(m)} {m} tokens" for m, n in came.items())

    def _total_of(self, modality: str) -> int:
        if modality not in self._totals:
            self._totals[modality] = int(self.placeholders[modality].sum())
        return self._totals[modality]

    def _complete(self, modality: str) -> bool:
        parts = self._received.get(modality)
        if not parts or torch.compiler.is_compiling():  # in a graph the model itself checks the count
            return bool(parts)
        return sum(map(len, parts)) == self._total_of(modality)

    def _set_if_complete(self) -> None:
        if not all(map(self._complete, self.placeholders)):
            return
        visual = self.roles.visual_mask
        new = torch.zeros(visual.shape, dtype=torch.float32, device=visual.device)
        for name, mask in self.placeholders.items():
            new = new.masked_scatter(mask, torch.cat([part.to(new) for part in self._received[name]]))
            new = new.masked_fill(~visual, 0.0)  # a placeholder that the mask hides is no visual token
            if self.config.measures:
                refuse_features_not_finite(name, new, self.packing and self.packing.samples(new.shape))
        self._set(*self._after_cached(visual, new))

    def _after_cached(self, new_visual: Tensor, new_norms: Tensor) -> tuple[Tensor, Tensor]:
        """Mask and norms over the cached positions and the new ones."""
        past_length = int(self.past_length)
        if not self.past_visual:
            return F.pad(new_visual, (past_length, 0)), F.pad(new_norms, (past_length, 0))
        missing = (0, max(0, past_length - self.past.visual_mask.shape[1]))
        old = (x.to(new_visual.device) for x in (self.past.visual_mask, self.past.norms))
        old_visual, old_norms = (F.pad(x, missing) for x in old)
        return torch.cat([old_visual, new_visual], dim=1), torch.cat([old_norms, new_norms], dim=1)

    def _set(self, visual_mask: Tensor, norms: Tensor) -> None:
        self.visual_mask, self.norms = visual_mask, norms
        silent = (self._total(norms) == 0) & visual_mask  # all-zero features: uniform prior
        shares = torch.where(silent, 1.0, norms)
        self.prior = shares / self._total(shares).clamp_min(torch.finfo(torch.float32).tiny)

    def _total(self, values: Tensor) -> Tensor:
        """Sum over each sample: a row, or a packed sequence. Broadcasts against ``values`` (B, L)."""
        return values.sum(-1, keepdim=True) if self.packing is None else self.packing.totals(values)

    def carried_rows(self) -> Tensor:
        """(B,) fp32: 1 for rows whose sums go on, 0 for rows where new visual tokens start T afresh."""
        return (~self.roles.visual_mask.any(-1)).to(torch.float32)

    def over_keys(self, num_keys: int) -> tuple[Tensor, Tensor]:
        """(visual_mask, prior) over the keys of an attention call: the cached positions, then the new ones.

        More keys than positions: a static cache's unfilled slots come last. Fewer: a sliding layer kept the newest.
        """
        known, new = self.visual_mask.shape[1], self.roles.text_mask.shape[1]
        if isinstance(self.past_length, Tensor):  # a static cache counts in a tensor
            first = (self.past_length + new - num_keys).clamp_min(0)
            position = first + torch.arange(num_keys, device=self.visual_mask.device)
            index = position.clamp_max(known - 1).expand(self.visual_mask.shape[0], -1)
            return tuple(x.gather(1, index) * (position < known) for x in (self.visual_mask, self.prior))
        positions = max(num_keys, self.past_length + new)
        mask, prior = (F.pad(x, (0, max(0, positions - known))) for x in (self.visual_mask, self.prior))
        return mask[:, positions - num_keys : positions], prior[:, positions - num_keys : positions]

    def pieces(self, num_queries: int) -> list[tuple[int, int]]:
        """(start, stop) of the runs of queries that share weights: all of them, but for the tokens of a draft."""
        first = max(0, num_queries - self.drafts)
        if self.config.decode == "prompt" or not self.drafts:
            bounds = [0, first, num_queries]
        else:
            bounds = [0, *range(first, num_queries + 1)]
        return [(a, b) for a, b in itertools.pairwise(bounds) if a < b]


def _per_placeholder(modality: str, norms: Tensor, mask: Tensor) -> Tensor:
    """Norms in the order of ``mask``'s True positions, also where generate() repeated every sample E times.

    Repeated rows are neighbours (sample 0 E times, then sample 1); the norms are those of the samples once.
    """
    if torch.compiler.is_compiling():  # the model itself checks the count there
        return norms
    per_row = mask.sum(-1)
    total = int(per_row.sum())
    if norms.numel() == total:
        return norms
    if norms.numel() == 0 or total == 0 or total % norms.numel():
        _refuse_count(modality, total, norms.numel())
    repeats = total // norms.numel()
    samples = norms.split(per_row[::repeats].tolist())
    return torch.cat([part.repeat(repeats) for part in samples])


def _refuse_count(modality: str, placeholders: int, features: int) -> None:
    raise ValueError(
        f"input_ids (or inputs_embeds): {placeholders} visual placeholder tokens ({modality}), but the vision encoder "
        f"gave {features} features"
    )


def roles_of_pass(visual: Tensor, real: Tensor | None, past: CacheState | None, config: SARConfig) -> TokenRoles:
    """Roles of the new positions.

    Args:
        visual: (B, S) bool, placeholders that this pass's features fill.
        real: (B, S) bool, False = padding; None = no padding.
    """
    roles = roles_from_visual(visual, real, text_queries=config.text_queries)
    if past is None or past.visual_mask is None:
        return roles
    # text that follows cached visual tokens counts, unless newer visual tokens come after it
    real = torch.ones_like(visual) if real is None else real
    restart = roles.visual_mask.any(-1, keepdim=True) if config.text_queries == "after_last_image" else False
    seen = past.visual_mask.to(visual.device).any(-1, keepdim=True)
    follows = seen & real & ~visual & ~torch.as_tensor(restart, device=visual.device)
    return TokenRoles(roles.visual_mask, roles.text_mask | follows)
