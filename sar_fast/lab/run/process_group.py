"""How a program of several processes ends."""

from __future__ import annotations

import gc

import torch.distributed as dist
import torch.distributed.nn  # noqa: F401 first imported later, its default arguments would hold the group for ever


def leave_process_group() -> None:
    """Ends the process group of a program that has finished; call it when models and trainers are out of scope.

    ``destroy_process_group`` alone lets gloo's threads live on as long as anything, such as a dead DDP model in a
    reference cycle, holds the group. A thread that still has a tensor in hand when the interpreter shuts down aborts
    the process, so what is dead is collected first and last, and with it the threads are joined.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()
