"""A disk that really is full while real processes write a checkpoint: what was whole stays, and the run goes on."""

from __future__ import annotations

import importlib.util
import os
import subprocess

import pytest

from sar_fast.lab.training.checkpoints import checkpoints, last_complete
from tests.training.runs import flags, history, launch
from tests.training.samples import REPOSITORY


@pytest.fixture
def small_disk(tmp_path):
    """(bytes) -> a folder on a file system of that size; again with another size, it grows."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size: int) -> None:
        mounted = os.path.ismount(folder)
        options = f"remount,size={size}" if mounted else f"size={size}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode and not mounted:
            pytest.skip(f"a disk of its own size needs root: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr

    yield folder, resize
    if os.path.ismount(folder):
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, "zero2.json"], ids=["ddp", "zero2"])
def test_two_ranks_on_a_full_disk(small_disk, tmp_path, config):
    """The second checkpoint does not fit: both ranks stop and say so; with more room the run resumes and ends alike."""
    if config and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install sar_fast[deepspeed]")
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    changes |= {"deepspeed": REPOSITORY / "experiments" / "deepspeed" / config} if config else {}
    assert launch(flags(tmp_path / "whole", **changes)).returncode == 0
    size = sum(p.stat().st_size for p in (tmp_path / "whole" / "checkpoint-2").rglob("*") if p.is_file())
    disk, resize = small_disk
    resize(int(size * 1.5))
    stopped = launch(flags(disk / "run", **changes))
    assert stopped.returncode != 0
    assert f"checkpoint {disk}/run/checkpoint-4 could not be written" in stopped.stderr
    assert f"the last whole one is {disk}/run/checkpoint-2" in stopped.stderr
    assert last_complete(disk / "run").name == "checkpoint-2"
    resize(size * 5)
    done = launch(flags(disk / "run", resume_from_checkpoint="true", **changes))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming from {disk}/run/checkpoint-2" in done.stderr
    assert history(disk / "run") == pytest.approx(history(tmp_path / "whole"), rel=1e-5)
    assert [p.name for p in checkpoints(disk / "run")] == ["checkpoint-2", "checkpoint-4"]
