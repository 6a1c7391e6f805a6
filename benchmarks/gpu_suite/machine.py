"""What ran where: facts that every record carries, and the slice that prints them."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from gpu_suite.keys import code_key

REHEARSAL = "rehearsal on a CPU"
_QUERY = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")


def nvidia_smi() -> dict[str, str]:
    """The first GPU's name, driver and clocks as they are now; empty where there is no nvidia-smi that answers."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_QUERY, (x.strip() for x in answer.splitlines()[0].split(","))))


def about(rehearse: bool) -> dict[str, Any]:
    """What tells this run's records from others': the GPU and the measured code, with versions beside."""
    import torch

    from sar_fast.lab.run.run_metadata import commit, versions

    smi = {} if rehearse else nvidia_smi()
    return {
        "gpu": REHEARSAL if rehearse else smi.get("name", torch.cuda.get_device_name()),
        "key": code_key(),
        "driver": smi.get("driver_version"),
        "cuda": torch.version.cuda,
        "commit": commit(),
        "versions": versions(),
    }


def facts(bench: Any) -> None:
    """GPU, driver, clocks and versions."""
    import torch

    from sar_fast.backends.protocol import device_arch

    smi = {} if bench.tiny else nvidia_smi()
    arch = device_arch(torch.device(bench.device.name))
    bench.records.note("machine", "nvidia-smi", "facts", {}, arch=arch, **smi)
    print(json.dumps(bench.records.about, indent=1), flush=True)
