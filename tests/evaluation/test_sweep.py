"""A sweep's folders equal those of separate runs, and each can continue the other's work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from sar_fast.cli.evaluate import arguments as arguments_module
from sar_fast.cli.evaluate import benchmark, sweep
from sar_fast.lab.benchmark.figures import draw_figure_6
from sar_fast.lab.show.figures import written

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(__file__).parents[2] / "experiments" / "data" / "benchmarks"
SETTINGS = {"k0": [], "k1_beta0.02": ["1", "0.02"], "k4_beta0.02": ["4", "0.02"], "k4_beta0.5": ["4", "0.5"]}


def words(folder, task="mme", *more):
    common = ["--model_name_or_path", "miniature", "--task", task, "--data_dir", str(DATA / task), "--device", "cpu"]
    return [*common, "--max_samples", "12", "--per_device_eval_batch_size", "4", "--output_dir", str(folder), *more]


def records(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    more = ["--k", "4", "0", "1", "--beta", "0.5", "0.02", "--compare_batches", "2"]
    return folder, sweep.run(sweep.parse(words(folder, "mme", *more)))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_equals_a_separate_run(swept, tmp_path, name):
    folder, _ = swept
    sar = SETTINGS[name] and [
        "--use_sar",
        "--sar_activation_layer_k",
        SETTINGS[name][0],
        "--sar_beta",
        SETTINGS[name][1],
    ]
    alone = benchmark.run(arguments_module.parse(words(tmp_path / "alone", "mme", *sar)))
    assert records(folder / name) == records(tmp_path / "alone")
    assert json.loads((folder / name / "all_results.json").read_text()) == json.loads(json.dumps(alone))


def test_beta_without_a_re_weighted_setting_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--beta must be left out with --k 0 alone"):
        sweep.parse(words(tmp_path, "mme", "--k", "0", "--beta", "0.3", "0.4"))
    sweep.parse(words(tmp_path, "mme", "--k", "0"))


def test_summary_names_settings_cost_and_speed(swept):
    folder, summary = swept
    assert [(row["k"], row["beta"]) for row in summary["settings"]] == [
        (0, None), (1, 0.02), (1, 0.5), (4, 0.02), (4, 0.5)
    ]  # fmt: skip
    assert summary["layer_passes"] == {"branched": 4 + 1 + 1 + 4 + 4, "separate": 20}
    assert summary["compared_batches"] == 2
    assert summary["speed_up"] > 0
    assert json.loads((folder / "sweep.json").read_text())["settings"] == summary["settings"]
    assert (folder / "figure6.png").stat().st_size > 5000
    assert all(row["partial"]["perception"] == "1 of 10 categories" for row in summary["settings"])
    weighed = {row["beta"]: row["scores"] for row in summary["settings"] if row["k"] == 4}
    assert weighed[0.02] != weighed[0.5]  # the settings do differ


def test_an_interrupted_sweep_goes_on_and_ends_the_same(swept, tmp_path):
    """One setting whole, one cut inside a line, one gone."""
    folder, _ = swept
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    for name in ("k4_beta0.5", "k1_beta0.02"):
        lines = (again / name / "samples.jsonl").read_text().splitlines(keepends=True)
        (again / name / "parts").mkdir()
        (again / name / "parts" / "00000.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
        (again / name / "samples.jsonl").unlink()
        (again / name / "all_results.json").unlink()
    shutil.rmtree(again / "k0")
    summary = sweep.run(sweep.parse(words(again, "mme", "--k", "0", "1", "4", "--beta", "0.02", "0.5")))
    for name in SETTINGS:
        assert records(again / name) == records(folder / name)
    assert summary["settings"] == swept[1]["settings"]
    assert summary["speed_up"] == swept[1]["speed_up"]  # measured before, not measured again


def test_first_token_scoring_sweeps_too(tmp_path):
    more = ["--scoring", "first_token", "--k", "0", "4", "--beta", "0.02", "--compare_batches", "1"]
    summary = sweep.run(sweep.parse(words(tmp_path, "mme", *more)))
    probabilities = [records(tmp_path / name)[0]["log_probabilities"] for name in ("k0", "k4_beta0.02")]
    assert probabilities[0] != probabilities[1]
    assert summary["compared_batches"] == 1


def test_close_values_of_beta_have_folders_of_their_own(tmp_path):
    found = sweep.parse(words(tmp_path, "mme", "--k", "1", "--beta", "0.5", "0.50000001", "1", "1e-07")).settings()
    names = [Path(setting.output_dir).name for setting in found]
    assert names == ["k1_beta1e-07", "k1_beta0.5", "k1_beta0.50000001", "k1_beta1"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--compare_batches", "-1", "--k", "1"], "--compare_batches must be at least 0; got -1"),
        (["--use_sar", "--k", "1"], "--use_sar must be left out, as a sweep varies it: give --k and --beta"),
        (["--sar_beta", "0.1", "--k", "1"], "--sar_beta must be left out, as a sweep varies it"),
        (["--k", "1", "1"], "--k must be one or more different values"),
        (["--k", "1", "--beta", "0"], "--beta must be > 0"),
        (["--k", "-1"], "--k must be >= 0; got -1"),
        (["--k", "9"], "--k must be at most the number of attention layers, 4; got 9"),
        (["--kk", "9"], "unknown flag --kk; did you mean --k?"),
    ],
)
def test_bad_input(tmp_path, more, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        sweep.run(sweep.parse(words(tmp_path / "out", "mme", *more)))


def test_the_panels_of_many_scores_are_wrapped_into_rows(tmp_path):
    rows = [{"k": k, "beta": 0.5 if k else None, "scores": {f"s{n}": k + n for n in range(6)}} for k in (0, 5)]
    written(draw_figure_6(rows), tmp_path / "figure6.png")
    width, height = Image.open(tmp_path / "figure6.png").size
    assert (width, height) == (4 * 510, 2 * 450)
