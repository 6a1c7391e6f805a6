"""What a folder of results takes for its own: the same data and weights, whatever their times;
and what it takes for nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq
import pytest

from sar_fast.cli.evaluate import benchmark, focus, probe
from sar_fast.cli.evaluate.loading import model_settings
from sar_fast.lab.benchmark.asking import Asker, Asking
from sar_fast.lab.benchmark.questions import Questions
from sar_fast.lab.benchmark.tables import open_table
from sar_fast.lab.benchmark.tasks import find_task
from sar_fast.lab.focus import FocusMetricsEvaluator
from sar_fast.lab.io.model_source import MINIATURE_PATH
from sar_fast.lab.io.stamps import BLOCK, sampled_stamp
from sar_fast.lab.probe.features import FeatureStore
from sar_fast.lab.probe.probe import LayerwiseProbe
from sar_fast.lab.run.results import METADATA
from tests.evaluation.benchmarks import DATA, arguments, mme_rows, picture_bytes, write_table

pytestmark = pytest.mark.usefixtures("one_thread", "arrow_cache")


def keep_time(path, content):
    """Other bytes in a file, and the times it had."""
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_models_of_one_name_are_told_apart(tmp_path):
    """Folders by their weights, wherever they lie; hub ids by their owner too."""
    task = find_task("mme")()
    table = open_table(task, str(DATA / "mme"), None)
    settings = Questions(task, table, [], []).settings
    of = lambda name: settings(model_settings(arguments("x", model_name_or_path=name)), Asking())
    shutil.copytree(MINIATURE_PATH, tmp_path / "a" / "model")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copy)
    for file in (tmp_path / "b" / "model").iterdir():
        file.touch()
    (tmp_path / "b" / "model" / METADATA).write_text("{}")  # as an evaluation with this output_dir leaves it
    assert of(str(tmp_path / "a" / "model")) == of(str(tmp_path / "b" / "model"))
    weights = tmp_path / "b" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    keep_time(weights, bytes(content))
    assert of(str(tmp_path / "a" / "model")) != of(str(tmp_path / "b" / "model"))
    assert of("one/model") != of("two/model")


def swap_answers(folder):
    """Yes and No of one picture change places: a file of the same size."""
    (path,) = folder.glob("*.parquet")
    rows = pq.read_table(path).to_pylist()
    rows[0]["answer"], rows[1]["answer"] = rows[1]["answer"], rows[0]["answer"]
    times, size = path.stat(), path.stat().st_size
    pq.write_table(pyarrow.Table.from_pylist(rows), path, compression="none", use_dictionary=False)
    assert path.stat().st_size == size
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_other_data_of_the_same_name_size_and_time_is_an_error(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    table = pyarrow.Table.from_pylist(mme_rows(2))
    pq.write_table(table, data / "test.parquet", compression="none", use_dictionary=False)
    before = benchmark.run(arguments(out, data_dir=str(data)))
    swap_answers(data)
    with pytest.raises(ValueError, match=r'files\.test\.parquet was "\w+", now "\w+"'):
        benchmark.run(arguments(out, data_dir=str(data)))
    after = benchmark.run(arguments(out, data_dir=str(data), overwrite_output_dir=True))
    assert after["overall"] != before["overall"]


def test_other_picture_files_are_an_error(tmp_path):
    rows = [{**row, "image": row["question_id"]} for row in mme_rows(2)]
    data = Path(write_table(tmp_path / "data", rows))
    for name in ("0.png", "1.png"):
        (data / name).write_bytes(picture_bytes())
    benchmark.run(arguments(tmp_path / "out", data_dir=str(data)))
    keep_time(data / "1.png", picture_bytes("blue"))
    with pytest.raises(ValueError, match=r'pictures was "\w+", now "\w+"'):
        benchmark.run(arguments(tmp_path / "out", data_dir=str(data)))


def test_weights_of_many_gigabytes_are_read_in_samples(tmp_path):
    """Head and tail count, and blocks between them; a hole of zeros stands for what is not there."""
    path = tmp_path / "model.safetensors"
    size, found = 64 << 20, set()
    for place in (0, size // 2, size - 1):
        with path.open("wb") as file:
            file.truncate(size)
            file.seek(place // BLOCK * BLOCK)
            file.write(b"x" * BLOCK)
        found.add(sampled_stamp(path))
    with path.open("r+b") as file:
        file.truncate(size - 1)
    assert len({*found, sampled_stamp(path)}) == 4


# --- runs that left no record


def focus_arguments(out, **change):
    given = {"task": None, "data_dir": None, "dataset": "shapes_grounding", "max_samples": 8}
    return arguments(out, **{**given, **change})


RUNS = {
    "benchmark": (benchmark, {}, arguments),
    "focus": (focus, {"do_sfs_fi_eval": True}, focus_arguments),
    "probe": (probe, {"do_layerwise_probe": True, "probe_seeds": 1}, focus_arguments),
}


@pytest.mark.parametrize("kind", RUNS)
def test_what_a_failed_command_left_does_not_bind_the_next(tmp_path, kind):
    module, flags, of = RUNS[kind]
    with pytest.raises(ValueError, match="at most the number of attention layers, 4; got 10"):
        module.run(of(tmp_path / "out", use_sar=True, **flags))
    assert not (tmp_path / "out").exists()
    assert module.run(of(tmp_path / "out", use_sar=True, sar_activation_layer_k=2, **flags))


def test_a_layer_that_is_not_there_is_found_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="--focus_layers must be among the model's 4 attention layers; got 9"):
        focus.run(focus_arguments(tmp_path / "out", do_sfs_fi_eval=True, focus_layers=[9]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_killed_before_its_first_record_does_not_bind_the_next(tmp_path, monkeypatch, kind):
    module, flags, of = RUNS[kind]
    whole = module.run(of(tmp_path / "whole", **flags))

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        for owner, name in ((Asker, "replies"), (FocusMetricsEvaluator, "score"), (FeatureStore, "put")):
            broken.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            module.run(of(tmp_path / "out", use_sar=True, sar_activation_layer_k=2, **flags))
    assert (tmp_path / "out" / METADATA).is_file()
    found = module.run(of(tmp_path / "out", **flags))
    assert {k: v for k, v in found.items() if k != "metadata"} == {k: v for k, v in whole.items() if k != "metadata"}
    assert len(json.loads((tmp_path / "out" / METADATA).read_text())["sessions"]) == 1
    with pytest.raises(ValueError, match="other settings"):
        module.run(of(tmp_path / "out", use_sar=True, sar_activation_layer_k=2, **flags))


def test_features_without_scores_are_work_that_is_kept(tmp_path, monkeypatch):
    _, flags, of = RUNS["probe"]
    with monkeypatch.context() as broken:
        broken.setattr(LayerwiseProbe, "fit", lambda *_: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception):
            probe.run(of(tmp_path, **flags))
    with pytest.raises(ValueError, match="other settings: sar was null"):
        probe.run(of(tmp_path, use_sar=True, sar_activation_layer_k=2, **flags))
    probe.run(of(tmp_path, **flags))
    assert json.loads((tmp_path / "layerwise_probe_details.json").read_text())["forward_passes"] == 0


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    """A training writes all_results.json and a run_metadata.json of its own; ``parts`` may be anyone's."""
    (tmp_path / METADATA).write_text('{"command": []}')
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"is not that of an evaluation; choose another folder$"):
            benchmark.run(arguments(tmp_path, overwrite_output_dir=overwrite))
    assert (tmp_path / METADATA).read_text() == '{"command": []}'
    (tmp_path / METADATA).unlink()
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "wheel.stl").write_text("mine")
    with pytest.raises(ValueError, match=r"holds parts but no run_metadata\.json"):
        benchmark.run(arguments(tmp_path))
    assert (tmp_path / "parts" / "wheel.stl").read_text() == "mine"


def test_results_may_lie_in_the_models_own_folder(tmp_path):
    shutil.copytree(MINIATURE_PATH, tmp_path / "model")
    first = benchmark.run(arguments(tmp_path / "model", model_name_or_path=str(tmp_path / "model")))
    assert benchmark.run(arguments(tmp_path / "model", model_name_or_path=str(tmp_path / "model"))) == first


# --- overlays


def test_overlays_are_drawn_when_they_are_asked_for_later(tmp_path):
    focus.run(focus_arguments(tmp_path, do_sfs_fi_eval=True))
    before = (tmp_path / "samples.jsonl").read_bytes()
    focus.run(focus_arguments(tmp_path, do_sfs_fi_eval=True, focus_overlays=True))
    drawn = sorted((tmp_path / "overlays").iterdir())
    assert len(drawn) == 8
    assert (tmp_path / "samples.jsonl").read_bytes() == before
    drawn[3].unlink()
    focus.run(focus_arguments(tmp_path, do_sfs_fi_eval=True, focus_overlays=True))
    assert drawn[3].is_file()
    focus.run(focus_arguments(tmp_path, do_sfs_fi_eval=True, max_samples=2, overwrite_output_dir=True))
    assert not list((tmp_path / "overlays").iterdir())
