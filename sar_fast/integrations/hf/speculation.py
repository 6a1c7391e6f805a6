"""Assisted and prompt-lookup decoding: how many tokens of the next pass are a draft that it checks.

``generate`` asks a candidate generator for a draft and feeds it to the model in one pass, the first time together with
the prompt. Nothing in that pass says which tokens are the draft, so the generator is asked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sar_fast.integrations.hf.context import this_thread

_METHOD = "_get_candidate_generator"


def announce_drafts(model: nn.Module) -> None:
    """Let ``model``'s candidate generators tell this thread the length of every draft; on the instance only."""
    setattr(model, _METHOD, CandidateGenerators(model))


def forget_drafts(model: nn.Module) -> None:
    """Undo :func:`announce_drafts`."""
    model.__dict__.pop(_METHOD, None)
    this_thread.drafts = None


def take_drafts(model: nn.Module, ids: Tensor | None, past_length: int | Tensor) -> int:
    """Length of the draft that ``model``'s pass, which starts now, checks; 0 in any other pass.

    Args:
        ids: (1, S) the pass's new tokens, if it has ids. A draft that an interrupted generation left behind is not
            what they end with.
        past_length: number of cached positions.
    """
    announced = getattr(this_thread, "drafts", None)
    if announced is None:
        return 0
    this_thread.drafts = None
    if announced[0] is not model:
        return 0
    _, candidates, length = announced
    if ids is not None:
        new, total = ids.shape[1], candidates.shape[1]
        whole = new == total if past_length == 0 else new <= total
        if not whole or not torch.equal(ids, candidates[:, total - new :]):
            return 0
    return length


def drafting() -> bool:
    """Whether this thread's pass is an assistant's: what it drafts is checked, so it may do without pictures."""
    return getattr(this_thread, "drafting", False)


class CandidateGenerators:
    """Stands for the model's method that makes candidate generators; copies with the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        generator = getattr(type(self.model), _METHOD)(self.model, *args, **kwargs)
        original = generator.get_candidates

        def get_candidates(input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            before, this_thread.drafting = drafting(), True
            try:
                candidates = original(input_ids, *args, **kwargs)
            finally:
                this_thread.drafting = before
            this_thread.drafts = (self.model, candidates[0], candidates[0].shape[1] - input_ids.shape[1])
            return candidates

        generator.get_candidates = get_candidates
        return generator
