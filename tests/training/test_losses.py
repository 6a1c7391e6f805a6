"""Losses by hand: label smoothing in training, and evaluation as a mean over answer tokens."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from sar_fast.lab.training.arguments import parse
from sar_fast.lab.training.losses import SmoothedLoss, sample_losses
from sar_fast.lab.training.run import build
from tests.hf.tiny import llava, llava_batch
from tests.training.runs import flags, history, launch, train

EVALUATION = {"do_train": None, "dataset": None, "do_eval": True, "eval_dataset": "shapes_llava"}
CONTROL = {"custom_trainer": "control_sft"}


def trainer_of(output, **changes):
    return build(parse(flags(output, **changes)))[0]


def token_losses(trainer, batches, smoothing=0.0):
    """(answer tokens of all batches,) fp64 losses, from the definition."""
    found = []
    for batch in batches:
        batch = {name: value.to(trainer.args.device) for name, value in batch.items()}
        labels = batch.pop("labels")
        with torch.no_grad():
            log_p = trainer.model(**batch)["logits"][:, :-1].double().log_softmax(-1)
        targets = labels[:, 1:]
        kept = targets != -100
        nll = -log_p[kept].gather(-1, targets[kept][:, None])[:, 0]
        found.append((1 - smoothing) * nll + smoothing * -log_p[kept].mean(-1))
    return torch.cat(found)


@pytest.mark.everyday(changes=[{"packing": True}, CONTROL])
@pytest.mark.parametrize(
    "changes",
    [{}, {"packing": True}, {"gradient_accumulation_steps": 2}, {"finetuning_type": "lora"}, CONTROL],
    ids=str,
)
def test_label_smoothing_is_that_of_the_definition(tmp_path, changes):
    common = {"max_samples": 4, "per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 0, **changes}
    common["per_device_train_batch_size"] //= changes.get("gradient_accumulation_steps", 1)
    trainer = trainer_of(tmp_path, label_smoothing_factor=0.2, **common)
    want = token_losses(trainer, trainer.get_train_dataloader(), 0.2).mean().item()
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss_text_gen" if changes == CONTROL else "loss"] == pytest.approx(want, rel=1e-4)
    plain = token_losses(trainer, trainer.get_train_dataloader()).mean().item()
    assert abs(want - plain) > 0.1


def test_label_smoothing_leaves_the_model_as_it_was(tmp_path):
    trainer = trainer_of(tmp_path, label_smoothing_factor=0.2, max_steps=1)
    before = trainer.model.loss_function
    trainer.train()
    assert trainer.model.loss_function is before


def test_a_model_with_a_loss_of_its_own_cannot_be_smoothed():
    model = llava()
    batch = llava_batch([1])
    with (
        pytest.raises(
            ValueError, match=r"label_smoothing_factor must be 0 for a LlavaForCond.*, which has a loss of its own"
        ),
        SmoothedLoss(0.1).on(model),
    ):
        model.base_model(**batch)
    assert "_loss_function" not in model.__dict__


@pytest.mark.parametrize("packed", [False, True])
def test_losses_per_sample(packed):
    torch.manual_seed(0)
    lengths, vocabulary = (3, 5, 4), 7
    labels = [torch.randint(vocabulary, (n,)) for n in lengths]
    for row in labels:
        row[0] = -100
    logits = [torch.randn(n, vocabulary, dtype=torch.float64) for n in lengths]
    want = [F.cross_entropy(x[:-1], y[1:], reduction="sum") for x, y in zip(logits, labels)]
    if packed:
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        sums, counts = sample_losses(torch.cat(logits)[None], torch.cat(labels)[None], positions)
    else:
        pad = torch.nn.utils.rnn.pad_sequence
        sums, counts = sample_losses(pad(logits, True), pad(labels, True, padding_value=-100))
    torch.testing.assert_close(sums, torch.stack(want), rtol=1e-6, atol=0)
    assert counts.tolist() == [n - 1 for n in lengths]


@pytest.mark.everyday(changes=[{}, CONTROL])
@pytest.mark.parametrize("changes", [{}, {"packing": True}, CONTROL, {"label_smoothing_factor": 0.1}], ids=str)
def test_eval_loss_is_a_mean_over_answer_tokens(tmp_path, changes):
    """Whatever the batches; answers of different length, so that a mean of means would differ."""
    asked = {
        "do_train": None,
        "dataset": None,
        "do_eval": True,
        "eval_dataset": "shapes_llava",
        "max_samples": 5,
        **changes,
    }
    found = {}
    for size in (1, 2, 5):
        trainer = trainer_of(tmp_path, per_device_eval_batch_size=size, **asked)
        found[size] = trainer.evaluate()
    want = token_losses(trainer, trainer.get_eval_dataloader()).mean().item()
    assert [m["eval_loss"] for m in found.values()] == pytest.approx([want] * 3, rel=1e-4)
    if changes == CONTROL:
        assert all(m["eval_loss_text_gen"] == m["eval_loss"] for m in found.values())
        assert found[1]["eval_loss_contrastive"] == pytest.approx(0.0, abs=1e-6)  # one sample has no negatives
        assert found[5]["eval_loss_contrastive"] > 0.1


@pytest.mark.slow  # every day tests/training/test_distributed.py
def test_two_ranks_evaluate_as_one(tmp_path):
    """Three samples on two ranks: the one that fills the last batch does not count twice."""
    asked = {**EVALUATION, "max_samples": 3, "per_device_eval_batch_size": 1}
    train(tmp_path / "one", **asked)
    done = launch(flags(tmp_path / "two", **asked), processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / n / "eval_results.json").read_text())["eval_loss"] for n in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)


def test_training_losses_are_untouched(tmp_path):
    """Without smoothing the loss is the model's own, to the bit, also between evaluations."""
    common = {"max_samples": 4, "max_steps": 2, "gradient_analysis": False}
    train(tmp_path, do_eval=True, eval_dataset="shapes_llava", eval_strategy="steps", eval_steps=1, **common)
    train(tmp_path / "plain", **common)
    assert history(tmp_path) == history(tmp_path / "plain")
