"""The training benchmark runs what it says in every mode."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from sar_fast import SARConfig
from sar_fast.cli import app
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.training.benchmark import MODES, _mode, remark, sample_inputs, training_steps

pytestmark = pytest.mark.usefixtures("one_thread")


def test_modes_compute_what_they_are_named(processor):
    """SAR on and the eager formulation have the same loss, and another one than SAR off."""
    model, _ = load_miniature()
    inputs = sample_inputs(model, processor, 100)
    assert inputs["input_ids"].shape == (1, 100)
    config = SARConfig(activation_layer_k=2, beta=1e-3)
    from sar_fast.hf import apply_sar
    from sar_fast.lab.measure.eager import EagerSAR

    with apply_sar(model, config) as handle:
        model(**inputs)
        eager = EagerSAR(handle.roles.visual_mask, handle.roles.text_mask, handle.prior, first_layer=2, beta=1e-3)
    loss = {}
    for mode in MODES:
        with _mode(model, mode, config, eager) as extra, torch.no_grad():
            loss[mode] = model(**inputs, **extra).loss.item()
    assert loss["sar on"] == pytest.approx(loss["eager"], rel=1e-4)
    assert abs(loss["sar on"] - loss["sar off"]) > 1e-3


def test_records_and_unchanged_weights(processor):
    model, _ = load_miniature()
    before = {n: p.clone() for n, p in model.named_parameters()}
    inputs = sample_inputs(model, processor, 90)
    records = training_steps(model.train(), inputs, SARConfig(activation_layer_k=2), repeats=1, peak_flops=1e12)
    assert [r["mode"] for r in records] == list(MODES)
    for record in records:
        assert record["tokens_per_second"] == pytest.approx(90 / record["step_seconds"])
        assert 0 < record["mfu"] < 1
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="repeats must be"):
        training_steps(model, inputs, SARConfig(activation_layer_k=2), repeats=0)
    with pytest.raises(ValueError, match="length must be at least"):
        sample_inputs(model, processor, 20)


def test_the_command():
    done = CliRunner().invoke(app, ["bench", "train", "--steps", "1", "--k", "2", "--json", "--length", "100"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["length"] == 100
    assert [m["mode"] for m in found["modes"]] == list(MODES)
    assert found["note"].startswith("100 tokens are too few to tell SAR from the eager formulation")
    shown = CliRunner().invoke(app, ["bench", "train", "--steps", "1", "--k", "2"])
    assert shown.output.splitlines()[-1].startswith("note: 200 tokens are too few")
    assert "Give a model that takes more" in shown.output
    assert "Give a length of 512 or more" in remark(300, 4096)
    assert remark(512, 4096) is None
    wrong = CliRunner().invoke(app, ["bench", "train", "--length", "9999"])
    assert wrong.exit_code == 2
    assert "--length must be at most 256" in wrong.output
