"""What one forward pass knows: token roles, the prior, and the cache. Passed down as the keyword ``sar_context``."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sar_fast.cache_state import CacheState
from sar_fast.config import SARConfig
from sar_fast.roles import TokenRoles, roles_from_visual


@dataclasses.dataclass
class SARContext:
    """Context of one forward pass of one model. Attention functions only read it, so recomputation is safe.

    Attributes:
        config: the options in force.
        roles: visual and text masks (B, S) of the new positions.
        past_length: number of cached positions before this pass.
        placeholders: modality -> (B, S) bool, the positions that this pass's vision features fill.
        past: state of the cache before this pass, or None.
        recorder: the handle that collects statistics.
        cache: the cache that the decoder layers use in this pass, once they run.
        visual_mask, norms, prior: (B, past + S); complete when the features of all modalities are there.
    """

    config: SARConfig
    roles: TokenRoles
    past_length: int
    placeholders: dict[str, Tensor]
    past: CacheState | None
    recorder: Any
    cache: Any = None
    visual_mask: Tensor | None = None
    norms: Tensor | None = None
    prior: Tensor | None = None

    def __post_init__(self) -> None:
        self._received: dict[str, Tensor] = {}
        if self.past_visual:
            missing = max(0, self.past_length - self.past.visual_mask.shape[1])
            self.visual_mask, self.norms = (
                F.pad(self.past.visual_mask, (0, missing)),
                F.pad(self.past.norms, (0, missing)),
            )
            if not self.placeholders:
                self._complete(torch.zeros(self.roles.text_mask.shape, dtype=torch.float32, device=self.norms.device))

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
            self._complete(new)

    def _complete(self, new_norms: Tensor) -> None:
        new_visual = self.roles.visual_mask
        if self.past_visual:
            self.visual_mask = torch.cat([self.visual_mask, new_visual], dim=1)
            self.norms = torch.cat([self.norms, new_norms], dim=1)
        else:
            self.visual_mask = F.pad(new_visual, (self.past_length, 0))
            self.norms = F.pad(new_norms, (self.past_length, 0))
        silent = (self.norms.sum(-1, keepdim=True) == 0) & self.visual_mask  # all-zero features: uniform prior
        shares = torch.where(silent, 1.0, self.norms)
        self.prior = shares / shares.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)

    def carried_rows(self) -> Tensor:
        """(B,) fp32: 1 for rows whose sums go on, 0 for rows where new visual tokens start T afresh."""
        return (~self.roles.visual_mask.any(-1)).to(torch.float32)

    def over_keys(self, num_keys: int) -> tuple[Tensor, Tensor]:
        """(visual_mask, prior) over the keys of an attention call: the cached positions, then the new ones.

        More keys than positions: a static cache's unfilled slots come last. Fewer: a sliding layer kept the newest.
        """
        positions = self.visual_mask.shape[1]
        if num_keys >= positions:
            pad = (0, num_keys - positions)
            return F.pad(self.visual_mask, pad), F.pad(self.prior, pad)
        return self.visual_mask[:, positions - num_keys :], self.prior[:, positions - num_keys :]


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
    if norms.numel() == 0 or total % norms.numel():
        raise ValueError(
            f"input_ids: {total} visual placeholder tokens, but the vision encoder gave {norms.numel()} features"
        )
    repeats = total // norms.numel()
    samples = norms.split(per_row[::repeats].tolist())
    return torch.cat([part.repeat(repeats) for part in samples])


def roles_of_pass(
    visual: Tensor, attention_mask: Tensor | None, past_length: int, past: CacheState | None, config: SARConfig
) -> TokenRoles:
    """Roles of the new positions.

    Args:
        visual: (B, S) bool, placeholders that this pass's features fill.
        attention_mask: (B, past + S) or (B, S), non-zero = real token; None = no padding.
    """
    length = visual.shape[1]
    if attention_mask is not None:
        attention_mask = (
            attention_mask[:, -length:]
            if attention_mask.shape[1] <= past_length + length
            else (attention_mask[:, past_length : past_length + length])
        )
    roles = roles_from_visual(visual, attention_mask, text_queries=config.text_queries)
    if past is None or past.visual_mask is None:
        return roles
    # text that follows cached visual tokens counts, unless newer visual tokens come after it
    real = torch.ones_like(visual) if attention_mask is None else attention_mask != 0
    restart = visual.any(-1, keepdim=True) if config.text_queries == "after_last_image" else False
    follows = past.visual_mask.any(-1, keepdim=True) & real & ~visual & ~torch.as_tensor(restart, device=visual.device)
    return TokenRoles(roles.visual_mask, roles.text_mask | follows)
