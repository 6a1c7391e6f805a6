"""What one forward pass knows: token roles, the prior, and the cache. Passed down as the keyword ``sar_context``."""

from __future__ import annotations

import dataclasses
import itertools
import threading
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

this_thread = threading.local()  # the forward pass and the vision call on this thread's stack, nothing longer-lived


@dataclasses.dataclass
class SARContext:
    """Context of one forward pass of one model. Attention functions only read it, so recomputation is safe.

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
    visual_mask: Tensor | None = None
    norms: Tensor | None = None
    prior: Tensor | None = None

    def __post_init__(self) -> None:
        self._received: dict[str, Tensor] = {}
        if isinstance(self.past_length, Tensor):  # the cache's own counter, which this pass advances
            self.past_length = self.past_length.clone()
        if self.past_visual and not self.placeholders:
            self._set(self.past.visual_mask, self.past.norms)

    @property
    def past_visual(self) -> bool:
        """Whether the cache already holds visual tokens."""
        return self.past is not None and self.past.visual_mask is not None

    @property
    def active(self) -> bool:
        """Whether any visual token is in sight."""
        return bool(self.placeholders) or self.past_visual

    def add_norms(self, modality: str, norms: Tensor) -> None:
        """Bring the norms (n,) of a modality's visual tokens in placeholder order."""
        self._received[modality] = norms
        if set(self._received) >= set(self.placeholders):
            new = torch.zeros(self.roles.text_mask.shape, dtype=torch.float32, device=norms.device)
            for name, mask in self.placeholders.items():
                new = new.masked_scatter(mask, _per_placeholder(self._received[name].to(new), mask))
                if self.config.activation_layer_k:
                    refuse_features_not_finite(name, new, self.packing and self.packing.samples(new.shape))
            self._set(*self._after_cached(self.roles.visual_mask, new))

    def _after_cached(self, new_visual: Tensor, new_norms: Tensor) -> tuple[Tensor, Tensor]:
        """Mask and norms over the cached positions and the new ones."""
        past_length = int(self.past_length)
        if not self.past_visual:
            return F.pad(new_visual, (past_length, 0)), F.pad(new_norms, (past_length, 0))
        missing = (0, max(0, past_length - self.past.visual_mask.shape[1]))
        old_visual, old_norms = F.pad(self.past.visual_mask, missing), F.pad(self.past.norms, missing)
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


def _per_placeholder(norms: Tensor, mask: Tensor) -> Tensor:
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
        raise ValueError(
            f"input_ids (or inputs_embeds): {total} visual placeholder tokens, but the vision encoder gave "
            f"{norms.numel()} features"
        )
    repeats = total // norms.numel()
    samples = norms.split(per_row[::repeats].tolist())
    return torch.cat([part.repeat(repeats) for part in samples])


def roles_of_pass(
    visual: Tensor, attention_mask: Tensor | None, past: CacheState | None, config: SARConfig
) -> TokenRoles:
    """Roles of the new positions.

    Args:
        visual: (B, S) bool, placeholders that this pass's features fill.
        attention_mask: (B, past + S) or (B, S), non-zero = real token; None = no padding.
    """
    if attention_mask is not None:
        attention_mask = attention_mask[:, -visual.shape[1] :]
    roles = roles_from_visual(visual, attention_mask, text_queries=config.text_queries)
    if past is None or past.visual_mask is None:
        return roles
    # text that follows cached visual tokens counts, unless newer visual tokens come after it
    real = torch.ones_like(visual) if attention_mask is None else attention_mask != 0
    restart = visual.any(-1, keepdim=True) if config.text_queries == "after_last_image" else False
    follows = past.visual_mask.any(-1, keepdim=True) & real & ~visual & ~torch.as_tensor(restart, device=visual.device)
    return TokenRoles(roles.visual_mask, roles.text_mask | follows)
