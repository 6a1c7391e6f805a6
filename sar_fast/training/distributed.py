"""DeepSpeed on any machine: what must happen before arguments are parsed and models are loaded."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Sequence

import torch


def asks_for_deepspeed(words: Sequence[str]) -> bool:
    """Whether flags name a DeepSpeed configuration."""
    return any(word == "--deepspeed" or word.startswith("--deepspeed=") for word in words)


def prepare_deepspeed() -> None:
    """Let DeepSpeed run without a launcher, and on the CPU.

    Without a launcher it would look for MPI. On the CPU, ZeRO-3 counts ranks before the Trainer has started them, so
    the process group is made here; and an optional shared-memory operator would be compiled on first use, for a minute.
    ``ImportError`` says what to install.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError("--deepspeed needs the package: pip install sar_fast[deepspeed]")
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({**alone, "MASTER_PORT": str(free_port())})
    if not torch.cuda.is_available():
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo")


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
