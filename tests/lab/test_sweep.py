"""``sweep``: one benchmark under many settings, on a model that the caller has."""

from __future__ import annotations

import json

import pytest

from sar_fast import SARConfig
from sar_fast.base.errors import ArgumentError
from sar_fast.cli.evaluate import sweep as command
from sar_fast.hf import apply_sar
from sar_fast.lab import evaluate, sweep
from sar_fast.lab.benchmark.asking import Asker
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.run.results import RESULTS, SAMPLES
from sar_fast.weighting import Equal
from tests.evaluation.benchmarks import DATA
from tests.evaluation.conftest import arrow_cache  # noqa: F401
from tests.lab.lending import lent

pytestmark = pytest.mark.usefixtures("one_thread", "arrow_cache")

FEW = {"data_dir": DATA / "mme", "max_samples": 8, "scoring": "first_token"}


@pytest.fixture(scope="module")
def miniature():
    return load_miniature()


def test_folders_records_and_rows_are_the_commands(miniature, tmp_path):
    words = ["--model_name_or_path", "miniature", "--task", "mme", "--data_dir", str(DATA / "mme"), "--device", "cpu"]
    words += ["--max_samples", "8", "--scoring", "first_token", "--output_dir", str(tmp_path / "command")]
    words += ["--k", "0", "2", "--beta", "0.02", "--weighting", "equal"]
    summary = command.run(command.parse(words))
    with lent(*miniature):
        found = sweep(*miniature, "mme", k=[2, 0], beta=[0.02], weightings=[Equal()], folder=tmp_path / "call", **FEW)
    assert [*found.results] == ["k0", "k2_beta0.02", "k2_equal"]
    for folder in found.results:
        for name in (SAMPLES, RESULTS):
            assert (tmp_path / "call" / folder / name).read_bytes() == (
                tmp_path / "command" / folder / name
            ).read_bytes()
    spec = {"name": "equal", "options": {}}
    expected = [row | {"weighting": row["weighting"] and spec} for row in summary["settings"]]
    assert found.summary["settings"] == expected
    assert found.summary["layer_passes"] == summary["layer_passes"]


def test_settings_are_those_of_separate_evaluations(miniature, tmp_path):
    """Given as configs, on a model with SAR of its own, continued after an interruption and read again."""
    model, processor = miniature
    configs = [
        None, SARConfig(activation_layer_k=4, beta=0.02), SARConfig(activation_layer_k=4, beta=0.02, decode="step"),
        SARConfig(activation_layer_k=1, beta=0.02, normalize="standardize"),
    ]  # fmt: skip
    alone = [evaluate(model, processor, "mme", sar=config, **FEW) for config in configs]
    with apply_sar(model, SARConfig(activation_layer_k=3)), lent(model, processor):
        found = sweep(model, processor, "mme", configs=configs, compare_batches=1, folder=tmp_path, **FEW)
    assert [*found.results] == [
        "k0", "k4_beta0.02_normalize-none_decode-running", "k4_beta0.02_normalize-none_decode-step",
        "k1_beta0.02_normalize-standardize_decode-running",
    ]  # fmt: skip
    for results, one in zip(found.results.values(), alone):
        assert results.records == one.records
        assert results.metadata["settings"] == one.metadata["settings"]
    assert found.summary["settings"][1]["options"] == {"normalize": "none", "decode": "running"}
    assert found.summary["compared_batches"] == 1
    again = sweep(model, processor, "mme", configs=configs, folder=tmp_path, **FEW)
    assert again.summary["speed_up"] == found.summary["speed_up"]  # kept: nothing is asked again


def test_an_error_on_the_way_leaves_the_model_as_it_was(miniature, tmp_path, monkeypatch):
    def stop(*_):
        raise RuntimeError("stopped")

    monkeypatch.setattr(Asker, "branched", stop)
    with pytest.raises(RuntimeError, match="stopped"), lent(*miniature):
        sweep(*miniature, "mme", k=[1], folder=tmp_path, **FEW)


def test_results_are_a_table_files_and_figure_6(miniature, tmp_path):
    found = sweep(*miniature, "mme", k=[0, 2, 4], beta=[0.02, 0.5], **FEW)
    frame = found.to_pandas()
    assert list(frame["k"]) == [0, 2, 2, 4, 4]
    assert list(frame["existence"]) == [row["scores"]["existence"] for row in found.summary["settings"]]
    figure = found.plot(tmp_path / "figure6.pdf")
    assert (tmp_path / "figure6.pdf").read_bytes().startswith(b"%PDF")
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["beta 0.02", "beta 0.5", "without SAR"]
    assert list(lines[0].get_xdata()) == [0, 2, 4]
    saved = found.save(tmp_path / "saved")
    assert {file.name for file in saved.iterdir()} == {*found.results, "sweep.json"}
    assert json.loads((saved / "sweep.json").read_text()) == found.summary
    with pytest.raises(ArgumentError, match="folder must be a new folder"):
        found.save(saved)


K1 = SARConfig(activation_layer_k=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "k must be one or more different numbers of layers; or give configs; got None"),
        ({"k": [1, 1]}, "k must be one or more different numbers of layers; or give configs; got"),
        ({"k": [0], "beta": [0.1]}, "k must be more than 0 somewhere beside beta or weightings; got"),
        ({"configs": [K1], "k": [1]}, "k must be left out with configs; got"),
        ({"configs": []}, r"configs must be one or more different settings; got \[\]"),
        ({"configs": [K1, K1]}, "configs must be one or more different settings; got .*k1_beta0.5"),
        ({"configs": [None, K1.replace(activation_layer_k=0)]}, "configs must be one or more different settings; got"),
        ({"configs": [{"k": 1}]}, "configs must be SARConfigs, or None for the model without SAR; got dict"),
        ({"configs": [K1, SARConfig(prior_source="projected")]}, "configs must be of one prior_source; got several"),
        ({"k": [1], "compare_batches": -1}, "compare_batches must be a whole number, at least 0; got -1"),
        ({"k": [1], "beta": [0.0]}, "beta must be > 0"),
        ({"k": [1], "weightings": ["nope"]}, "weighting must be one of .*; got 'nope'"),
        ({"k": [9]}, "activation_layer_k must be at most the number of attention layers, 4; got 9"),
    ],
)
def test_bad_arguments_change_nothing(miniature, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message), lent(*miniature):
        sweep(*miniature, "mme", folder=tmp_path / "out", **FEW, **settings)
    assert not (tmp_path / "out").exists()
