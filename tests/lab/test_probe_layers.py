"""``probe_layers``: what linear heads read off each layer of a model that the caller has."""

from __future__ import annotations

import json
import tempfile

import numpy as np
import pytest
from PIL import Image

from sar_fast import SARConfig
from sar_fast.base.errors import ArgumentError
from sar_fast.cli.evaluate import probe
from sar_fast.cli.evaluate.arguments import parse
from sar_fast.hf import apply_sar
from sar_fast.hf.features import handle_of
from sar_fast.lab import probe_layers
from sar_fast.lab.focus.dataset import load_grounding_samples
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.probe import HeadTraining
from sar_fast.lab.probe.results import DETAILS, RESULTS
from sar_fast.lab.run.results import SAMPLES
from tests.lab.lending import lent

pytestmark = pytest.mark.usefixtures("one_thread")

SAR = SARConfig(activation_layer_k=2, beta=0.05)
FLAGS = ["--use_sar", "--sar_activation_layer_k", "2", "--sar_beta", "0.05"]
DATA = "shapes_grounding"


@pytest.fixture(scope="module")
def miniature():
    return load_miniature()


@pytest.fixture(scope="module")
def samples():
    return load_grounding_samples(DATA, None)[:12]


@pytest.mark.parametrize(("sar", "flags"), [(None, []), (SAR, FLAGS)], ids=["plain", "sar"])
def test_records_and_scores_are_the_commands(miniature, tmp_path, sar, flags):
    words = f"--model_name_or_path miniature --device cpu --do_layerwise_probe --dataset {DATA} --max_samples 12"
    command = probe.run(parse([*words.split(), "--output_dir", str(tmp_path / "command"), *flags]))
    with lent(*miniature):
        found = probe_layers(*miniature, DATA, sar=sar, max_samples=12, folder=tmp_path / "call")
    for name in (SAMPLES, RESULTS):
        assert (tmp_path / "call" / name).read_bytes() == (tmp_path / "command" / name).read_bytes()
    assert found.by_layer() == command
    theirs, ours = (json.loads((tmp_path / d / DETAILS).read_text()) for d in ("command", "call"))
    for name in ("scores_ci95", "scores_by_seed", "train_loss", "feature_rms", "baseline", "forward_passes"):
        assert theirs[name] == ours[name]
    assert "--probe_epochs" in theirs["warnings"][0]
    (warning,) = found.warnings
    assert "give more epochs" in warning
    assert "--" not in warning
    assert (tmp_path / "call" / "layerwise_probe.png").is_file()


def test_without_a_folder_nothing_is_left_and_sar_may_be_on_already(miniature, samples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, processor = miniature
    quick = {"seeds": 1, "training": HeadTraining(epochs=1)}
    plain, wanted = (probe_layers(model, processor, samples, sar=sar, **quick) for sar in (None, SAR))
    assert not np.array_equal(plain.train_loss, wanted.train_loss)
    with lent(model, processor), apply_sar(model, SAR) as handle:
        model.train()
        again = probe_layers(model, processor, samples, batch_size=12, **quick)
        assert handle_of(model.base_model) is handle
        assert handle.config == SAR
        assert all(part.training for part in model.modules())
        with pytest.raises(ArgumentError, match="sar must be None for a model that has SAR on it"):
            probe_layers(model, processor, samples, sar=SAR)
        model.eval()
    np.testing.assert_allclose(again.train_loss, wanted.train_loss, rtol=1e-4)
    assert list(tmp_path.iterdir()) == []


def test_another_training_takes_the_features_as_they_are(miniature, samples, tmp_path):
    call = lambda **more: probe_layers(*miniature, samples, seeds=1, folder=tmp_path / "out", **more)
    assert call().forward_passes == 2
    assert call().forward_passes == 0
    longer = HeadTraining(epochs=400, lr=1e-2)
    with pytest.raises(ArgumentError, match=r"folder .* other settings: training\.epochs was 5.*overwrite=True"):
        call(training=longer)
    found = call(training=longer, overwrite=True)
    assert found.forward_passes == 0
    assert found.warnings == []


def test_results_as_table_files_and_figure(miniature, samples, tmp_path):
    found = probe_layers(*miniature, samples, seeds=2, task="classification")
    table = found.to_pandas()
    assert list(table["layer"]) == [0, 1, 2, 3]
    assert table["score"].tolist() == list(found.by_layer().values())
    assert set(table["learned"]) <= {True, False}
    folder = found.save(tmp_path / "saved")
    assert json.loads((folder / DETAILS).read_text())["scores"] == json.loads((folder / RESULTS).read_text())
    with pytest.raises(ArgumentError, match="a new folder, or an empty one"):
        found.save(folder)
    figure = found.plot(tmp_path / "probe.png")
    assert figure.axes[0].get_ylabel() == "accuracy"
    assert np.asarray(Image.open(tmp_path / "probe.png").convert("L")).std() > 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "depth"}, "task must be one of 'grounding', 'classification'; got 'depth'"),
        ({"seeds": 0}, "seeds must be at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"max_samples": 1}, "needed at least 2: one to train on"),
        ({"dataset_dir": "."}, "dataset_dir must be left out where samples is no name of a dataset"),
    ],
)
def test_bad_arguments_change_and_write_nothing(miniature, samples, tmp_path, given, message):
    with lent(*miniature), pytest.raises(ValueError, match=message):
        probe_layers(*miniature, samples, **{"folder": tmp_path / "out", **given})
    assert not (tmp_path / "out").exists()
