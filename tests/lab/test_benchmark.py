"""``evaluate``: benchmarks on a model that the caller has."""

from __future__ import annotations

import dataclasses
import json
import tempfile

import pytest
from peft import LoraConfig, get_peft_model

from sar_fast import SARConfig, lab
from sar_fast.base import extras
from sar_fast.base.errors import ArgumentError
from sar_fast.base.extras import MissingExtraError
from sar_fast.cli.evaluate import benchmark
from sar_fast.hf import apply_sar
from sar_fast.hf.features import handle_of
from sar_fast.lab import evaluate
from sar_fast.lab.benchmark.asking import Asker
from sar_fast.lab.benchmark.tasks import Skip
from sar_fast.lab.benchmark.tasks.mme import MME
from sar_fast.lab.benchmark.tasks.refcoco import RefCOCO
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.run.results import METADATA, RESULTS, SAMPLES
from sar_fast.weighting import Fixed, HeadScales
from tests.evaluation.benchmarks import DATA, arguments
from tests.evaluation.conftest import arrow_cache  # noqa: F401
from tests.lab.lending import lent

pytestmark = pytest.mark.usefixtures("one_thread", "arrow_cache")

MME_DATA = DATA / "mme"
SAR = SARConfig(activation_layer_k=2, beta=0.05)
FLAGS = {"use_sar": True, "sar_activation_layer_k": 2, "sar_beta": 0.05}
FEW = {"data_dir": MME_DATA, "max_samples": 8, "scoring": "first_token"}


@pytest.fixture(scope="module")
def miniature():
    return load_miniature()


@pytest.fixture
def no_traces(tmp_path, monkeypatch):
    """The working directory and the place of temporary files are as empty afterwards as they were."""
    places = [tmp_path / "here", tmp_path / "temporary"]
    for place in places:
        place.mkdir()
    monkeypatch.chdir(places[0])
    monkeypatch.setattr(tempfile, "tempdir", str(places[1]))
    yield
    assert [list(place.iterdir()) for place in places] == [[], []]


@pytest.mark.parametrize(("sar", "flags"), [(None, {}), (SAR, FLAGS)], ids=["plain", "sar"])
def test_records_and_scores_are_the_commands(miniature, tmp_path, sar, flags):
    given = {"max_samples": 8, "scoring": "first_token"}
    scores = benchmark.run(arguments(tmp_path / "command", **given, **flags))
    with lent(*miniature):
        found = evaluate(*miniature, "mme", sar=sar, data_dir=MME_DATA, folder=tmp_path / "call", **given)
    for name in (SAMPLES, RESULTS):
        assert (tmp_path / "call" / name).read_bytes() == (tmp_path / "command" / name).read_bytes()
    assert found.scores == scores
    assert found.headline == dict(MME().headline(scores))
    assert found.records == [json.loads(line) for line in (tmp_path / "command" / SAMPLES).read_text().splitlines()]
    settings = [json.loads((tmp_path / d / METADATA).read_text())["settings"] for d in ("command", "call")]
    assert [*settings[0]] == [*settings[1]]
    assert settings[0]["sar"] == settings[1]["sar"]


def test_without_a_folder_nothing_is_left_and_a_second_call_agrees(miniature, no_traces):
    first = evaluate(*miniature, "mme", **FEW)
    assert evaluate(*miniature, MME, **FEW).records == first.records
    assert evaluate(*miniature, MME(), **FEW, batch_size=3).headline == first.headline
    assert evaluate(*miniature, "mme", sar=SAR, **FEW).records != first.records


def test_a_model_that_trains_and_has_sar_on_it_is_asked_with_that_and_goes_on(miniature):
    model, processor = miniature
    wanted = evaluate(model, processor, "mme", sar=SAR, **FEW)
    with apply_sar(model, SAR):
        model.train()
        model.get_submodule("model.vision_tower").eval()
        with lent(model, processor):
            assert evaluate(model, processor, "mme", **FEW).records == wanted.records
        with pytest.raises(ArgumentError, match="sar must be None for a model that has SAR on it"):
            evaluate(model, processor, "mme", sar=SAR, **FEW)
    model.eval()


def test_an_adapter_around_the_model_stays_there(no_traces):
    """A LoRA that has learnt nothing answers as its base."""
    model, processor = load_miniature()
    plain = evaluate(model, processor, "mme", sar=SAR, **FEW)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with lent(model, processor):  # what is wrapped, with the LoRA in it
        found = evaluate(wrapped, processor, "mme", sar=SAR, **FEW)
    for one, other in zip(found.records, plain.records, strict=True):
        assert one["log_probabilities"] == pytest.approx(other["log_probabilities"], abs=1e-5)


class Stopped(Exception):
    pass


def test_an_interrupted_call_continues_to_the_same_bytes(miniature, tmp_path, monkeypatch):
    given = {**FEW, "batch_size": 2}
    evaluate(*miniature, "mme", folder=tmp_path / "whole", **given)
    replies, calls = Asker.replies, []

    def stop_at_the_third(ask, *args):
        calls.append(ask)
        if len(calls) == 3:
            assert handle_of(ask.model.base_model).config.activation_layer_k == 0  # what sharing prompts needs
            raise Stopped
        return replies(ask, *args)

    monkeypatch.setattr(Asker, "replies", stop_at_the_third)
    with pytest.raises(Stopped), lent(*miniature):
        evaluate(*miniature, "mme", folder=tmp_path / "broken", **given)
    evaluate(*miniature, "mme", folder=tmp_path / "broken", **given)
    assert len(calls) == 5
    for name in (SAMPLES, RESULTS):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("flags", [{}, FLAGS], ids=["plain", "sar"])
def test_the_command_takes_sar_off_its_model_too(tmp_path, monkeypatch, flags):
    """The methods of its class are those of every other model of that class."""
    asked = []

    def stop(ask, *_):
        asked.append(ask.model)
        assert handle_of(ask.model.base_model) is not None
        raise Stopped

    monkeypatch.setattr(Asker, "replies", stop)
    with pytest.raises(Stopped):
        benchmark.run(arguments(tmp_path, max_samples=2, **flags))
    assert [handle_of(model.base_model) for model in asked] == [None]


def test_another_model_or_rule_does_not_continue_a_folder(miniature, tmp_path):
    """Weights in memory count by what they are, and so does a rule that is a module."""
    model, processor = miniature
    rule = HeadScales(layers=4, heads=8)
    config = SARConfig(activation_layer_k=2, weighting=rule)
    evaluate(model, processor, "mme", sar=config, folder=tmp_path, **FEW)
    rule.scales.data[3, 0] += 1
    with pytest.raises(ArgumentError, match=r"^folder .* other settings: sar\.weighting\.state .*give overwrite=True$"):
        evaluate(model, processor, "mme", sar=config, folder=tmp_path, **FEW)
    evaluate(model, processor, "mme", sar=config, folder=tmp_path, overwrite=True, **FEW)
    rule.scales.data[3, 0] -= 1
    bias = model.lm_head.weight.data[0]
    bias += 1
    try:
        with pytest.raises(ArgumentError, match="weights was "):
            evaluate(model, processor, "mme", sar=config, folder=tmp_path, **FEW)
    finally:
        bias -= 1


def test_results_are_tables_files_and_pictures(miniature, tmp_path, no_traces):
    found = evaluate(*miniature, "mme", **FEW)
    frame = found.to_pandas()
    assert len(frame) == 8
    assert frame["correct"].mean() * 100 == found.scores["overall"]["accuracy"]
    saved = found.save(tmp_path / "saved")
    assert {file.name for file in saved.iterdir()} == {SAMPLES, RESULTS, METADATA}
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    with pytest.raises(ArgumentError, match="folder must be a new folder, or an empty one"):
        found.save(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    again = evaluate(*miniature, "mme", folder=saved, **FEW)  # finished, and so nothing is asked
    assert (again.records, len(again.metadata["sessions"])) == (found.records, 2)
    figure = found.plot(tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 5000
    assert len(figure.axes[0].patches) == sum(value is not None for value in found.headline.values())
    assert (found.skipped, found.warnings) == (found.scores["skipped"], found.scores["warnings"])


def test_what_a_plain_installation_lacks_is_named(miniature, monkeypatch):
    found = evaluate(*miniature, "mme", **FEW)
    find, lacking = extras.importlib.util.find_spec, ("pandas", "datasets")
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None if name in lacking else find(name))
    with pytest.raises(
        MissingExtraError, match=r"sar_fast\.lab\.evaluate needs datasets: pip install 'sar_fast\[train"
    ):
        _ = lab.evaluate
    assert callable(lab.ask)
    with pytest.raises(MissingExtraError, match=r"to_pandas\(\) needs pandas: pip install 'sar_fast\[reports\]'"):
        found.to_pandas()


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("mmbnch", {}, r"task must be one of mme, .*; got 'mmbnch'; did you mean 'mmbench'\?"),
        ("mme", {"scoring": "last"}, "scoring must be one of 'generate', 'first_token'; got 'last'"),
        ("mme", {"batch_size": 0}, "batch_size must be a whole number, at least 1; got 0"),
        ("mme", {"max_samples": 0}, "max_samples must be a whole number, at least 1; got 0"),
        ("mme", {"max_samples": True}, "max_samples must be a whole number, at least 1; got True"),
        ("mme", {"workers": -1}, "workers must be a whole number, at least 0; got -1"),
        ("mme", {"max_new_tokens": 5}, "max_new_tokens must be left out with scoring first_token; got 5"),
        ("mme", {"overwrite": True}, "overwrite must be left out without folder; got True"),
        ("mme", {"folder": "/dev/null/x"}, "folder must be a folder to write into; got '/dev/null/x': "),
        ("mme", {"box_format": "pixels"}, "box_format must be left out with task mme, which takes prompt_suffix; got"),
        (MME(), {"prompt_suffix": ""}, "prompt_suffix must be left out where task is an instance, which has its"),
        ("textvqa", {}, "scoring must be generate for textvqa; got 'first_token'"),
        ("mmbench", {"choice_format": "x"}, "choice_format must be one of 'letters', 'cloze'; got 'x'"),
        (
            RefCOCO(RefCOCO.Options(box_format="resized_pixels")),
            {"scoring": "generate"},
            "box_format must be another one, since the model's processor does not report .* got resized_pixels",
        ),
    ],
)
def test_bad_arguments_change_nothing(miniature, no_traces, task, change, message):
    with pytest.raises(ArgumentError, match=message), lent(*miniature):
        evaluate(*miniature, task, **{**FEW, **change})


def test_what_is_no_model_or_no_task(miniature, no_traces):
    model, processor = miniature
    with pytest.raises(ArgumentError, match="sar must be a SARConfig or None; got dict"):
        evaluate(model, processor, "mme", sar={"beta": 1}, **FEW)
    with pytest.raises(ArgumentError, match="task must be a subclass of Task"):
        evaluate(model, processor, Skip, **FEW)
    with pytest.raises(ValueError, match="activation_layer_k must be at most the number of attention layers, 4; got 9"):
        evaluate(model, processor, "mme", sar=SARConfig(activation_layer_k=9), **FEW)


def test_options_of_a_task(miniature, no_traces):
    """As flags of the command, and the settings name them as it does."""
    given = {"data_dir": DATA / "refcoco", "max_samples": 4}
    found = evaluate(*miniature, "refcoco", box_format="miniature", **given)
    assert found.metadata["settings"]["box_format"] == "miniature"
    assert found.headline["accuracy at IoU 0.5"] == 100
    plain = evaluate(*miniature, "refcoco", **given)
    assert plain.metadata["settings"]["box_format"] == "fraction"  # by the family
    changed = evaluate(*miniature, "mme", prompt_suffix=" Yes or no?", **FEW)
    assert all(record["prompt"].endswith(" Yes or no?") for record in changed.records)


def test_a_rule_without_a_name_leaves_no_folder(miniature, tmp_path):
    rule = lambda statistics, layer: statistics.sav
    config = SARConfig(activation_layer_k=1, weighting=rule)
    needed = r"weighting must be registered, .* register_weighting\('its name', .*<lambda>\) .*; got .*<lambda>"
    with pytest.raises(ArgumentError, match=needed), lent(*miniature):
        evaluate(*miniature, "mme", sar=config, folder=tmp_path / "run", **FEW)
    assert not list(tmp_path.iterdir())
    found = evaluate(*miniature, "mme", sar=config, **FEW)
    settings = found.metadata["settings"]["sar"]
    assert settings["weighting"] == repr(rule)
    assert settings.keys() == SARConfig(activation_layer_k=1, weighting=Fixed([1.0])).to_dict().keys()
    scale = Fixed([1.0] * 8)
    assert found.records != evaluate(*miniature, "mme", sar=config.replace(weighting=scale), **FEW).records


def test_a_rule_is_named_in_the_settings(miniature, no_traces):
    config = SARConfig(activation_layer_k=1, weighting=Fixed([1.0] * 7 + [0.5]))
    found = evaluate(*miniature, "mme", sar=config, **FEW)
    assert found.metadata["settings"]["sar"] == config.to_dict()
    assert dataclasses.is_dataclass(found)
