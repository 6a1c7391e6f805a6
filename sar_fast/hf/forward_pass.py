"""What one forward pass knows: token roles, the prior, and the cache. The keyword ``sar_context`` carries it down."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sar_fast.config import SARConfig
from sar_fast.hf.cache_state import CacheState, attach
from sar_fast.hf.norms import IncomingNorms
from sar_fast.hf.packing import Packing
from sar_fast.hf.refusals import refuse_features_not_finite
from sar_fast.hf.running import innermost
from sar_fast.method.distributed import Shards
from sar_fast.method.roles import TokenRoles
from sar_fast.method.state import SARState, SARStats


@dataclasses.dataclass
class Pass:
    """One forward pass of one model.

    Attention functions read it and say that they were reached, no more, so recomputation is safe.

    Attributes:
        handle: SAR on the model, which keeps what is recorded.
        config: the options in force.
        roles: visual and text masks (B, S) of the new positions.
        past_length: number of cached positions before this pass; a static cache gives a 0-dim tensor.
        incoming: norms of the vision features that fill this pass's placeholders.
        past: state of the cache before this pass, or None.
        packing: the sequences that are packed into the rows, or None.
        drafts: how many of the last tokens are a draft that this pass checks (assisted decoding); each of them counts
            as a decode step of its own, so that accepting or dropping it changes nothing else.
        padded, scattered: whether the (B, positions) attention mask of a prompt hides any, and some that lie between
            others; None = it was not looked at.
        cache: the cache that the decoder layers use in this pass, once they run.
        queries: how many of the last positions the layers attend with; None = all.
        reached: the re-weighted layers that have attended in this pass.
        visual_mask, norms, prior: (B, L) over the positions up to the newest visual tokens' pass; there once the
            features of all modalities are.
    """

    handle: Any
    config: SARConfig
    roles: TokenRoles
    past_length: int | Tensor
    incoming: IncomingNorms
    past: CacheState | None
    packing: Packing | None = None
    drafts: int = 0
    padded: bool | None = None
    scattered: bool | None = None
    cache: Any = None
    queries: int | None = None
    reached: set[int] = dataclasses.field(default_factory=set)
    visual_mask: Tensor | None = None
    norms: Tensor | None = None
    prior: Tensor | None = None

    def __post_init__(self) -> None:
        self._elsewhere: dict[torch.device, Pass] = {}
        self._over_keys: dict[int, tuple[Tensor, Tensor]] = {}
        if isinstance(self.past_length, Tensor):  # the cache's own counter, which this pass advances
            self.past_length = self.past_length.clone()
        if self.past_visual and not self.brings_pictures:
            past, home = self.past, self.roles.visual_mask.device
            prior = None if past.prior is None else past.prior.to(home)
            self._set(past.visual_mask.to(home), past.norms.to(home), prior)
            if past.prior is None:
                past.prior = self.prior

    # what it is about

    @property
    def shards(self) -> Shards | None:
        """How the layers' heads are split over ranks."""
        return self.handle.shards

    @property
    def brings_pictures(self) -> bool:
        """Whether vision features come with this pass."""
        return bool(self.incoming.placeholders)

    @property
    def past_visual(self) -> bool:
        """Whether the cache already holds visual tokens."""
        return self.past is not None and self.past.visual_mask is not None

    @property
    def active(self) -> bool:
        """Whether any visual token is in sight."""
        return self.brings_pictures or self.past_visual

    @property
    def needs_roles(self) -> bool:
        """Whether re-weighting needs to know where pictures and text are."""
        return self.active and self.config.measures

    @property
    def reweights(self) -> bool:
        """Whether the marked layers do in this pass: without a visual token only under weights that need none."""
        return self.config.activation_layer_k > 0 and (self.active or not self.config.weighs_by_statistics)

    def on(self, device: torch.device) -> Pass:
        """This pass for layers on ``device``; only a model spread over several has more than one."""
        if device == self.roles.text_mask.device:
            return self
        if device not in self._elsewhere:
            names = ("past_length", "visual_mask", "norms", "prior")
            moved = {name: x.to(device) for name in names if isinstance(x := getattr(self, name), Tensor)}
            if self.packing is not None:
                moved["packing"] = dataclasses.replace(self.packing, cu_seqlens=self.packing.cu_seqlens.to(device))
            self._elsewhere[device] = self.but(roles=TokenRoles(*(x.to(device) for x in self.roles)), **moved)
        return self._elsewhere[device]

    def but(self, **changes: Any) -> Pass:
        """This pass as some layers see it, with other attributes; the rest is shared."""
        other = copy.copy(self)
        other._elsewhere, other._over_keys = {}, {}
        for name, value in changes.items():
            setattr(other, name, value)
        return other

    # norms of the vision features, and the prior

    def receive(self, modality: str, norms: Tensor) -> None:
        """Norms (n,) of a modality's visual tokens in placeholder order: of all of them, or of the next ones."""
        self.incoming.add(modality, norms)
        self._set_if_complete()

    def receive_encoded(self, modality: str, norms: Tensor) -> None:
        """As :meth:`receive`, of features encoded before: all at once, where ``generate`` may have repeated rows."""
        self.incoming.put_encoded(modality, norms)
        self._set_if_complete()

    def check_prior(self) -> None:
        """``RuntimeError`` unless the features came."""
        if self.prior is None:
            raise RuntimeError(
                f"SAR: the vision features of this pass never came whole, {self.incoming.missing()}: the vision "
                "encoder was bypassed, or the model's feature methods ran for some of the pictures only"
            )

    def _set_if_complete(self) -> None:
        if not self.incoming.complete:
            return
        visual = self.roles.visual_mask
        new = torch.zeros(visual.shape, dtype=torch.float32, device=visual.device)
        for modality, mask in self.incoming.placeholders.items():
            new = new.masked_scatter(mask, self.incoming.norms(modality).to(new))
            new = new.masked_fill(~visual, 0.0)  # a placeholder that the mask hides is no visual token
            if self.config.measures:
                refuse_features_not_finite(modality, new, self.packing and self.packing.samples(new.shape))
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

    def _set(self, visual_mask: Tensor, norms: Tensor, prior: Tensor | None = None) -> None:
        self.visual_mask, self.norms = visual_mask, norms
        self.prior = self._prior() if prior is None else prior
        self._over_keys.clear()

    def _prior(self) -> Tensor:
        """(B, L) fp32: each visual token's share of its sample's norms."""
        norms, visual_mask = self.norms, self.visual_mask
        silent = (self._total(norms) == 0) & visual_mask  # all-zero features: uniform prior
        shares = torch.where(silent, 1.0, norms)
        return shares / self._total(shares).clamp_min(torch.finfo(torch.float32).tiny)

    def _total(self, values: Tensor) -> Tensor:
        """Sum over each sample: a row, or a packed sequence. Broadcasts against ``values`` (B, L)."""
        return values.sum(-1, keepdim=True) if self.packing is None else self.packing.totals(values)

    # what attention layers read

    def carried_rows(self) -> Tensor | None:
        """(B,) fp32: 1 for rows whose sums go on, 0 where new visual tokens start T afresh; None = all go on."""
        if not self.brings_pictures:
            return None
        return (~self.roles.visual_mask.any(-1)).to(torch.float32)

    def over_keys(self, num_keys: int) -> tuple[Tensor, Tensor]:
        """(visual_mask, prior) over the keys of an attention call: the cached positions, then the new ones.

        More keys than positions: a static cache's unfilled slots come last. Fewer: a sliding layer kept the newest.
        """
        if num_keys not in self._over_keys:  # once for all layers
            self._over_keys[num_keys] = self._find_over_keys(num_keys)
        return self._over_keys[num_keys]

    def _find_over_keys(self, num_keys: int) -> tuple[Tensor, Tensor]:
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

    # decode state

    def meet(self, cache: Any) -> None:
        """The decoder layers use ``cache`` in this pass. Its state knows of text-only passes too."""
        self.cache = cache
        if not self.config.measures:
            return
        state = attach(cache, rows=not torch.compiler.is_compiling())
        state.belong_to(self.config, self.handle.switch)
        if not cache.is_compileable:  # a number that changes each step would compile a graph again
            state.length = self.past_length + self.roles.text_mask.shape[1]

    def state_before(self, layer: int) -> SARState | None:
        """A layer's state of the tokens before this pass."""
        return None if self.past is None else self.past.layers.get(layer)

    def keep_state(self, layer: int, state: SARState | None, queries_left: int) -> None:
        """Put a layer's state on the cache; ``queries_left`` of this pass are not in it. None: the rule needs none."""
        if self.cache is None:
            return
        on_cache = attach(self.cache)
        if self.brings_pictures:
            on_cache.set_visual(self.visual_mask, self.norms, self.prior)
        if state is not None:
            grows = not self.cache.is_compileable
            length = self.past_length + self.roles.text_mask.shape[1] - queries_left if grows else None
            on_cache.store(layer, state, length, self.config.decode)

    # records

    def record(self, layer: int, stats: SARStats) -> None:
        """Keep a layer's statistics."""
        self.handle.stats[layer] = stats

    def record_rows(self, layer: int, rows: Tensor) -> None:
        """Keep a layer's attention rows (B, H, Sk)."""
        self.handle.rows[layer] = rows


def running_pass() -> Pass | None:
    """The innermost pass that runs on this thread's stack."""
    return innermost(Pass)
