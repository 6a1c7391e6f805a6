"""``sar-fast llamafactory`` on a stand-in with LLaMA-Factory's entry points: what reaches them, and what is refused."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sar_fast import SARConfig
from sar_fast.base import extras
from sar_fast.cli import app
from sar_fast.hf.features import handle_of
from sar_fast.integrations.llamafactory.options import split, value_of
from sar_fast.lab.io.model_source import MINIATURE_PATH
from tests.training.runs import lines

pytestmark = pytest.mark.usefixtures("one_thread")

STAND_INS = Path(__file__).parent / "stand_ins"
OURS = "sar_fast.integrations.llamafactory"
SAR = {"use_sar": True, "sar_activation_layer_k": 2, "sar_beta": 1e-3, "sav_grad": True}
TRAIN = {
    "model_name_or_path": "miniature",
    "do_train": True,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """LLaMA-Factory, as far as it goes; its modules and ours on top are imported anew and forgotten."""
    mine = lambda name: name.split(".")[0] in ("llamafactory", "omegaconf") or name.startswith(f"{OURS}.")
    before = {name: module for name, module in sys.modules.items() if mine(name)}
    for name in before:
        del sys.modules[name]
    monkeypatch.syspath_prepend(STAND_INS)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    yield
    for name in [name for name in sys.modules if mine(name)]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def file(tmp_path):
    """Writes a YAML file of a small run with changes."""

    def written(**changes) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(TRAIN | {"output_dir": str(tmp_path / "out")} | changes))
        return str(path)

    return written


def invoke(*words: str):
    return CliRunner().invoke(app, ["llamafactory", *words])


def trained():
    """The Trainer of the last run, after a command that succeeded."""
    return importlib.import_module("llamafactory.train.sft.workflow").TRAINERS[-1]


def losses(trainer, key="loss"):
    return [line[key] for line in trainer.state.log_history if key in line]


def test_keys_are_told_apart():
    options, theirs = split({"use_sar": True, "sar_beta": 1e-3, "learning_rate": 1e-5, "dataset": ["a", "b"]})
    assert theirs == {"learning_rate": 1e-5, "dataset": ["a", "b"]}
    assert options.sar.sar_config() == SARConfig(beta=1e-3)
    words = ["--do_train", "--use-sar", "--sar_beta=1e-3", "--dataset", "a", "b", "--no_gradient_analysis"]
    options, theirs = split([*words, "--custom_trainer", "control_sft"])
    assert theirs == ["--do_train", "--dataset", "a", "b"]
    assert options.sar.sar_config() == SARConfig(beta=1e-3)
    assert not options.analysis.gradient_analysis
    assert options.control.custom_trainer == "control_sft"
    assert value_of(theirs, "dataset") == ["a", "b"]
    assert value_of(theirs, "deepspeed") is None


@pytest.mark.parametrize("given", [{"model_name_or_path": "miniature"}, ["--model_name_or_path=miniature"]])
def test_the_miniature_has_a_name(given):
    assert str(MINIATURE_PATH) in (given := split(given)[1]) or given["model_name_or_path"] == str(MINIATURE_PATH)


def test_sar_trains_and_evaluates(file, tmp_path):
    assert invoke("train", file(**SAR, do_eval=True)).exit_code == 0
    trainer = trained()
    assert handle_of(trainer.model.base_model).config == SARConfig(activation_layer_k=2, beta=1e-3, sav_grad=True)
    assert [line["step"] for line in lines(tmp_path / "out" / "gradient_sparsity.jsonl")] == [1, 2]
    with_sar = losses(trainer) + losses(trainer, "eval_loss")
    assert invoke("train", file(do_eval=True, gradient_analysis_steps=2)).exit_code == 0
    without = losses(trained()) + losses(trained(), "eval_loss")
    assert all(abs(a / b - 1) > 1e-3 for a, b in zip(with_sar, without, strict=True))


def test_flags_are_the_same_run(file, tmp_path):
    invoke("train", file(**SAR))
    flags = [word for n, v in (TRAIN | SAR | {"output_dir": tmp_path}).items() for word in (f"--{n}", str(v))]
    expected, result = losses(trained()), invoke("train", *flags)
    assert result.exit_code == 0, result.output
    assert losses(trained()) == expected


def test_the_control_group(file):
    """The Trainer that LLaMA-Factory makes is ours for that run alone; the evaluation's loss is the text's."""
    workflow = importlib.import_module("llamafactory.train.sft.workflow")
    plain = workflow.CustomSeq2SeqTrainer
    invoke("train", file(do_train=False, do_eval=True))
    before = losses(trained(), "eval_loss")
    control = {"custom_trainer": "control_sft", "visual_contrastive_loss_weight": 0.5}
    assert (
        invoke("train", file(do_eval=True, learning_rate=0.0, gradient_accumulation_steps=2, **control)).exit_code == 0
    )
    trainer = trained()
    assert isinstance(trainer, plain)
    parts = [losses(trainer, f"loss_{name}") for name in ("text_gen", "contrastive")]
    assert losses(trainer) == pytest.approx([text + 0.5 * visual for text, visual in zip(*parts)])
    assert min(parts[1]) > 0
    assert losses(trainer, "eval_loss") == pytest.approx(before)
    assert workflow.CustomSeq2SeqTrainer is plain


def test_a_resumed_run_goes_on_as_it_began(file, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "gradient_analysis": False}
    invoke("train", file(**saving | SAR))
    checkpoint = {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-1")}
    for changes, message in (
        (SAR | {"sar_beta": 0.5}, "--sar_beta must be 0.001 as in "),
        ({}, "--use_sar must be True as in "),
        (SAR | {"custom_trainer": "control_sft"}, "--custom_trainer must be None as in "),
    ):
        result = invoke("train", file(**saving | checkpoint | changes))
        assert result.exit_code == 2
        assert message in result.stderr
    assert invoke("train", file(**saving | checkpoint | SAR | {"max_steps": 2})).exit_code == 0
    assert trained().state.global_step == 2
    (tmp_path / "out" / "checkpoint-1" / "sar_options.json").unlink()  # llamafactory-cli's
    assert "--use_sar must be False as in " in invoke("train", file(**saving | checkpoint | SAR)).stderr


def test_a_rule_is_used_as_it_is(file):
    assert invoke("train", file(use_sar=True, sar_activation_layer_k=2, sar_weighting="equal")).exit_code == 0
    expected = losses(trained())
    invoke("train", file())
    assert losses(trained()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sar_betta": 0.5}, "unknown key sar_betta; did you mean sar_beta?"),
        ({"learning_rat": 0.5}, "did you mean learning_rate?"),
        ({"sar_beta": 0.1}, "--sar_beta must be left out without --use_sar"),
        ({"use_sar": True, "sar_beta": 0}, "--sar_beta must be > 0"),
        ({"use_sar": "perhaps"}, "argument --use_sar"),
        ({"use_sar": True, "sar_activation_layer_k": 5}, "--sar_activation_layer_k must be at most"),
        ({"use_sar": True, "sar_backend": "cuda"}, "--sar_backend must be one of"),
        ({"use_sar": True, "sar_activation_layer_k": 2, "sar_weighting": "head_scales"}, "parameters that learn"),
        ({"use_sar": True, "flash_attn": "fa2"}, "--flash_attn must be left out with --use_sar"),
        ({"use_sar": True, "neat_packing": True}, "--neat_packing must be left out with --use_sar"),
        ({"custom_trainer": "control_sft", "packing": True}, "--packing must be left out with --custom_trainer"),
        (
            {"custom_trainer": "control_sft", "use_dft_loss": True},
            "--custom_trainer must come without other losses: it adds to the model's own; got control_sft with --use_d",
        ),
        (
            {"custom_trainer": "control_sft", "learnable_temperature": True, "finetuning_type": "lora"},
            "--learnable_temperature must be left out with --finetuning_type lora",
        ),
        ({"custom_trainer": "mine"}, "--custom_trainer"),
        ({"visual_contrastive_loss_weight": 0.2}, "without --custom_trainer control_sft"),
        ({"gradient_analysis_steps": 0}, "--gradient_analysis_steps must be at least 1"),
        ({"stage": "pt"}, "--stage must be sft here; llamafactory-cli trains others; got pt"),
        ({"use_unsloth": True}, "--use_unsloth must be left out: it replaces what"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_come_before_anything_else(file, tmp_path, changes, message):
    result = invoke("train", file(**changes))
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_gradients_under_fsdp(file, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "--gradient_analysis must be false under FSDP" in invoke("train", file()).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sar_betas", "0.5"], "unknown flag --sar_betas; did you mean sar_beta?"),
        (["--learning_rate", "fast"], "argument --learning_rate"),
        (["run.json"], "LLaMA-Factory reads YAML files"),
        (["stray"], "unknown flag --stray"),
    ],
)
def test_wrong_flags(words, message):
    result = invoke("train", *words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_model_without_pictures(file, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=2).save_pretrained(tmp_path / "text")
    for changes, message in (
        ({}, "--gradient_analysis must be false for llama, which has no image_token_id"),
        ({"use_sar": True, "gradient_analysis": False}, "SAR does not know model_type 'llama'"),
    ):
        result = invoke("train", file(model_name_or_path=str(tmp_path / "text"), **changes))
        assert result.exit_code == 2
        assert message in result.stderr


def test_export_is_theirs(file):
    assert invoke("export", "--model_name_or_path=miniature", "--export_dir", "out").exit_code == 0
    exported = importlib.import_module("llamafactory.train.tuner").EXPORTED
    assert exported[-1] == ["--model_name_or_path", str(MINIATURE_PATH), "--export_dir", "out"]
    result = invoke("export", "--model_name_or_path", "miniature", "--use_sar")
    assert result.exit_code == 2
    assert "export writes a plain model" in result.stderr


def test_help_names_our_keys():
    text = invoke("train", "--help").stdout
    assert all(f"--{name} " in text for name in ("use_sar", "sav_grad", "custom_trainer", "gradient_analysis_steps"))


def test_without_llamafactory(monkeypatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    result = invoke("train", "run.yaml")
    assert result.exit_code == 2
    assert "sar-fast llamafactory needs llamafactory: pip install 'sar_fast[llamafactory]'" in result.stderr


def test_processes_are_started_as_theirs_are(monkeypatch):
    launch = importlib.import_module(f"{OURS}.launch")
    assert not launch.wants_processes()
    monkeypatch.setenv("DEVICES", "2")
    assert launch.wants_processes()
    with monkeypatch.context() as launched:
        launched.setenv("LOCAL_RANK", "0")
        assert not launch.wants_processes()
    monkeypatch.setenv("USE_RAY", "1")
    assert not launch.wants_processes()
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    assert launch.wants_processes()
    words = ["a b.yaml", "use_sar=true"]
    own = ["-m", "sar_fast", "llamafactory", "train", *words]
    command = launch.torchrun(words, {"NPROC_PER_NODE": "4", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "head"})
    assert command[-len(own) :] == own
    text = " ".join(command)
    assert "--nnodes 2 --nproc-per-node 4 --node-rank 1 --master-addr head --master-port 12345" in text
    elastic = {"RDZV_ID": "7", "MIN_NNODES": "1", "MAX_NNODES": "3", "MASTER_PORT": "9", "MAX_RESTARTS": "2"}
    text = " ".join(launch.torchrun(words, elastic))
    assert "--nnodes 1:3 --nproc-per-node 2 --rdzv-id 7 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:9" in text
    assert "--max-restarts 2" in text


def test_several_processes_are_one_launcher(monkeypatch, file):
    monkeypatch.setenv("DEVICES", "2")
    commands = []
    done = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append(command) or done)
    assert invoke("train", file(), "use_sar=true").exit_code == 3
    assert commands[0][-2:] == [file(), "use_sar=true"]


def test_the_command_line_imports_none_of_it():
    code = "import sys, sar_fast.cli; print([n for n in sys.modules if n.split('.')[0] == 'llamafactory'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
