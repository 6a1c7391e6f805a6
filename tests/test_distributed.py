"""Heads or queries split over two real processes equal one process: output, statistics, gradients, weights."""

from __future__ import annotations

import copy
import itertools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sar_fast.attention import ops
from sar_fast.backends.select import BACKENDS
from sar_fast.lab.run.process_group import leave_process_group
from sar_fast.method.distributed import Shards
from sar_fast.method.values import Call, Roles, Scores
from sar_fast.method.weighting.split import split_over
from sar_fast.weighting import SoftmaxOverHeads
from tests.distributed_workers import run_ranks
from tests.helpers import make_case, max_error, relative_error

RULES = [
    SoftmaxOverHeads(beta=0.02),
    SoftmaxOverHeads(beta=0.5, normalize="standardize", protect_first_head=False),
]


def attend(tensors, rule, backend, sav_grad, shards=None):
    """(out, av, sa, c, count) and the gradients of q, k, v and the prior, for a loss on output and weights."""
    q, k, v, prior = (tensors[i].detach().clone().requires_grad_() for i in (0, 1, 2, 5))
    call = Call(q, k, v, Scores(0.2), Roles(tensors[3], tensors[4], prior))
    out, _, (av, sa, count), c, _ = ops.attention(call, split_over(rule, shards), BACKENDS[backend], sav_grad=sav_grad)
    g = torch.Generator().manual_seed(7)
    weight = torch.randn(tensors[6], generator=g, dtype=q.dtype)[tensors[7]]
    (out * weight).sum().backward()
    return (out, av, sa, c, count), (q.grad, k.grad, v.grad, prior.grad)


def heads_worker(rank, world):
    shards = Shards(heads=dist.group.WORLD)
    assert copy.deepcopy(shards) is shards
    cases = itertools.product((torch.float64, torch.float32), (2, 4), RULES, ("torch", "composed"), (False, True))
    for dtype, kv_heads, rule, backend, sav_grad in cases:
        case = make_case(23, H=8, Hkv=kv_heads, D=16, dtype=dtype)
        everything = (*case.tensors, case.q.shape, slice(None))
        whole, gradients = attend(everything, rule, backend, sav_grad)
        part = lambda x: x.chunk(world, dim=2)[rank]
        own = (slice(None), slice(None), slice(rank * 4, rank * 4 + 4))
        local = (part(case.q), part(case.k), part(case.v), *case.tensors[3:], case.q.shape, own)
        mine, mine_gradients = attend(local, rule, backend, sav_grad, shards)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        assert max_error(mine[0], part(whole[0])) <= tolerance
        for got, expected in zip(mine[1:4], whole[1:4]):
            assert relative_error(got, expected.chunk(world, dim=1)[rank]) <= tolerance
        everyone = [torch.empty_like(mine[3]) for _ in range(world)]
        dist.all_gather(everyone, mine[3].detach())
        assert max_error(torch.cat(everyone, 1), whole[3]) <= tolerance * 10
        for got, expected in zip(mine_gradients[:3], gradients[:3]):
            assert max_error(got, part(expected)) <= tolerance
        if sav_grad:  # the prior is shared: its gradient is the sum over ranks
            dist.all_reduce(mine_gradients[3])
            assert max_error(mine_gradients[3], gradients[3]) <= tolerance * max(1, gradients[3].abs().max())


def queries_worker(rank, world):
    """Rank 0 takes the older queries, which see only the keys up to their own: the causal mask stays bottom-right."""
    shards = Shards(queries=dist.group.WORLD)
    cases = itertools.product((torch.float64, torch.float32), RULES, ("torch", "composed"), (False, True))
    for dtype, rule, backend, sav_grad in cases:
        case = make_case(24, H=4, Hkv=2, D=16, dtype=dtype)
        text = case.text.clone()
        text[0, 15:17] = True
        text[:, 18:20] = False  # ranks count different numbers of queries, rank 0 none for the others
        tensors = (*case.tensors[:4], text & ~case.visual, case.prior)
        whole, gradients = attend((*tensors, case.q.shape, slice(None)), rule, backend, sav_grad)
        rows, keys = slice(rank * 16, 16 + rank * 8), slice(0, 16 + rank * 8)
        q, k, v, visual, text, prior = tensors
        local = (q[:, rows], k[:, keys], v[:, keys], visual[:, keys], text[:, rows], prior[:, keys])
        mine, mine_gradients = attend((*local, case.q.shape, (slice(None), rows)), rule, backend, sav_grad, shards)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        assert max_error(mine[0], whole[0][:, rows]) <= tolerance
        for got, expected in zip(mine[1:], whole[1:]):
            assert relative_error(got, expected) <= tolerance
        assert max_error(mine_gradients[0], gradients[0][:, rows]) <= tolerance
        for got, expected in zip(mine_gradients[1:], gradients[1:]):
            if expected is None or got is None:
                continue
            total = torch.zeros_like(expected)
            total[:, keys] = got
            dist.all_reduce(total)
            assert max_error(total, expected) <= tolerance * max(1, expected.abs().max())


@pytest.mark.parametrize("worker", [heads_worker, queries_worker], ids=lambda w: w.__name__)
def test_split_over_two_processes_equals_one(worker):
    run_ranks(worker)


def test_nothing_split_is_an_error():
    with pytest.raises(ValueError, match="heads or queries must be a process group"):
        Shards()


def leaving_worker(rank, world):
    """A DDP model in a reference cycle, as a finished Trainer leaves it: destroying the group alone keeps threads."""
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
    model.itself = model
    model(torch.ones(1, 3)).sum().backward()
    del model
    threads = [Path(f"/proc/self/task/{i}/comm").read_text().strip() for i in os.listdir("/proc/self/task")]
    assert any("gloo" in name for name in threads), threads
    leave_process_group()
    threads = [Path(f"/proc/self/task/{i}/comm").read_text().strip() for i in os.listdir("/proc/self/task")]
    assert not any("gloo" in name for name in threads), threads
    assert not dist.is_initialized()
    leave_process_group()  # nothing left to leave


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="thread names are read from Linux's /proc")
def test_leaving_joins_the_threads_of_the_process_group():
    """A thread alive at interpreter shutdown may abort the process: exit code -6 after a run that succeeded."""
    run_ranks(leaving_worker)
