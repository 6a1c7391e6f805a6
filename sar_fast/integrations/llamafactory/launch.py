"""Several processes: where ``llamafactory-cli`` would start torchrun on its own script, ours starts it on ours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from llamafactory.extras.misc import find_available_port, get_device_count, is_env_enabled, use_kt, use_ray

ALLOCATION = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TORCH_NCCL_AVOID_RECORD_STREAMS": "1"}


def wants_processes() -> bool:
    """Whether LLaMA-Factory would start torchrun here: several devices or FORCE_TORCHRUN, and no launcher yet."""
    several = get_device_count() > 1 and not use_ray() and not use_kt()
    return "LOCAL_RANK" not in os.environ and (several or is_env_enabled("FORCE_TORCHRUN"))


def torchrun(words: Sequence[str], env: Mapping[str, str]) -> list[str]:
    """The command that trains in several processes, as LLaMA-Factory's variables in ``env`` say."""
    head = env.get("MASTER_ADDR", "127.0.0.1"), env.get("MASTER_PORT") or str(find_available_port())
    nodes, processes = env.get("NNODES", "1"), env.get("NPROC_PER_NODE", str(get_device_count()))
    if "RDZV_ID" in env:  # elastic
        if "MIN_NNODES" in env and "MAX_NNODES" in env:
            nodes = f"{env['MIN_NNODES']}:{env['MAX_NNODES']}"
        meeting = ["--rdzv-id", env["RDZV_ID"], "--rdzv-backend", "c10d", "--rdzv-endpoint", ":".join(head)]
        meeting += ["--max-restarts", env.get("MAX_RESTARTS", "0")]
    else:
        meeting = ["--node-rank", env.get("NODE_RANK", "0"), "--master-addr", head[0], "--master-port", head[1]]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", processes]
    return [*launcher, *meeting, "-m", "sar_fast", "llamafactory", "train", *words]


def launch(words: Sequence[str]) -> int:
    """Train in several processes; the exit code of the launcher."""
    env = {**(ALLOCATION if is_env_enabled("OPTIM_TORCH", "1") else {}), **os.environ}
    return subprocess.run(torchrun(words, os.environ), env=env, check=False).returncode
