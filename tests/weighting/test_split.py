"""Any rule where heads or queries are split over ranks: as in one process, outputs and all gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sar_fast import sar_attn_func
from sar_fast.method.distributed import Shards
from sar_fast.weighting import Fixed, Mass, ScoreSum, Split, SuppressHeads
from tests.distributed_workers import run_ranks
from tests.helpers import make_case, max_error

H = 8


class Mixture(nn.Module):
    """Couples all heads, and uses a row statistic."""

    def __init__(self, *row_statistics) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.mix = nn.Parameter(torch.randn(H, H, generator=g, dtype=torch.float64) / H)
        self.row_statistics = row_statistics

    def forward(self, statistics, layer: int | None) -> Tensor:
        rows = sum(statistics.rows.values()) if self.row_statistics else 0
        return 1 + torch.tanh(statistics.sav + statistics.sa + rows).to(self.mix) @ self.mix


def attend(tensors, rule, backend, sav_grad, weight, **shards):
    leaves = [tensors[i].detach().clone().requires_grad_() for i in (0, 1, 2, 5)]
    q, k, v, prior = leaves
    for p in rule.parameters() if isinstance(rule, nn.Module) else ():
        p.grad = None
    given = {"weighting": rule, "sav_grad": sav_grad, "backend": backend, "return_stats": True, **shards}
    out, stats = sar_attn_func(q, k, v, tensors[3], tensors[4], prior, **given)
    (out * weight).sum().backward()
    return out, stats, [x.grad for x in leaves]


def heads_worker(rank, world):
    shards = Shards(heads=dist.group.WORLD)
    case = make_case(23, H=H, Hkv=4, D=16, dtype=torch.float64)
    weight = torch.randn(case.q.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    part = lambda x: x.chunk(world, dim=2)[rank]
    local = (part(case.q), part(case.k), part(case.v), *case.tensors[3:])
    for backend, sav_grad in (("torch", True), ("composed", False)):
        for rule in (Mixture(), Mixture(Mass(), ScoreSum())):
            out, stats, grads = attend(case.tensors, rule, backend, sav_grad, weight)
            whole = rule.mix.grad.clone()
            own = attend(local, rule, backend, sav_grad, part(weight), shards=shards)
            assert max_error(own[0], part(out)) <= 1e-12
            assert max_error(own[1].head_weights, stats.head_weights.chunk(world, 1)[rank]) <= 1e-6
            for name, rows in stats.rows.items():
                assert max_error(own[1].rows[name], rows.chunk(world, 1)[rank]) <= 1e-6
            for got, want in zip(own[2][:3], grads[:3]):
                assert max_error(got, part(want)) <= 1e-11
            dist.all_reduce(rule.mix.grad)  # each rank's loss is of its own heads
            assert max_error(rule.mix.grad, whole) <= 1e-11
        for rule in (Fixed(torch.linspace(0, 2, H)), SuppressHeads(keep=3)):
            out, *_ = attend(case.tensors, rule, backend, sav_grad, weight)
            own, *_ = attend(local, rule, backend, sav_grad, part(weight), shards=shards)
            assert max_error(own, part(out)) <= 1e-12
            again, *_ = attend(local, Split(rule, heads=dist.group.WORLD), backend, sav_grad, part(weight))
            assert torch.equal(again, own)


def queries_worker(rank, world):
    group = dist.group.WORLD
    case = make_case(24, H=H, Hkv=4, D=16, dtype=torch.float64)
    text = case.text & ~case.visual
    text[0, 15] = True
    case = dataclasses.replace(case, text=text)
    weight = torch.randn(case.q.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    rows, keys = slice(rank * 16, 16 + rank * 8), slice(0, 16 + rank * 8)
    q, k, v, visual, text, prior = case.tensors
    local = (q[:, rows], k[:, keys], v[:, keys], visual[:, keys], text[:, rows], prior[:, keys])
    for rule in (Mixture(), Mixture(Mass())):
        out, stats, grads = attend(case.tensors, rule, "torch", True, weight)
        whole = rule.mix.grad.clone()
        own = attend(local, rule, "torch", True, weight[:, rows], shards=Shards(queries=group))
        assert max_error(own[0], out[:, rows]) <= 1e-12
        assert max_error(own[1].head_weights, stats.head_weights) <= 1e-6
        assert max_error(own[2][0], grads[0][:, rows]) <= 1e-11
        total = torch.zeros_like(grads[1])
        total[:, keys] = own[2][1]
        dist.all_reduce(total)
        assert max_error(total, grads[1]) <= 1e-11
        dist.all_reduce(rule.mix.grad)
        assert max_error(rule.mix.grad, whole) <= 1e-11
    with pytest.raises(
        ValueError, match="weighting must have no row statistics of the last query where queries are split"
    ):
        attend(local, SuppressHeads(keep=3), "torch", False, weight[:, rows], shards=Shards(queries=group))


@pytest.mark.parametrize("worker", [heads_worker, queries_worker], ids=lambda w: w.__name__)
def test_split_over_two_processes_equals_one(worker):
    run_ranks(worker)


def test_nothing_split_is_an_error():
    with pytest.raises(ValueError, match="heads or queries must be a process group; got None for both"):
        Split(Fixed([1.0]))
