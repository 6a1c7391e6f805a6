"""Assisted and prompt-lookup decoding: how many tokens of the next pass are a draft that it checks.

``generate`` asks a candidate generator for a draft and feeds it to the model in one pass, the first time together with
the prompt. Nothing in that pass says which tokens are the draft, so the generator leaves it on the generation's cache.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from sar_fast.hf.cache_argument import cache_in
from sar_fast.hf.running import enter, innermost, leave

_METHOD = "_get_candidate_generator"
_MARK = "sar_draft"  # attribute of caches


@dataclasses.dataclass(frozen=True)
class Draft:
    """``candidates`` (1, S) int64: the tokens so far and the draft, which is the last ``length`` of them."""

    candidates: Tensor
    length: int


def announce_drafts(model: nn.Module) -> None:
    """Let ``model``'s candidate generators leave every draft on the generation's cache; on the instance only."""
    setattr(model, _METHOD, CandidateGenerators(model))


def forget_drafts(model: nn.Module) -> None:
    """Undo :func:`announce_drafts`."""
    model.__dict__.pop(_METHOD, None)


def take_drafts(cache: Any, ids: Tensor | None, past_length: int | Tensor) -> int:
    """Length of the draft that the pass which starts now, on ``cache``, checks; 0 in any other pass.

    Args:
        ids: (1, S) the pass's new tokens, if it has ids. A draft that an interrupted generation left behind is not
            what they end with.
        past_length: number of cached positions.
    """
    draft = getattr(cache, _MARK, None)
    if draft is None:
        return 0
    delattr(cache, _MARK)
    if ids is not None:
        new, total = ids.shape[1], draft.candidates.shape[1]
        whole = new == total if past_length == 0 else new <= total
        if not whole or not torch.equal(ids, draft.candidates[:, total - new :]):
            return 0
    return draft.length


def drafting() -> bool:
    """Whether this thread's pass is an assistant's: what it drafts is checked, so it may do without pictures."""
    return innermost(CandidateGenerators) is not None


class CandidateGenerators:
    """Stands for the model's method that makes candidate generators; copies with the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        generator = getattr(type(self.model), _METHOD)(self.model, *args, model_kwargs=model_kwargs, **kwargs)
        original, cache = generator.get_candidates, cache_in(model_kwargs)

        def get_candidates(input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            enter(self)
            try:
                candidates = original(input_ids, *args, **kwargs)
            finally:
                leave(self)
            setattr(cache, _MARK, Draft(candidates[0], candidates[0].shape[1] - input_ids.shape[1]))
            return candidates

        generator.get_candidates = get_candidates
        return generator
