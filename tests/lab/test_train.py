"""``train``: fine-tuning of a model that the caller has."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainerCallback

from sar_fast import SARConfig
from sar_fast.base.errors import ArgumentError
from sar_fast.hf import apply_sar
from sar_fast.hf.features import handle_of
from sar_fast.lab import train
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.training.trainers import SFTTrainer
from sar_fast.weighting import HeadScales
from tests.lab.lending import _facts
from tests.training import runs
from tests.training.conftest import _own_caches  # noqa: F401
from tests.training.samples import REPOSITORY

pytestmark = pytest.mark.usefixtures("one_thread", "_own_caches")

SAR = SARConfig(activation_layer_k=2, beta=0.05)
DATA = "shapes_llava"
STEPS = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "max_steps": 2, "logging_steps": 1, "seed": 3}
QUIET = {**STEPS, "save_strategy": "no"}


@pytest.fixture
def miniature():
    """The miniature as the command trains it: vision encoder and projector frozen."""
    model, processor = load_miniature()
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.requires_grad_(False)
    return model, processor


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def records(count):
    return json.loads((REPOSITORY / "experiments" / "data" / "shapes_llava.json").read_text())[:count]


@pytest.mark.parametrize("sar", [None, SAR], ids=["plain", "sar"])
def test_weights_log_and_sparsity_are_the_commands(miniature, tmp_path, sar):
    flags = {} if sar is None else {"use_sar": True, "sar_activation_layer_k": 2, "sar_beta": 0.05}
    command = runs.train(tmp_path / "command", max_steps=2, max_samples=8, **flags)
    model, processor = miniature
    before = _facts(model, processor)
    found = train(
        model, processor, DATA, folder=tmp_path / "call", sar=sar, max_samples=8, gradient_sparsity=True,
        arguments=QUIET,
    )  # fmt: skip
    assert _facts(model, processor) == before
    assert all(p.grad is None for p in model.parameters())
    assert handle_of(model.base_model) is None
    expected = {name: value for name, value in command.model.state_dict().items() if "weighting" not in name}
    assert equal(model.state_dict(), expected)
    assert [line["loss"] for line in found.log_history if "loss" in line] == runs.history(tmp_path / "command")
    file = "gradient_sparsity.jsonl"
    assert (tmp_path / "call" / file).read_bytes() == (tmp_path / "command" / file).read_bytes()
    assert [line["step"] for line in found.gradient_sparsity] == [1, 2]
    assert equal(load_miniature(path=found.folder)[0].state_dict(), model.state_dict())


def test_records_in_memory_and_results_as_table_files_and_figure(miniature, tmp_path):
    rows = records(4)
    for row in rows:
        row["image"] = Image.new("RGB", (64, 64), "red")
    found = train(
        *miniature, rows, folder=tmp_path / "run", eval_dataset=rows[:2], gradient_sparsity=True, control={},
        arguments=QUIET,
    )  # fmt: skip
    assert not hasattr(miniature[0], "visual_contrastive_head")
    assert {"train_loss", "eval_loss", "eval_loss_contrastive"} <= set(found.metrics)
    assert found.metadata["configuration"]["data"]["dataset"] == "records"
    table = found.to_pandas()
    assert table["step"].tolist() == [1, 2]
    assert table["gradient_analysis/avg_visual_token_grad_L1"].notna().all()
    figure = found.plot(tmp_path / "run.png")
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "loss",
        "mean gradient L1 per token",
        "Gini of |gradient|, q",
    ]
    assert np.asarray(Image.open(tmp_path / "run.png").convert("L")).std() > 5
    folder = found.save(tmp_path / "saved")
    assert json.loads((folder / "all_results.json").read_text()) == found.metrics
    assert not list(folder.glob("*.safetensors"))
    with pytest.raises(ArgumentError, match="a new folder, or an empty one"):
        found.save(folder)


def test_an_interrupted_run_goes_on_with_the_model_as_it_is(miniature, tmp_path, monkeypatch):
    whole, stopped = copy.deepcopy(miniature[0]), miniature[0]
    saving = {**STEPS, "save_steps": 1}
    call = lambda model, name, **more: train(
        model, miniature[1], DATA, folder=tmp_path / name, sar=SAR, max_samples=8, arguments=saving, **more
    )
    call(whole, "whole")

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise KeyboardInterrupt

    before, make = _facts(stopped, miniature[1]), SFTTrainer.__init__
    with monkeypatch.context() as broken:
        broken.setattr(SFTTrainer, "__init__", lambda self, *a, **k: make(self, *a, callbacks=[Interrupt()], **k))
        with pytest.raises(KeyboardInterrupt):
            call(stopped, "stopped")
    assert _facts(stopped, miniature[1]) == before
    with pytest.raises(ArgumentError, match=r"folder must be without one, or resume or overwrite True; got .*run"):
        call(stopped, "stopped")
    found = call(stopped, "stopped", resume=True)
    assert equal(stopped.state_dict(), whole.state_dict())
    assert [line["step"] for line in found.log_history if "loss" in line] == [1, 2]

    fresh = load_miniature()[0]
    for part in (fresh.model.vision_tower, fresh.model.multi_modal_projector):
        part.requires_grad_(False)
    torch.nn.init.zeros_(fresh.lm_head.weight)
    call(fresh, "stopped", resume=True)  # a run that had finished: its weights
    assert equal(fresh.state_dict(), whole.state_dict())
    with torch.no_grad():
        fresh.model.multi_modal_projector.linear_1.bias.add_(1)
    with pytest.raises(
        ArgumentError, match=r"resume must go on with the same run; .* as model and another folder; got .*: model is"
    ):
        call(fresh, "stopped", resume=True)


def test_a_rule_is_trained_with_the_model_and_sar_that_was_on_stays(miniature, tmp_path):
    model, processor = miniature
    rule = HeadScales(layers=4, heads=model.config.text_config.num_attention_heads)
    before = weights(rule)
    train(
        model, processor, DATA, folder=tmp_path / "rule", sar=SARConfig(activation_layer_k=2, weighting=rule),
        max_samples=4, arguments={**QUIET, "gradient_checkpointing": True},
    )  # fmt: skip
    assert not equal(weights(rule), before)
    assert not hasattr(model.base_model, "sar_weighting")
    assert not any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    with apply_sar(model, SAR) as handle:
        train(model, processor, DATA, folder=tmp_path / "own", max_samples=4, arguments={**QUIET, "bf16": True})
        assert handle_of(model.base_model) is handle
        with pytest.raises(ArgumentError, match="sar must be None for a model that has SAR on it"):
            train(model, processor, DATA, folder=tmp_path / "other", sar=SAR)
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"arguments": {"learning_rat": 1}}, "arguments must be fields of transformers.TrainingArguments; got learn"),
        ({"arguments": {"output_dir": "x"}}, "arguments must be without output_dir, .*; got output_dir"),
        ({"arguments": {"deepspeed": "x"}}, "arguments must be without what splits a model"),
        ({"arguments": {"max_steps": 0}}, "max_steps must be at least 1, or -1 for num_train_epochs; got 0"),
        ({"arguments": {"fp16": True, "use_cpu": True}}, "fp16 must be False without a GPU: .*; bf16 works; got True"),
        ({"arguments": {"warmup_ratio": 0.1, "warmup_steps": 5}}, "warmup_steps must be 0 with warmup_ratio; got 5"),
        ({"arguments": {"do_predict": True}}, "do_predict must be False here: .*; got True"),
        ({"arguments": {"save_strategy": "best"}}, "metric_for_best_model must be eval_loss with save_strategy best"),
        (
            {"arguments": {"metric_for_best_model": "loss"}},
            "eval_strategy must be .* with metric_for_best_model; got no",
        ),
        (
            {"arguments": {"metric_for_best_model": "accuracy", "eval_strategy": "steps", "logging_steps": 1}},
            "metric_for_best_model must be eval_loss, all that an evaluation measures; got accuracy",
        ),
        (
            {"arguments": {"train_sampling_strategy": "group_by_length", "length_column_name": "size"}},
            "length_column_name must be '.*'; got 'size'",
        ),
        ({"arguments": {"report_to": "nothing"}}, "report_to must be trackers that can be started; got nothing: "),
        ({"arguments": {"optim": "adamw_anyprecision"}}, "optim must be one that can be made; got adamw_any.*: "),
        ({"control": {"visual_contrastive_loss_weight": -1.0}}, "visual_contrastive_loss_weight must be >= 0 and fini"),
        ({"arguments": {"learning_rate": -1.0}}, "learning_rate must be at least 0; got -1"),
        ({"control": {"weight": 1}}, "control must be a dictionary of visual_contrastive_loss_weight"),
        ({"control": {}, "packing": True}, "packing must be False with control"),
        ({"dataset": []}, "dataset must be at least one record; got none"),
        ({"dataset": 3}, "dataset must be records as dictionaries, or names"),
        ({"dataset": "nowhere"}, "^dataset must be names in .*dataset_info.json .* or files; got 'nowhere'"),
        ({"eval_dataset": "nowhere"}, "^eval_dataset must be names in .* or files; got 'nowhere'"),
        ({"media_dir": "nowhere"}, "media_dir must be a folder; got 'nowhere'"),
        ({"max_samples": 0}, "max_samples must be at least 1; got 0"),
        ({"max_length": 0}, "max_length must be at least 1; got 0"),
        ({"resume": True, "overwrite": True}, "overwrite must be False with resume"),
        ({"sar": "yes"}, "sar must be a SARConfig or None; got str"),
        ({"sar": SARConfig(activation_layer_k=9)}, "activation_layer_k must be at most .* 4; got 9"),
        (
            {"sar": SAR, "control": {}, "arguments": {"max_steps": 1, "lr_scheduler_kwargs": {"nonsense": 1}}},
            "lr_scheduler_type",
        ),
    ],
)
def test_bad_arguments_change_and_write_nothing(miniature, tmp_path, given, message):
    model, processor = miniature
    before, state = _facts(model, processor), weights(model)
    dataset = given.get("dataset", DATA)
    more = {name: value for name, value in given.items() if name != "dataset"}
    with pytest.raises(ArgumentError, match=message) as refused:
        train(model, processor, dataset, folder=tmp_path / "run", **{"max_samples": 4, **more})
    assert "--" not in str(refused.value)
    assert _facts(model, processor) == before
    assert equal(weights(model), state)
    assert not list(tmp_path.glob("run/*"))


def test_a_checkpoint_without_optimizer_state_is_refused(miniature, tmp_path):
    call = lambda **more: train(*miniature, DATA, folder=tmp_path, max_samples=4, arguments=arguments, **more)
    arguments = {**STEPS, "max_steps": 1, "save_steps": 1, "save_only_model": True}
    call()
    needed = r"^resume must go on from .* \(save_only_model\); or begin .* as model and another folder; got .*-1$"
    with pytest.raises(ArgumentError, match=needed):
        call(resume=True)


def test_folders_that_cannot_be_taken(miniature, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match=r"^folder must be a folder to write into; got '.*/file': "):
        train(*miniature, DATA, folder=tmp_path / "file")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").touch()
    with pytest.raises(
        ArgumentError, match=r"^resume must be False: .* holds model.safetensors .* no whole checkpoint"
    ):
        train(*miniature, DATA, folder=tmp_path / "run", resume=True)


def test_a_model_with_nothing_to_learn_is_refused(miniature, tmp_path):
    miniature[0].requires_grad_(False)
    with pytest.raises(ArgumentError, match="model must be one with parameters that require gradients"):
        train(*miniature, DATA, folder=tmp_path / "run")
