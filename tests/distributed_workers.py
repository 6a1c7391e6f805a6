"""Functions that run in every process of a two-process group (gloo, CPU), started by ``run_ranks``."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sar_fast.lab.run.process_group import leave_process_group

# Processes are forked from one that has imported these and run nothing: each would import them for seconds.
multiprocessing.set_forkserver_preload(
    ["torch.distributed.fsdp", "transformers.models.llava.modeling_llava", "sar_fast.hf"]
)


def run_ranks(worker: Callable, *arguments: Any, world_size: int = 2) -> None:
    """``worker(rank, world_size, *arguments)`` in real processes; a failure of one is this test's failure."""
    with tempfile.NamedTemporaryFile() as store:
        arguments = (world_size, store.name + ".store", worker, arguments)
        mp.start_processes(_enter, arguments, nprocs=world_size, start_method="forkserver")


def _enter(rank: int, world_size: int, store: str, worker: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        worker(rank, world_size, *arguments)
    finally:
        leave_process_group()
