"""SARCallback and GradientSparsityCallback in a Trainer that knows nothing of SAR, given to it when it is made."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Trainer, TrainerState, TrainingArguments

from sar_fast import SARConfig
from sar_fast.hf import apply_sar
from sar_fast.hf.features import handle_of
from sar_fast.integrations.trainer_callback import SARCallback
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.training.arguments import parse
from sar_fast.lab.training.gradients import GradientSparsityCallback
from sar_fast.lab.training.lora import add_lora
from sar_fast.lab.training.run import build
from sar_fast.lab.training.trainer_of import trainer_of
from sar_fast.weighting import HeadScales
from tests.training.runs import flags, lines, train

pytestmark = pytest.mark.usefixtures("one_thread")

SAR_FLAGS = {"use_sar": True, "sar_activation_layer_k": 2, "sar_beta": 1e-3, "sav_grad": True}
CONFIG = SARConfig(activation_layer_k=2, beta=1e-3, sav_grad=True)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A run of our own command with SAR and gradient analysis."""
    return train(tmp_path_factory.mktemp("ours"), **SAR_FLAGS)


@pytest.fixture
def make(ours, tmp_path):
    """A Trainer of transformers that does what our own run did, but for SAR and the analysis."""

    def made(*callbacks, model="fresh", **changes):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1,
            save_strategy="no", report_to="none", use_cpu=True, remove_unused_columns=False, seed=3,
        )  # fmt: skip
        given = {"model": build(parse(flags(tmp_path)))[0].model if model == "fresh" else model}
        data = {"train_dataset": ours.train_dataset, "eval_dataset": ours.train_dataset}
        return Trainer(
            args=arguments, callbacks=list(callbacks), data_collator=ours.data_collator, **(given | data | changes)
        )

    return made


def test_a_plain_trainer_trains_as_ours(make, ours, tmp_path):
    trainer = make(SARCallback(CONFIG), GradientSparsityCallback(every=1))
    trainer.train()
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (trainer, ours)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    logged = [lines(Path(t.args.output_dir) / "gradient_sparsity.jsonl") for t in (trainer, ours)]
    assert [line["step"] for line in logged[0]] == [1, 2, 3]
    for line, expected in zip(*logged, strict=True):
        assert line == pytest.approx(expected, rel=1e-5)


def test_sar_is_on_when_the_trainer_has_been_made(make):
    """So that DDP and DeepSpeed wrap the model with it; a PEFT model has it inside."""
    callback = SARCallback(CONFIG)
    model = load_miniature()[0]
    peft = add_lora(model, parse(flags(Path("unused"), finetuning_type="lora")).model)
    make(callback, model=peft)
    assert handle_of(model.base_model) is callback.handle
    assert callback.handle.config == CONFIG
    callback.handle.remove()
    assert handle_of(model.base_model) is None


def test_sar_that_is_there_already(make):
    model = load_miniature()[0]
    handle = apply_sar(model, CONFIG)
    callback = SARCallback(CONFIG)
    make(callback, model=model)
    assert callback.handle is handle
    with pytest.raises(
        ValueError, match="be without SAR, or have the SARCallback's; got one with another beta, sav_grad"
    ):
        make(SARCallback(CONFIG.replace(beta=2.0, sav_grad=False)), model=model)


def test_what_cannot_have_sar(make):
    with pytest.raises(TypeError, match="config must be a SARConfig; got dict"):
        SARCallback({"beta": 0.5})
    with pytest.raises(ValueError, match="activation_layer_k must be at most the number of attention layers, 4"):
        make(SARCallback(SARConfig(activation_layer_k=5)))
    with pytest.raises(ValueError, match="model must be one that SARCallback can put SAR on; got None"):
        SARCallback().on_init_end(None, None, None, model=None)


@pytest.mark.parametrize("run", [Trainer.train, Trainer.evaluate], ids=["train", "evaluate"])
def test_too_late_is_an_error(make, run):
    trainer = make()
    trainer.add_callback(SARCallback(CONFIG))
    with pytest.raises(ValueError, match="add_callback is late"):
        run(trainer)


def test_another_model_is_an_error(make):
    """``model_init`` makes one anew whenever training begins."""
    trainer = make(SARCallback(CONFIG), model=None, model_init=lambda: load_miniature()[0])
    with pytest.raises(ValueError, match=r"model must be the one that SARCallback put SAR on; .*model_init"):
        trainer.train()


def test_a_rule_that_learns_is_refused_in_training_alone(make):
    scales = HeadScales(layers=4, heads=8)
    trainer = make(SARCallback(SARConfig(activation_layer_k=2, weighting=scales)))
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="must have no parameters that learn"):
        trainer.train()
    scales.requires_grad_(False)
    trainer.train()


def test_a_trainer_that_is_not_there():
    with pytest.raises(ValueError, match="trainer must be given to the callback"):
        trainer_of(TrainerState())
