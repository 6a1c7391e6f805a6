"""What Weights & Biases and TensorBoard are told of a run: all groups of its arguments."""

from __future__ import annotations

import pytest

from tests.training.runs import train

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = {"max_steps": 1, "use_sar": True, "sar_activation_layer_k": 2, "sar_beta": 0.25, "run_name": "named"}


def test_weights_and_biases_tells_two_groups_apart(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # a process keeps the folder of its first run
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    configs = []
    for given in ({}, {"custom_trainer": "control_sft", "finetuning_type": "freeze", "dataset": "shapes_pairs"}):
        trainer = train(tmp_path / "out", report_to="wandb", overwrite_output_dir=True, **{**RUN, **given})
        configs.append(dict(wandb.run.config))
        wandb.finish()
    plain, control = configs
    assert plain["data"]["dataset"] == "shapes_llava"
    assert control["data"]["dataset"] == "shapes_pairs"
    assert [c["model"]["finetuning_type"] for c in configs] == ["full", "freeze"]
    assert [c["control"]["custom_trainer"] for c in configs] == [None, "control_sft"]
    assert (plain["model"]["use_sar"], plain["model"]["sar_beta"]) == (True, 0.25)
    assert plain["training"]["max_steps"] == plain["max_steps"] == 1  # the Trainer's own are still there
    assert trainer.model.config.model_type == plain["model_type"]


def test_an_evaluation_without_training_is_told_too(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # a process keeps the folder of its first run
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    train(tmp_path / "out", report_to="wandb", do_train=None, dataset=None, do_eval=True, eval_dataset="shapes_pairs")
    try:
        assert wandb.run.config["data"]["eval_dataset"] == "shapes_pairs"
    finally:
        wandb.finish()


def test_tensorboard_has_the_configuration_and_hyperparameters(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.hparams import plugin_data_pb2

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    train(tmp_path / "out", report_to="tensorboard", **RUN)
    events = accumulator.EventAccumulator(str(tmp_path / "logs")).Reload()
    assert b'"sar_beta": 0.25' in events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0]
    (started,) = (
        plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
        for tag, content in events.PluginTagToContent("hparams").items()
        if tag.endswith("session_start_info")
    )
    assert started.hparams["model.sar_beta"].number_value == 0.25
    assert started.hparams["data.dataset"].string_value == "shapes_llava"
    assert started.hparams["model.use_sar"].number_value == 1
