"""SAR inside the real LLaMA-Factory, with small models on a CPU: it trains what our own Trainer trains.

    python tests/acceptance/llamafactory.py

makes an environment in results/llamafactory/env (PyPI; 6 GB), runs every case below in it and prints a table.
``--python`` names the interpreter of an environment that is there already; words choose cases. About 12 minutes on two
cores beside the installation. The exit code is 1 if a case fails; logs and runs stay in results/llamafactory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
VERSIONS = ["torch==2.10.0", "torchvision==0.25.0", "torchaudio==2.10.0", "transformers==5.5.4", "llamafactory==0.9.5"]
BESIDE = ["deepspeed", "ninja", "jieba", "nltk", "rouge_chinese", "wandb"]  # ZeRO, prediction, the source's commands
SAR = {"use_sar": True, "sar_activation_layer_k": 2, "sar_beta": 1e-3, "sav_grad": True}
CONTROL = {"custom_trainer": "control_sft", "visual_contrastive_loss_weight": 0.5}
SHARED = {  # the same to both Trainers
    "finetuning_type": "full",
    "learning_rate": 1e-3,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "seed": 3,
}
TRAIN = SHARED | {
    "stage": "sft",
    "do_train": True,
    "cutoff_len": 2048,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "disable_shuffling": True,
    "dataset_dir": "experiments/data",
    "media_dir": "experiments/data",
}
MODELS = {  # model type -> its own keys
    "llava": {"model_name_or_path": "miniature", "template": "llava", "dataset": "shapes_llava"},
    "qwen2_5_vl": {"model_name_or_path": "qwen", "template": "qwen2_vl", "dataset": "shapes_pairs"},
}
FP32 = {"rtol": 2e-5, "atol": 2e-6}
GRADIENTS = (
    "gradient_analysis/avg_visual_token_grad_L1",
    "gradient_analysis/avg_text_token_grad_L1",
    "attention_grad_sparsity_per_layer/layer_0_q_gini",
    "attention_grad_sparsity_agg/avg_deep_k_gini",
)
SOURCE = """--do_train --dataset llava_instruct_50k --finetuning_type full --overwrite_output_dir
--per_device_train_batch_size 2 --gradient_accumulation_steps 8 --lr_scheduler_type cosine --logging_steps 10
--save_steps 1000 --learning_rate 5e-6 --num_train_epochs 1.0 --plot_loss --bf16 --report_to wandb"""


@dataclasses.dataclass
class Work:
    """Where runs lie, and how they are started; a run of one name is made once."""

    folder: Path
    python: Path
    made: set[str] = dataclasses.field(default_factory=set)

    def call(self, name: str, command: list[Any], code: int = 0, **env: str) -> str:
        """What a command wrote; its log is NAME.log. An exit code other than ``code`` fails the case."""
        own = {
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))),
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
            "WANDB_DIR": str(self.folder),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.folder / "hub"),
            "PYTHONWARNINGS": "ignore",
        }
        done = subprocess.run(
            [*map(str, command)], cwd=ROOT, env=os.environ | own | env, capture_output=True, text=True, timeout=900
        )
        log = self.folder / f"{name}.log"
        log.write_text(f"{command}\n{done.stdout}\n{done.stderr}")
        if done.returncode != code:
            raise AssertionError(f"exit code {done.returncode}, see {log}: {done.stderr.strip()[-400:]}")
        return done.stderr if code else done.stdout + done.stderr

    def ours(self, command: str, *words: Any) -> list[Any]:
        return [self.python, "-m", "sar_fast", "llamafactory", command, *words]

    def inside(self, *words: Any) -> list[Any]:
        return [self.python, "-m", "tests.acceptance.llamafactory_inside", *words]

    def file(self, name: str, values: dict[str, Any]) -> Path:
        """A YAML file of a run whose results are in the folder of its name."""
        if values.get("model_name_or_path") == "qwen":
            values = values | {"model_name_or_path": str(self.folder / "qwen")}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values | {"output_dir": str(self.folder / name)}))
        return path

    def train(self, name: str, values: dict[str, Any], record: bool = False, **env: str) -> Path:
        """The folder of a run of ``sar-fast llamafactory train``, whose batches are kept if that is asked."""
        if name not in self.made:
            file = self.file(name, values)
            kept = self.inside("record", self.folder / f"{name}.pt", file)
            self.call(name, kept if record else self.ours("train", file), **env)
            self.made.add(name)
        return self.folder / name


def history(run: Path, key: str = "loss") -> list[float]:
    lines = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [line[key] for line in lines if key in line]


def gradients(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "gradient_sparsity.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, np.ndarray]:
    """By name, without the ``model.`` that transformers 5.5 writes before some of LLaVA's, and reads either way."""
    (file,) = run.glob("*.safetensors")
    return {name.removeprefix("model."): value for name, value in load_file(file).items()}


def assert_near(one: Any, other: Any, what: str, **tolerance: float) -> float:
    """The largest difference of two numbers, lists or dicts of arrays, which must be within the tolerance."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), f"{what}: {sorted(one.keys() ^ other.keys())} in one alone"
        return max(assert_near(one[key], other[key], f"{what}, {key}", **tolerance) for key in one)
    np.testing.assert_allclose(one, other, err_msg=what, **(FP32 | tolerance))
    return float(np.max(np.abs(np.subtract(one, other)), initial=0.0))


def assert_near_logs(one: Path, other: Path, rtol: float) -> None:
    """Of gradient sparsity, but for the epoch: how much data there is differs."""
    for values, expected in zip(gradients(one), gradients(other), strict=True):
        assert_near({**values, "epoch": 0}, {**expected, "epoch": 0}, "gradient log", rtol=rtol)


def assert_far(one: list[float], other: list[float], what: str) -> None:
    assert min(abs(a / b - 1) for a, b in zip(one, other, strict=True)) > 1e-3, f"{what}: {one} and {other}"


# cases: what was found, in words


def without_sar(work: Work, model: str) -> str:
    """Nothing of ours asked: every bit is theirs, although gradients were measured."""
    values = TRAIN | MODELS[model]
    run = work.train(f"{model}-plain", values)
    path = {} if model == "qwen2_5_vl" else {"model_name_or_path": str(ROOT / "sar_fast/assets/miniature")}
    file = work.file(f"{model}-stock", values | path)
    work.call(f"{model}-stock", [work.python.parent / "llamafactory-cli", "train", file])
    stock = work.folder / f"{model}-stock"
    assert history(run) == history(stock), (history(run), history(stock))
    assert all(np.array_equal(a, b) for a, b in zip(weights(run).values(), weights(stock).values(), strict=True))
    assert [line["step"] for line in gradients(run)] == [1, 2, 3]
    return f"losses {history(run)} and all weights bit-equal to llamafactory-cli's"


def with_sar(work: Work, model: str, name: str = "sar", **changes: Any) -> str:
    """Our own Trainer, on the batches that LLaMA-Factory made, gives the same losses, weights and gradient log."""
    values = TRAIN | MODELS[model] | SAR | changes
    run = work.train(f"{model}-{name}", values, record=True)
    same = {key: values[key] for key in (*SHARED, *SAR, *CONTROL) if key in values}
    same |= {
        "model_name_or_path": yaml.safe_load((work.folder / f"{model}-{name}.yaml").read_text())["model_name_or_path"]
    }
    same |= {"do_train": True, "dataset": "recorded", "per_device_train_batch_size": 1, "logging_steps": 1}
    own = work.folder / f"{model}-{name}-ours"
    flags = [word for key, value in (same | {"output_dir": own}).items() for word in (f"--{key}", value)]
    order = ["--train_sampling_strategy", "sequential"]
    work.call(own.name, work.inside("ours", work.folder / f"{model}-{name}.pt", *flags, *order))
    assert_near(history(run), history(own), "losses")
    difference = assert_near(weights(run), weights(own), "weights", atol=1e-4)
    assert set(GRADIENTS) <= gradients(run)[0].keys() or "freeze" in name, sorted(gradients(run)[0])
    assert_near_logs(run, own, rtol=2e-3)
    for key in ("loss_text_gen", "loss_contrastive") if "custom_trainer" in changes else ():
        assert_near(history(run, key), history(own, key), key)
    plain = work.train(f"{model}-plain", TRAIN | MODELS[model])
    assert_far(history(run), history(plain), "SAR changes nothing")
    return f"losses {[round(x, 6) for x in history(run)]} are our Trainer's; weights differ by {difference:.0e} at most"


def freeze(work: Work, model: str) -> str:
    return with_sar(work, model, "freeze", finetuning_type="freeze", learning_rate=1e-4)


def control(work: Work, model: str) -> str:
    return with_sar(work, model, "control", **CONTROL)


def lora(work: Work, model: str) -> str:
    """The first step's loss is the base model's; then adapters learn, and what is saved is PEFT's alone."""
    run = work.train(f"{model}-lora", TRAIN | MODELS[model] | SAR | {"finetuning_type": "lora", "learning_rate": 1e-2})
    full = work.train(f"{model}-sar", TRAIN | MODELS[model] | SAR, record=True)
    assert_near(history(run)[0], history(full)[0], "first loss")
    assert_far(history(run)[1:], history(full)[1:], "later losses")
    assert set(GRADIENTS) <= gradients(run)[0].keys()
    assert all("lora_" in key and "sar" not in key for key in weights(run)), sorted(weights(run))
    return f"losses {[round(x, 6) for x in history(run)]}, the first that of the full model"


def export(work: Work, model: str) -> str:
    """An adapter trained with SAR becomes a model of the base's own names, with nothing of SAR in it."""
    lora(work, model)
    base = ROOT / "sar_fast/assets/miniature" if model == "llava" else work.folder / "qwen"
    out = work.folder / f"{model}-exported"
    flags = ["--model_name_or_path", base, "--adapter_name_or_path", work.folder / f"{model}-lora"]
    flags += ["--template", MODELS[model]["template"], "--export_dir", out, "--infer_dtype", "float32"]
    work.call(out.name, work.ours("export", *flags))
    before, after = weights(base), weights(out)
    assert before.keys() == after.keys(), sorted(before.keys() ^ after.keys())
    changed = [key for key in after if not np.array_equal(before[key], after[key])]
    assert changed
    assert all("vision" not in key and "visual" not in key for key in changed), changed
    assert '"sar"' not in (out / "config.json").read_text()
    return f"{len(changed)} of {len(after)} tensors are merged ones, no other differs"


def evaluate(work: Work, model: str) -> str:
    """SAR is on in evaluation: the loss of the first batch is that of the first training step."""
    values = {"do_train": False, "do_eval": True, "eval_dataset": MODELS[model]["dataset"], "max_samples": 2}
    values |= {"dataset": None, "per_device_eval_batch_size": 2}
    run = work.train(f"{model}-eval", TRAIN | MODELS[model] | SAR | values)
    full = work.train(f"{model}-sar", TRAIN | MODELS[model] | SAR, record=True)
    loss = json.loads((run / "eval_results.json").read_text())["eval_loss"]
    assert_near(loss, history(full)[0], "evaluation and first step")
    return f"eval_loss {loss:.6f} is the first training loss"


def predict(work: Work, model: str) -> str:
    """Generated answers of the miniature, with SAR and without."""
    values = {"do_train": False, "do_predict": True, "predict_with_generate": True, "max_samples": 16, "dataset": None}
    values |= {"eval_dataset": "shapes_llava", "max_new_tokens": 8, "do_sample": False, "per_device_eval_batch_size": 4}
    answers = []
    for name, sar in (("predict", {}), ("predict-sar", SAR | {"sar_activation_layer_k": 4})):
        run = work.train(f"{model}-{name}", TRAIN | MODELS[model] | values | sar)
        lines = (run / "generated_predictions.jsonl").read_text().splitlines()
        answers.append([json.loads(line)["predict"] for line in lines])
    changed = sum(a != b for a, b in zip(*answers, strict=True))
    assert len(answers[0]) == 16
    assert changed, "SAR changes no answer"
    return f"{changed} of 16 answers differ from those without SAR"


def two_processes(work: Work, model: str) -> str:
    """Two ranks under DeepSpeed ZeRO-2 take the two micro-batches that one process accumulates."""
    values = TRAIN | MODELS[model] | SAR
    alone = work.train(f"{model}-accumulated", values | {"gradient_accumulation_steps": 2})
    zero = values | {"deepspeed": "experiments/deepspeed/zero2.json"}
    ranks = work.train(f"{model}-zero2", zero, FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert_near(history(ranks), history(alone), "losses", rtol=1e-4)
    difference = assert_near(weights(ranks), weights(alone), "weights", atol=1e-3)
    assert_near_logs(ranks, alone, rtol=5e-3)
    return (
        f"losses {[round(x, 5) for x in history(ranks)]} as of one process; weights differ by {difference:.0e} at most"
    )


def source_commands(work: Work, model: str) -> str:
    """The two training commands of the source document, on drawn pictures under the name of its dataset."""
    data = work.folder / "data"
    shutil.copytree(ROOT / "experiments/data", data, dirs_exist_ok=True)
    rows = json.loads((data / "shapes_llava.json").read_text())
    (data / "llava_instruct_50k.json").write_text(json.dumps(rows * 5))
    added = f"--template llava --dataset_dir {data} --media_dir {data} --use_cpu".split()
    control = ["--custom_trainer", "control_sft", "--visual_contrastive_loss_weight", "0.1"]
    for name, own in (("sft_grad_analysis", []), ("control_grad_analysis", control)):
        run = work.folder / name
        flags = ["--model_name_or_path", "miniature", *SOURCE.split(), *own, "--output_dir", run, "--run_name", name]
        work.call(name, work.ours("train", *flags, *added))
        assert set(GRADIENTS) <= gradients(run)[-1].keys()
        assert len(history(run)) == 1
        assert len(history(run, "loss_contrastive")) == bool(own)
        assert (run / "training_loss.png").is_file()
    logs = [file.read_bytes() for file in sorted(work.folder.glob("wandb/offline-run-*/*.wandb"))]  # in that order
    assert [(GRADIENTS[-1].encode() in log, b"loss_contrastive" in log) for log in logs] == [
        (True, False),
        (True, True),
    ]
    return f"both run; added: {' '.join(added)}"


def examples(work: Work, model: str) -> str:
    """The files of examples/llamafactory, as they are."""
    files = sorted((ROOT / "examples/llamafactory").glob("*.yaml"))
    for file in files:
        out = work.folder / file.stem
        work.call(file.stem, work.ours("train", file, f"output_dir={out}"))
        assert (out / "generated_predictions.jsonl").is_file() or len(history(out)) == 4, file
    return ", ".join(file.name for file in files)


def errors(work: Work, model: str) -> str:
    """One line, exit code 2, and nothing written."""
    file = work.file("errors", TRAIN | MODELS["llava"])
    flags = ["--model_name_or_path", "miniature", "--output_dir", work.folder / "errors"]
    wrong = {
        "unknown key sar_betta; did you mean sar_beta?": [file, "sar_betta=0.5"],
        "unknown flag --sar_betas; did you mean sar_beta?": [*flags, "--sar_betas", "0.5"],
        "--sar_beta must be left out without --use_sar": [file, "sar_beta=0.1"],
        "--sar_beta must be > 0": [file, "use_sar=true", "sar_beta=0"],
        "--sar_activation_layer_k must be at most the number of attention layers, 4": [
            file, "use_sar=true", "sar_activation_layer_k=9",
        ],
        "--neat_packing must be left out with --use_sar": [file, "use_sar=true", "neat_packing=true"],
        "argument --learning_rate": [*flags, "--learning_rate", "fast"],
        "--stage must be sft here": [file, "stage=pt"],
    }  # fmt: skip
    for number, (message, words) in enumerate(wrong.items()):
        text = work.call(f"error-{number}", work.ours("train", *words), code=2)
        last = text.strip().splitlines()[-1]
        assert last.startswith("error: "), text
        assert message in last, (message, last)
        assert not (work.folder / "errors").exists(), message
    return f"{len(wrong)} wrong command lines end in one line each"


CASES: dict[str, tuple[Callable[[Work, str], str], tuple[str, ...]]] = {
    "without_sar": (without_sar, ("llava", "qwen2_5_vl")),
    "with_sar": (with_sar, ("llava", "qwen2_5_vl")),
    "freeze": (freeze, ("llava", "qwen2_5_vl")),
    "control": (control, ("llava", "qwen2_5_vl")),
    "lora": (lora, ("llava", "qwen2_5_vl")),
    "export": (export, ("llava", "qwen2_5_vl")),
    "evaluate": (evaluate, ("llava", "qwen2_5_vl")),
    "predict": (predict, ("llava",)),
    "two_processes": (two_processes, ("llava", "qwen2_5_vl")),
    "source_commands": (source_commands, ("llava",)),
    "examples": (examples, ("llava",)),
    "errors": (errors, ("llava",)),
}


def make_environment(folder: Path) -> Path:
    """The interpreter of an environment with LLaMA-Factory and sar_fast in it."""
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--editable", f"{ROOT}[llamafactory]", *VERSIONS], check=True)
    subprocess.run([*pip, "--no-build-isolation", *BESIDE], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--folder", type=Path, default=ROOT / "results/llamafactory")
    parser.add_argument("--python", type=Path, help="of an environment that is there already")
    options = parser.parse_args()
    if unknown := set(options.cases) - CASES.keys():
        parser.error(f"unknown case {', '.join(unknown)}")
    folder = options.folder.resolve()
    python = options.python or make_environment(folder / "env")
    runs = folder / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir(parents=True)
    work = Work(runs, python)
    work.call("checkpoint", work.inside("checkpoint", runs / "qwen"))
    failed = 0
    for name in options.cases or CASES:
        case, models = CASES[name]
        for model in models:
            began = time.monotonic()
            try:
                outcome, found = "ok", case(work, model)
            except AssertionError as error:
                outcome, found, failed = "FAILED", " ".join(str(error).split()), failed + 1
            print(f"{outcome:<7}{name:<16}{model:<12}{time.monotonic() - began:5.0f} s  {found}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
