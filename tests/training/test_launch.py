"""The launch scripts, run for real: schedulers and remote shells are small scripts on PATH that act on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.training.runs import environment, flags, history, launch
from tests.training.samples import REPOSITORY

LAUNCH = REPOSITORY / "experiments" / "launch"
ECHO = f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.getcwd(), *sys.argv]))\n"
# sbatch takes the script from stdin, as SLURM's does, and runs it at once as the job 4242
SBATCH = """#!/usr/bin/env bash
cat > "$SPOOL/job.sh"
export SLURM_JOB_ID=4242 SLURM_JOB_NODELIST=pair
export SLURM_NNODES="$(sed -n 's/^#SBATCH --nodes=//p' "$SPOOL/job.sh")"
bash "$SPOOL/job.sh"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ "$*" == "show hostnames pair" ]]; then printf 'localhost\\nlocalhost\\n'; else echo "$*" >> "$SPOOL/scontrol"; fi
"""
SRUN = """#!/usr/bin/env bash
echo "$*" >> "$SPOOL/srun"
while [[ "$1" == --* ]]; do shift; done
for _ in $(seq "$SLURM_NNODES"); do "$@" & tasks+=($!); done
code=0
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit $code
"""
# ssh HOST COMMAND and pdsh -w HOST,HOST COMMAND run the command here; %n is the host's number in the list
SSH = """#!/usr/bin/env bash
echo "$*" >> "$SPOOL/ssh"
while [[ "$1" == -* ]]; do shift 2; done
[[ "$2 $3" == "hostname -I" ]] && { echo 127.0.0.1; exit; }
[[ "$2" == hostname ]] && exec hostname
exit 1
"""
PDSH = """#!/usr/bin/env bash
echo "$*" >> "$SPOOL/pdsh"
while [[ "$1" == -* ]]; do
  case "$1" in -S) shift ;; -w) hosts="$2"; shift 2 ;; *) shift 2 ;; esac
done
number=0 code=0
for host in ${hosts//,/ }; do
  bash -c "${*//%n/$number}" & tasks+=($!)
  number=$((number + 1))
done
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit $code
"""


@pytest.fixture
def on_path(tmp_path):
    """(name=text of a script, ...) -> the environment of a process that finds them first on its PATH."""

    def install(**scripts: str) -> dict[str, str]:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, text in scripts.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (tmp_path / "spool").mkdir(exist_ok=True)
        found = environment(SPOOL=str(tmp_path / "spool"), PYTHON=sys.executable)
        return found | {"PATH": f"{folder}{os.pathsep}{found['PATH']}"}

    return install


def script(name: str, *words: object, env: dict[str, str], timeout: float = 300) -> subprocess.CompletedProcess:
    command = ["bash", str(LAUNCH / name), *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, cwd="/")


@pytest.mark.parametrize(
    ("name", "words", "program"),
    [
        ("one_node.sh", [], "python"),
        ("torchrun.sh", ["--nodes", "2", "--node_rank", "1", "--head", "a", "--address", "b"], "python"),
        ("hostfile.sh", ["--hostfile", "HOSTS"], "deepspeed"),
        ("hostfile.sh", ["--hostfile", "HOSTS", "--node_rank", "1", "--head", "a"], "deepspeed"),
        ("accelerate.sh", ["--nodes", "2", "--node_rank", "1", "--head", "a"], "accelerate"),
    ],
)
def test_what_a_dry_run_prints_is_what_runs(on_path, tmp_path, name, words, program):
    (tmp_path / "HOSTS").write_text("a slots=2\nb slots=2\n")
    words = [str(tmp_path / "HOSTS") if w == "HOSTS" else w for w in words]
    env = on_path(**{program: ECHO}) | {"PYTHON": "python"}
    common = (*words, "--gpus", "2", "c.yaml", "--run_name", "two words", "--template", "$HOME/*'\"")
    ran = script(name, *common, env=env)
    assert ran.returncode == 0, ran.stderr
    folder, _, *arguments = json.loads(ran.stdout)
    assert folder == str(REPOSITORY)
    assert arguments[-5:] == ["c.yaml", "--run_name", "two words", "--template", "$HOME/*'\""]
    printed = script(name, "--dry-run", *common, env=env).stdout
    again = subprocess.run(["bash", "-c", printed], env=env, capture_output=True, text=True, check=True, cwd="/")
    assert json.loads(again.stdout)[2:] == arguments


def test_the_slurm_job_is_the_one_shown_and_comes_back_when_it_fails(on_path, tmp_path):
    """Not for ever: a job that was put back --requeues times ends with its error."""
    env = on_path(sbatch=SBATCH, scontrol=SCONTROL, srun="#!/usr/bin/env bash\nexit 7\n")
    own = ("--nodes", "2", "--partition", "gpu", "--requeues", "3", "--gpus", "1")
    words = (*own, "c.yaml", "--run_name", "two words")
    failed = script("slurm.sh", *words, env=env)
    assert failed.returncode == 7
    job, calls = tmp_path / "spool" / "job.sh", tmp_path / "spool" / "scontrol"
    assert job.read_text() == script("slurm.sh", "--dry-run", *words, env=env).stdout
    assert "#SBATCH --partition=gpu\n" in job.read_text()
    assert calls.read_text() == "requeue 4242\n"
    assert script("slurm.sh", *words, env=env | {"SLURM_RESTART_COUNT": "2"}).returncode == 7
    assert calls.read_text() == "requeue 4242\n" * 2
    assert script("slurm.sh", *words, env=env | {"SLURM_RESTART_COUNT": "3"}).returncode == 7
    assert calls.read_text() == "requeue 4242\n" * 2
    for wrong, message in (
        (("--gpus", "1", "c.yaml"), "--nodes is missing"),
        (("--nodes", "two", "--gpus", "1", "c.yaml"), "--nodes must be a number"),
        (("--nodes", "2", "--requeues", "x", "--gpus", "1", "c.yaml"), "--requeues must be a number"),
    ):
        refused = script("slurm.sh", *wrong, env=env)
        assert refused.returncode == 2
        assert message in refused.stderr


@pytest.mark.parametrize("name", sorted(p.name for p in LAUNCH.glob("*.sh") if p.name != "common.sh"))
def test_a_wrong_number_of_gpus_and_help(name):
    wrong = script(name, "--gpus", "x", "c.yaml", env=environment())
    assert wrong.returncode == 2
    assert "--gpus must be a number" in wrong.stderr
    shown = script(name, "--help", env=environment())
    assert shown.returncode == 0
    assert f"experiments/launch/{name}" in shown.stdout
    assert script(name, env=environment()).returncode == 2


def test_a_wrong_hostfile_is_named(on_path, tmp_path):
    env = on_path(deepspeed=ECHO)
    (tmp_path / "HOSTS").write_text("a b c\n")
    for words, message in (
        (("c.yaml",), "--hostfile is missing"),
        (("--hostfile", tmp_path / "gone", "c.yaml"), "gone does not exist"),
        (("--hostfile", tmp_path / "HOSTS", "c.yaml"), "has no line 'name slots=N'"),
    ):
        refused = script("hostfile.sh", "--gpus", "1", *words, env=env)
        assert refused.returncode == 2
        assert message in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_node.sh", "accelerate.sh"])
def test_one_machine_trains(on_path, tmp_path, name):
    env = on_path(accelerate=f'#!/bin/sh\nexec {sys.executable} -m accelerate.commands.accelerate_cli "$@"\n')
    done = script(name, "--gpus", "2", *flags(tmp_path / "run"), env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "run_metadata.json").read_text())["world_size"] == 2
    assert (tmp_path / "run" / "all_results.json").is_file()


@pytest.mark.slow
def test_slurm_trains_as_two_ranks_of_one_machine(on_path, tmp_path):
    """Two tasks of one process each find each other by the job's rendezvous; a second submission resumes."""
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    assert launch(flags(tmp_path / "one", **changes)).returncode == 0
    env = on_path(sbatch=SBATCH, scontrol=SCONTROL, srun=SRUN)
    done = script("slurm.sh", "--nodes", "2", "--gpus", "1", *flags(tmp_path / "two", **changes), env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "spool" / "scontrol").exists()
    assert "--kill-on-bad-exit=1" in (tmp_path / "spool" / "srun").read_text()
    assert history(tmp_path / "two") == pytest.approx(history(tmp_path / "one"), rel=1e-4)
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    again = script("slurm.sh", "--nodes", "2", "--gpus", "1", *flags(tmp_path / "two", **changes), env=env)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"resuming from {tmp_path / 'two' / 'checkpoint-2'}" in again.stderr
    assert history(tmp_path / "two") == pytest.approx(history(tmp_path / "one"), rel=1e-4)


@pytest.mark.slow
def test_the_deepspeed_launcher_reaches_its_hosts(on_path, tmp_path):
    """hostfile.sh from one machine: the launcher asks the first host its address by ssh and starts all by pdsh."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install sar_fast[deepspeed]")
    changes = {"deepspeed": REPOSITORY / "experiments" / "deepspeed" / "zero2.json", "run_name": "two words"}
    assert launch(flags(tmp_path / "one", **changes)).returncode == 0
    (tmp_path / "HOSTS").write_text("first slots=1\nsecond slots=1\n")
    env = on_path(ssh=SSH, pdsh=PDSH)
    words = ("--hostfile", tmp_path / "HOSTS", "--gpus", "1", *flags(tmp_path / "two", **changes))
    done = script("hostfile.sh", *words, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "first hostname -I" in (tmp_path / "spool" / "ssh").read_text()
    assert "-w first,second" in (tmp_path / "spool" / "pdsh").read_text()
    metadata = json.loads((tmp_path / "two" / "run_metadata.json").read_text())
    assert metadata["world_size"] == 2
    assert metadata["configuration"]["training"]["run_name"] == "two words"
    assert history(tmp_path / "two") == pytest.approx(history(tmp_path / "one"), rel=1e-4)
