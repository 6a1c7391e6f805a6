"""Real processes on gloo: two ranks train, log and resume as one does, under DDP and DeepSpeed ZeRO-1, 2 and 3."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from sar_fast.lab.training.arguments import parse
from sar_fast.lab.training.checkpoints import checkpoints, last_complete
from sar_fast.lab.training.run import build, run
from tests.distributed_workers import run_ranks
from tests.training.runs import SCRIPT, environment, flags, history, launch, lines, parameters, train
from tests.training.samples import REPOSITORY

DEEPSPEED = REPOSITORY / "experiments" / "deepspeed"
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install sar_fast[deepspeed]"
)
TASKS = {
    "sft": {},
    "control": {"custom_trainer": "control_sft", "visual_contrastive_loss_weight": 0.5},
    "sar": {"use_sar": True, "sar_activation_layer_k": 2, "sar_beta": 1e-3, "sav_grad": True},
}
LAUNCHES = {
    "ddp-2": (2, None),
    **{f"zero{stage}-{world}": (world, f"zero{stage}.json") for stage in (1, 2, 3) for world in (1, 2)},
}
# fp32 rounding, 1e-6 of a gradient, is amplified by Adam's g / sqrt(g^2) where a gradient is near zero; over three
# steps of 1e-3 that moves losses of order 1 by less than 1e-3 and Gini coefficients by less
SAME = {"rel": 1e-3, "abs": 1e-5}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Each task's run in this process, micro-batches of four where two ranks take two each."""
    finished: dict[str, tuple] = {}

    def get(task: str):
        if task not in finished:
            out = tmp_path_factory.mktemp(task)
            torch.set_num_threads(1)
            train(out, per_device_train_batch_size=4, gradient_accumulation_steps=2, **TASKS[task])
            finished[task] = out
        return finished[task]

    return get


def assert_same_run(got, expected):
    for name in ("loss", "grad_norm", "loss_text_gen", "loss_contrastive"):
        assert history(got, name) == pytest.approx(history(expected, name), **SAME), name
    logs = [lines(out / "gradient_sparsity.jsonl") for out in (got, expected)]
    assert [line["step"] for line in logs[0]] == [1, 2, 3]
    for mine, theirs in zip(*logs):
        assert mine == pytest.approx(theirs, **SAME)


def training_worker(rank, world, words):
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # as a launcher does; the group is there already
    os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    arguments = parse(words)
    trainer, checkpoint = build(arguments)
    run(trainer, arguments, checkpoint)


@pytest.mark.everyday(by=["processes"])
@pytest.mark.parametrize("by", ["processes", "torchrun"])
def test_two_ranks_equal_one(one_process, tmp_path, by):
    """DDP with the contrastive loss, whose negatives are the other rank's samples."""
    words = flags(tmp_path, gradient_accumulation_steps=2, **TASKS["control"])
    if by == "processes":
        run_ranks(training_worker, words)
    else:
        done = launch(words)
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path, one_process("control"))


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("how", LAUNCHES)
def test_every_launch_equals_one_process(one_process, tmp_path, how, task):
    world, config = LAUNCHES[how]
    changes = dict(TASKS[task])
    if config:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install sar_fast[deepspeed]")
        changes["deepspeed"] = DEEPSPEED / config
    words = flags(tmp_path, per_device_train_batch_size=4 // world, gradient_accumulation_steps=2, **changes)
    done = launch(words, processes=0 if world == 1 else world)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path, one_process(task))
    # read as users read them: under ZeRO-3 transformers writes other names for the same weights
    expected = parameters(LlavaForConditionalGeneration.from_pretrained(one_process(task)))
    saved = parameters(LlavaForConditionalGeneration.from_pretrained(tmp_path))
    for name, weight in saved.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=5e-4)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("ninja", path=environment()["PATH"]) is None,
    reason="DeepSpeed compiles its optimizer for the CPU with g++ and ninja",
)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", ["zero2_offload", "zero3_offload"])
def test_offload_equals_one_process(one_process, tmp_path, config, bf16):
    """The shipped configurations as they are: optimizer (and weights) in the host's memory, DeepSpeed's own Adam."""
    words = flags(tmp_path, deepspeed=DEEPSPEED / f"{config}.json", gradient_accumulation_steps=2, bf16=bf16)
    done = launch(words, timeout=900)  # the first one compiles
    assert done.returncode == 0, done.stderr[-3000:]
    if not bf16:
        assert_same_run(tmp_path, one_process("sft"))
        return
    mine, theirs = (lines(out / "gradient_sparsity.jsonl")[0] for out in (tmp_path, one_process("sft")))
    for key, value in theirs.items():
        if "gini" in key or "L1" in key:
            assert mine[key] == pytest.approx(value, rel=0.1), key


def kill_in_mid_run(words: list[str], processes: int, after: callable, timeout: float = 200) -> None:
    """Starts a run and ends its whole process group by SIGKILL as soon as ``after()`` is true."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    started = subprocess.Popen(
        [*launcher, str(SCRIPT), *words],
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + timeout
    while not after():
        assert started.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "ddp-2", "zero1-2", "zero2-2", "zero3-2"])
def test_killed_and_resumed(tmp_path, how):
    """kill -9 in mid-run; the resumed run's curve, gradient log and weights are those of a run left alone."""
    world, config = LAUNCHES.get(how, (0, None))
    changes = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "custom_trainer": "control_sft"}
    if config:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install sar_fast[deepspeed]")
        changes["deepspeed"] = DEEPSPEED / config
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert launch(flags(whole, **changes), processes=world).returncode == 0
    kill_in_mid_run(flags(killed, **changes), world, lambda: last_complete(killed) is not None)
    assert not (killed / "train_results.json").exists()
    done = launch(flags(killed, resume_from_checkpoint="true", **changes), processes=world)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from" in done.stderr
    assert history(killed) == pytest.approx(history(whole), rel=1e-5)
    a, b = (lines(out / "gradient_sparsity.jsonl") for out in (killed, whole))
    assert [line["step"] for line in a] == [line["step"] for line in b] == list(range(1, 9))
    for mine, theirs in zip(a, b):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-7)
    weights = [load_file(out / "model.safetensors") for out in (killed, whole)]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_under_zero(one_process, tmp_path, stage):
    """Weights and gradients in bf16, 2^-8 of a value: near the fp32 run, and no value is off by ranks or loss scale."""
    words = flags(tmp_path, deepspeed=DEEPSPEED / f"zero{stage}.json", bf16=True, gradient_accumulation_steps=2)
    done = launch(words)
    assert done.returncode == 0, done.stderr[-3000:]
    mine, theirs = (lines(out / "gradient_sparsity.jsonl")[0] for out in (tmp_path, one_process("sft")))
    for key, value in theirs.items():
        if "gini" in key or "L1" in key:
            assert mine[key] == pytest.approx(value, rel=0.1), key


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("asked", [{"tensor_parallel": {"autotp_size": 2}}, {"sequence_parallel_size": 2}], ids=str)
def test_models_split_by_deepspeed_are_refused(tmp_path, asked):
    config = json.loads((DEEPSPEED / "zero1.json").read_text()) | asked
    (tmp_path / "split.json").write_text(json.dumps(config))
    done = launch(flags(tmp_path / "out", deepspeed=tmp_path / "split.json", **TASKS["sar"]))
    assert done.returncode != 0
    assert "every sample is trained on one rank" in done.stderr
    assert "Traceback" not in done.stderr.split("ChildFailedError")[0].split("error:")[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_ranks_stream_as_one(tmp_path):
    """Samples with two pictures: ranks take turns in the stream, and each keeps its samples' own pictures."""
    common = {"streaming": True, "dataset": "shapes_pairs"}
    assert launch(flags(tmp_path / "two", **common)).returncode == 0
    train(tmp_path / "one", per_device_train_batch_size=4, **common)
    assert history(tmp_path / "two") == pytest.approx(history(tmp_path / "one"), **SAME)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 1, 2])
def test_another_world_size(tmp_path, stage):
    """Two ranks up to a checkpoint, then one on batches twice as large; ZeRO's by way of a universal checkpoint."""
    changes = {"save_strategy": "steps", "save_steps": 2}
    if stage:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install sar_fast[deepspeed]")
        changes["deepspeed"] = DEEPSPEED / f"zero{stage}.json"
    assert launch(flags(tmp_path / "run", **changes)).returncode == 0
    expected = history(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    if stage:
        checkpoint = tmp_path / "run" / "checkpoint-2"
        convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        folders = ["--input_folder", str(checkpoint / "global_step2"), "--output_folder", str(checkpoint / "universal")]
        few = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        subprocess.run([*convert, *folders, *few], check=True, env=environment(), capture_output=True)
        (checkpoint / "latest_universal").write_text("universal")
        config = json.loads(changes["deepspeed"].read_text()) | {"checkpoint": {"load_universal": True}}
        changes["deepspeed"] = tmp_path / "universal.json"
        changes["deepspeed"].write_text(json.dumps(config))
    words = flags(tmp_path / "run", per_device_train_batch_size=4, resume_from_checkpoint="true", **changes)
    done = launch(words, processes=0)
    assert done.returncode == 0, done.stderr[-3000:]
    assert history(tmp_path / "run") == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@needs_deepspeed
def test_zero_checkpoints_become_plain_ones(tmp_path):
    """zero_to_fp32.py on a ZeRO-3 checkpoint gives weights that load with and without SAR."""
    from sar_fast import SARConfig, apply_sar
    from sar_fast.lab.miniature.checkpoint import load_miniature

    words = flags(tmp_path, deepspeed=DEEPSPEED / "zero3.json", save_strategy="steps", save_steps=3)
    assert launch(words).returncode == 0
    (checkpoint,) = checkpoints(tmp_path)
    converted = tmp_path / "fp32"
    subprocess.run(
        [sys.executable, str(checkpoint / "zero_to_fp32.py"), str(checkpoint), str(converted), "--safe_serialization"],
        check=True,
        env=environment(),
        capture_output=True,
    )
    weights = load_file(converted / "model.safetensors")
    expected = load_file(tmp_path / "model.safetensors")
    model, _ = load_miniature()
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert not missing
    assert all(torch.equal(weights[n], expected[n]) for n in expected if n in weights)
    ids = torch.full((1, 70), 4)
    ids[:, 64:] = 7
    inputs = {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 64, 64)}
    with torch.no_grad():
        plain = model(**inputs).logits
        with apply_sar(model, SARConfig(activation_layer_k=2, beta=1e-3)):
            reweighted = model(**inputs).logits
    assert not torch.equal(plain, reweighted)


@pytest.mark.slow
@needs_deepspeed
def test_rows_without_images_under_zero3(tmp_path):
    """One rank's batch has no image: it runs the vision encoder on a blank one, or the other would wait for ever."""
    rows = []
    for n in range(16):
        row = {
            "messages": [
                {"role": "user", "content": "Where is the red circle?"},
                {"role": "assistant", "content": "left"},
            ]
        }
        if n % 2:
            row["messages"][0]["content"] = "<image>" + row["messages"][0]["content"]
            row["images"] = [str(REPOSITORY / "experiments/data/images/000.png")]
        rows.append(row)
    (tmp_path / "mixed.json").write_text(json.dumps(rows))
    words = flags(
        tmp_path / "out", dataset=tmp_path / "mixed.json", per_device_train_batch_size=1,
        deepspeed=DEEPSPEED / "zero3.json",
    )  # fmt: skip
    done = launch(words, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(history(tmp_path / "out")) == 3
