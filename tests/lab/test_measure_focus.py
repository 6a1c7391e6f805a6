"""``measure_focus``: SFS and FI of a model that the caller has."""

from __future__ import annotations

import dataclasses
import json
import tempfile

import numpy as np
import pytest
from PIL import Image

from sar_fast import SARConfig
from sar_fast.base.errors import ArgumentError
from sar_fast.cli.evaluate import focus
from sar_fast.cli.evaluate.arguments import parse
from sar_fast.hf import apply_sar
from sar_fast.hf.features import handle_of
from sar_fast.lab import measure_focus
from sar_fast.lab.focus import FocusMetricsEvaluator, GroundingSample
from sar_fast.lab.focus.dataset import dataset_settings, load_grounding_samples
from sar_fast.lab.focus.results import RESULTS
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.run.results import METADATA, SAMPLES
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
    return load_grounding_samples(DATA, None)[:3]


@pytest.mark.parametrize(("sar", "flags"), [(None, []), (SAR, FLAGS)], ids=["plain", "sar"])
def test_records_and_scores_are_the_commands(miniature, tmp_path, sar, flags):
    words = f"--model_name_or_path miniature --device cpu --do_sfs_fi_eval --dataset {DATA} --max_samples 4"
    command = focus.run(parse([*words.split(), "--output_dir", str(tmp_path / "command"), *flags]))
    with lent(*miniature):
        found = measure_focus(*miniature, DATA, sar=sar, max_samples=4, folder=tmp_path / "call")
    assert (tmp_path / "call" / SAMPLES).read_bytes() == (tmp_path / "command" / SAMPLES).read_bytes()
    assert found.summary == {name: value for name, value in command.items() if name != "metadata"}
    assert (found.sfs, found.fi) == (command["semantic_focus_score"], command["focus_instability"])
    assert found.sfs_interval[0] <= found.sfs <= found.sfs_interval[1]
    assert found.uniform_sfs == pytest.approx(np.mean([record["mask_share"] for record in found.records]))
    assert ("c_weighted" in found.summary) == (sar is not None)
    settings = [json.loads((tmp_path / d / METADATA).read_text())["settings"] for d in ("command", "call")]
    assert settings[0]["sar"] == settings[1]["sar"]
    assert settings[0]["asked"] == settings[1]["asked"]


def test_without_a_folder_nothing_is_left_and_sar_may_be_on_already(miniature, samples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, processor = miniature
    plain, wanted = (measure_focus(model, processor, samples, sar=sar) for sar in (None, SAR))
    assert plain.records != wanted.records
    with lent(model, processor), apply_sar(model, SAR) as handle:
        model.train()
        assert measure_focus(model, processor, samples, batch_size=2).records == wanted.records
        assert handle_of(model.base_model) is handle
        assert handle.config == SAR
        assert all(part.training for part in model.modules())
        with pytest.raises(ArgumentError, match="sar must be None for a model that has SAR on it"):
            measure_focus(model, processor, samples, sar=SAR)
        model.eval()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_call_goes_on_where_it_stopped(miniature, samples, tmp_path, monkeypatch):
    call = lambda **more: measure_focus(*miniature, samples, batch_size=1, folder=tmp_path / "out", **more)
    score, asked = FocusMetricsEvaluator.score, []

    def stop_at_the_third(self, batch):
        asked.extend(sample.id for sample in batch)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return score(self, batch)

    monkeypatch.setattr(FocusMetricsEvaluator, "score", stop_at_the_third)
    with lent(*miniature), pytest.raises(KeyboardInterrupt):
        call()
    found = call()
    assert asked == [sample.id for sample in samples] + [samples[2].id]
    assert found.records == measure_focus(*miniature, samples).records
    with pytest.raises(ArgumentError, match=r"folder .* other settings: layers was .*overwrite=True"):
        call(layers=[-2])
    assert call(layers=[-2], overwrite=True, overlays=True).records != found.records
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == len(samples)


def test_results_as_table_files_and_figure(miniature, samples, tmp_path):
    bad = dataclasses.replace(samples[0], id="bad", bbox=(3, 3, 3, 9), mask=None)
    found = measure_focus(*miniature, [*samples, bad])
    assert found.skipped == {"box has no area": ["bad"]}
    table = found.to_pandas()
    assert list(table["id"]) == [*(s.id for s in samples), "bad"]
    assert table["semantic_focus_score"].mean() == pytest.approx(found.sfs)
    folder = found.save(tmp_path / "saved")
    assert json.loads((folder / RESULTS).read_text()) == found.to_dict()
    assert [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()] == found.records
    with pytest.raises(ArgumentError, match="a new folder, or an empty one"):
        found.save(folder)
    figure = found.plot(tmp_path / "focus.png")
    assert [axes.get_xlabel() for axes in figure.axes] == ["semantic focus score", "focus instability"]
    assert np.asarray(Image.open(tmp_path / "focus.png").convert("L")).std() > 5


def test_samples_in_memory_are_told_apart_by_their_values(samples):
    (picture, mask), box = (samples[0].image, np.zeros((64, 64), bool)), np.array([1, 2, 9, 9], np.float32)
    other = picture.copy()
    other.putpixel((0, 0), (1, 2, 3))
    mask[3:9] = True
    rows = [
        GroundingSample("0", picture, "where?", "it", box, mask),
        GroundingSample("0", other, "where?", "it", box, mask),
        GroundingSample("0", picture, "where?", "it", box + 1, mask),
        GroundingSample("0", picture, "where?", "it", box, ~mask),
    ]
    stamps = [dataset_settings(None, [row])["asked"] for row in [*rows, *rows]]
    assert stamps[:4] == stamps[4:]
    assert len(set(stamps)) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": []}, "samples must be at least one GroundingSample; got none"),
        ({"samples": [{"id": "0"}]}, "samples must be a sequence of GroundingSample, .*; got list of dict"),
        ({"samples": "twice"}, r"samples must be of different ids; got '\w+' twice"),
        ({"layers": [9]}, "layers must be among the model's 4 attention layers; got 9"),
        ({"layers": [0], "sar": SAR}, "layers must be among layers 2 to 3: with SAR on"),
        ({"layers": -1}, "layers must be a list of attention layers"),
        ({"templates": ["no place"]}, "templates must be texts with exactly one {}"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"max_samples": 0}, "max_samples must be at least 1; got 0"),
        ({"media_dir": "."}, "media_dir must be left out where samples is no name of a dataset"),
        ({"overlays": True, "folder": None}, "overlays must be False without folder; got True"),
        ({"overwrite": True, "folder": None}, "overwrite must be left out without folder; got True"),
        ({"sar": "yes"}, "sar must be a SARConfig or None; got str"),
    ],
)
def test_bad_arguments_change_and_write_nothing(miniature, samples, tmp_path, given, message):
    rows = given.pop("samples", samples)
    rows = [samples[0], samples[0]] if rows == "twice" else rows
    with lent(*miniature), pytest.raises(ArgumentError, match=message):
        measure_focus(*miniature, rows, **{"folder": tmp_path / "out", **given})
    assert not (tmp_path / "out").exists()
