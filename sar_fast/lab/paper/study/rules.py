"""Rules that the paper's is compared with: heads weigh by chance, or as an oracle that knows the question's object."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from sar_fast.method.values import Statistics, StatisticsWithRows
from sar_fast.method.weighting import Mass, SoftmaxOverHeads


@functools.cache
def _order(seed: int, layer: int, heads: int) -> Tensor:
    return torch.randperm(heads, generator=torch.Generator().manual_seed(1000 * seed + layer))


@dataclasses.dataclass(frozen=True)
class ShuffledHeads:
    """The weights of ``rule``, handed to other heads: a permutation per layer, drawn once from ``seed``.

    Every sample's weights are the same numbers as the rule's: if they do as well, it does not matter which head is
    which.
    """

    rule: SoftmaxOverHeads
    seed: int = 0

    def __call__(self, statistics: Statistics, layer: int | None) -> Tensor:
        c = self.rule(statistics, layer)
        return c[..., _order(self.seed, layer or 0, c.shape[-1]).to(c.device)]


@dataclasses.dataclass(frozen=True)
class RandomHeads:
    """Random weights of the same spread as those of ``rule``: H times the softmax of normal numbers, one per layer and
    head from ``seed``, times the standard deviation over heads of the logarithm of the rule's weights."""

    rule: SoftmaxOverHeads
    seed: int = 0

    def __call__(self, statistics: Statistics, layer: int | None) -> Tensor:
        c = self.rule(statistics, layer)
        heads = c.shape[-1]
        generator = torch.Generator().manual_seed(1000 * self.seed + (layer or 0))
        noise = torch.randn(heads, generator=generator).to(c)
        spread = c.clamp_min(torch.finfo(c.dtype).tiny).log().std(-1, correction=0, keepdim=True)
        return heads * torch.softmax(spread * noise, dim=-1)


class ObjectHeads:
    """The paper's rule with an oracle in place of the prior: SA is the attention on the question's objects.

    ``objects.keys`` says where they are, per batch (:func:`.answers.answers`); generated tokens are no objects.
    """

    def __init__(self, rule: SoftmaxOverHeads) -> None:
        self.rule = rule
        self.objects = Mass(name="object")
        self.row_statistics = (self.objects,)

    def __call__(self, statistics: StatisticsWithRows, layer: int | None) -> Tensor:
        return self.rule(Statistics(statistics.av, statistics.rows["object"], statistics.count), layer)
