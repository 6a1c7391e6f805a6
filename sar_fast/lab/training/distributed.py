"""DeepSpeed on any machine: what must happen before models are loaded; which ways of splitting a model are refused."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sar_fast.base.extras import need

SPLITS = {"tp_size": "tensor parallel", "cp_size": "context parallel", "sp_size": "sequence parallel (Ulysses)"}


def asks_for_deepspeed(words: Sequence[str]) -> bool:
    """Whether flags name a DeepSpeed configuration."""
    return any(word == "--deepspeed" or word.startswith("--deepspeed=") for word in words)


def prepare_deepspeed() -> None:
    """Let DeepSpeed run without a launcher, and on the CPU.

    Without a launcher it would look for MPI. On the CPU, ZeRO-3 counts ranks before the Trainer has started them, so
    the process group is made here; and an optional shared-memory operator would be compiled on first use, for a minute.
    ``ImportError`` says what to install.
    """
    need("--deepspeed", "deepspeed")
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


def refuse_split_models(deepspeed: Mapping[str, Any] | None, parallelism: Any) -> None:
    """``ValueError`` for settings under which ranks share one sample: heads or positions split between them.

    Batches of pictures, gradient sparsity of whole weights and SAR's weights over all heads would be silently wrong:
    nothing here knows those ranks. ``apply_sar(..., shards=...)`` in a training loop of one's own does.

    Args:
        deepspeed: the contents of a DeepSpeed configuration, or None.
        parallelism: accelerate's ``ParallelismConfig``, a mapping of its fields, or None; None = as
            `accelerate launch` left it in the environment.
    """
    found = []
    tensor_parallel = (deepspeed or {}).get("tensor_parallel") or {}
    sizes = {
        "tensor_parallel.autotp_size": tensor_parallel.get("autotp_size"),
        "tensor_parallel.tp_size": (tensor_parallel.get("tp") or tensor_parallel).get("tp_size"),
        "sequence_parallel_size": (deepspeed or {}).get("sequence_parallel_size"),
    }
    found += [f"deepspeed: {name} is {size}" for name, size in sizes.items() if (size or 1) > 1]
    if parallelism is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        parallelism = {name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")) for name in SPLITS}
    for name, what in SPLITS.items():
        size = parallelism.get(name) if isinstance(parallelism, Mapping) else getattr(parallelism, name, None)
        if (size or 1) > 1:
            found.append(f"parallelism_config: {name} is {size} ({what})")
    if found:
        raise ValueError(
            f"{'; '.join(found)}: every sample is trained on one rank (DDP, ZeRO-1, 2, 3). In a training loop "
            "of your own, apply_sar(model, config, shards=Shards(...)) takes the ranks that share heads or positions"
        )
