"""Two machines: network namespaces with their own addresses, a real multi-node launch, one of them killed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from sar_fast.lab.training.checkpoints import last_complete
from tests.training.runs import environment, flags, history, launch, lines
from tests.training.samples import REPOSITORY

LAUNCH = REPOSITORY / "experiments" / "launch"


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True)


@pytest.fixture
def nodes():
    """Two namespaces joined by a cable, 10.77.0.1 and 10.77.0.2, both calling it eth0."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the `ip` command")
    tag = uuid.uuid4().hex[:6]
    names = [f"sar{tag}a", f"sar{tag}b"]
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine allows no network namespaces: {error.stderr.decode().strip()}")
    with contextlib.ExitStack() as stack:
        stack.callback(ip, "netns", "del", names[0], check=False)
        ip("netns", "add", names[1])
        stack.callback(ip, "netns", "del", names[1], check=False)
        ip("link", "add", f"{tag}a", "type", "veth", "peer", "name", f"{tag}b")
        for number, (name, end) in enumerate(zip(names, (f"{tag}a", f"{tag}b")), start=1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "link", "set", end, "name", "eth0")
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
        for name in names:
            end_processes(name)


def end_processes(node: str) -> None:
    """kill -9 of every process in a namespace: torchrun's worker has a session of its own."""
    pids = subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True).stdout.split()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def start(node: str, command: list[str], log: Path) -> subprocess.Popen:
    env = environment(GLOO_SOCKET_IFNAME="eth0", PYTHON=sys.executable)
    return subprocess.Popen(
        ["ip", "netns", "exec", node, *command], env=env, stdout=log.open("w"), stderr=subprocess.STDOUT,
        start_new_session=True, cwd=log.parent,
    )  # fmt: skip


def commands(kind: str, folder: Path, words: list[str]) -> list[list[str]]:
    if kind == "torchrun":
        own = ["bash", str(LAUNCH / "torchrun.sh"), "--nodes", "2", "--head", "10.77.0.1", "--gpus", "1"]
        return [[*own, "--node_rank", str(rank), "--address", f"10.77.0.{rank + 1}", *words] for rank in (0, 1)]
    hosts = folder / "hosts"
    hosts.write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    own = ["bash", str(LAUNCH / "hostfile.sh"), "--hostfile", str(hosts), "--head", "10.77.0.1", "--gpus", "1"]
    return [[*own, "--node_rank", str(rank), *words] for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchrun", "deepspeed"])
def test_two_nodes_train_as_two_ranks_of_one(nodes, tmp_path, kind):
    changes = {"custom_trainer": "control_sft"}
    if kind == "deepspeed":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install sar_fast[deepspeed]")
        changes["deepspeed"] = REPOSITORY / "experiments" / "deepspeed" / "zero2.json"
    assert launch(flags(tmp_path / "one", **changes)).returncode == 0
    calls = commands(kind, tmp_path, flags(tmp_path / "two", **changes))
    logs = [tmp_path / f"{kind}{rank}.log" for rank in (0, 1)]
    running = [start(*each) for each in zip(nodes, calls, logs)]
    codes = [p.wait(timeout=200) for p in running]
    assert codes == [0, 0], [log.read_text()[-2000:] for log in logs]
    assert history(tmp_path / "two") == pytest.approx(history(tmp_path / "one"), rel=1e-4)


@pytest.mark.slow
def test_a_lost_node_stops_the_other_and_the_job_resumes(nodes, tmp_path):
    """kill -9 of everything on node 1: node 0 ends by itself and says which connection broke; then both resume."""
    changes = {"max_steps": 40, "save_strategy": "steps", "save_steps": 5, "save_total_limit": 2}
    words = flags(tmp_path / "run", resume_from_checkpoint="true", **changes)
    logs = [tmp_path / f"{rank}.log" for rank in (0, 1)]
    running = [start(*each) for each in zip(nodes, commands("torchrun", tmp_path, words), logs)]
    end = time.monotonic() + 120
    while last_complete(tmp_path / "run") is None:
        assert all(p.poll() is None for p in running), [log.read_text()[-2000:] for log in logs]
        assert time.monotonic() < end
        time.sleep(0.02)
    end_processes(nodes[1])
    assert running[0].wait(timeout=120) != 0
    # reset, not closed, where something had not been read yet
    broken = r"Connection closed by peer \[10\.77\.0\.2\]|\[10\.77\.0\.2\]:\d+: Connection reset by peer"
    assert re.search(broken, logs[0].read_text())
    reached = last_complete(tmp_path / "run")
    again = [start(*each) for each in zip(nodes, commands("torchrun", tmp_path, words), logs)]
    assert [p.wait(timeout=200) for p in again] == [0, 0], logs[0].read_text()[-2000:]
    assert f"resuming from {reached}" in logs[0].read_text()
    assert len(history(tmp_path / "run")) == 40
    assert [line["step"] for line in lines(tmp_path / "run" / "gradient_sparsity.jsonl")] == list(range(1, 41))
