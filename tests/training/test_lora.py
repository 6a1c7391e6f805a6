"""LoRA from training to use: what train.py leaves is evaluated, looked at, trained on, merged and trained on again."""

from __future__ import annotations

import json
import runpy
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from sar_fast import SARConfig
from sar_fast.cli.evaluate import benchmark
from sar_fast.cli.evaluate.loading import model_settings
from sar_fast.lab.io.merging import merge_into
from sar_fast.lab.io.model_source import MINIATURE_PATH
from sar_fast.lab.io.models import find_model, load_model
from sar_fast.lab.training.arguments import parse
from sar_fast.lab.training.run import build
from tests.adapters import base_model, logits, picture, usual_mode, write_adapter
from tests.evaluation.benchmarks import arguments as evaluation_arguments
from tests.helpers import combinations
from tests.test_cli import QUESTION, fails, run
from tests.training.runs import SCRIPT, flags, parameters, train
from tests.training.samples import DATA

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")

SAR = SARConfig(activation_layer_k=2, beta=0.1)
LORA = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "q_proj,v_proj",
    "learning_rate": 2e-2,
    "max_steps": 3,
    "save_strategy": "steps",
    "save_steps": 2,
}
GO_ON = {**LORA, "lora_rank": None, "lora_target": None}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A LoRA run with SAR on."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    cache = tmp_path_factory.mktemp("datasets")
    train(folder, **LORA, use_sar=True, sar_activation_layer_k=2, sar_beta=0.1, sav_grad=True, cache_dir=cache)
    return folder


@pytest.fixture(scope="module")
def merged(run_folder):
    return merge_into(find_model(str(run_folder)), run_folder.parent / "merged")


@pytest.fixture
def picture_file(tmp_path):
    picture().save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


@pytest.mark.everyday(config=[SAR])
@pytest.mark.parametrize("part", [".", "checkpoint-2"])
@pytest.mark.parametrize("config", [None, SAR], ids=["plain", "sar"])
def test_a_runs_adapter_is_opened_as_peft_opens_it(run_folder, part, config):
    by_hand = peft.PeftModel.from_pretrained(base_model(), run_folder / part).eval()
    model, processor = load_model(find_model(str(run_folder / part)), "cpu", "float32")
    assert torch.equal(logits(model, config), logits(by_hand, config))
    assert not torch.allclose(logits(model, config), logits(base_model(), config), atol=1e-2)
    assert processor.chat_template


def test_commands_take_adapters(run_folder, picture_file):
    model = ("--model", str(run_folder))
    given = ("--image", picture_file, "--question", QUESTION)
    assert run("generate", *model, *given).strip()
    assert run("generate", *model, "--base_model", "miniature", *given, "--use-sar", "--k", "2").strip()
    by_hand = peft.PeftModel.from_pretrained(base_model(), run_folder).eval()
    own, base = (json.loads(run("inspect", *m, *given, "--json", "--k", "2")) for m in (model, ()))
    assert own["model_type"] == "llava"
    assert own["layers"] != base["layers"]
    from sar_fast.cli.loading import load_model
    from sar_fast.lab.io.answering import build_inputs
    from sar_fast.lab.measure.recording import record

    inputs = build_inputs(by_hand, load_model("miniature")[1], [picture()], [QUESTION])
    stats = record(by_hand, inputs, SARConfig(activation_layer_k=2)).stats
    assert own["layers"][0]["sav"] == stats[2].sav[0].tolist()
    timed = json.loads(run("bench", "train", *model, "--length", "100", "--steps", "1", "--json"))
    assert [mode["mode"] for mode in timed["modes"]] == ["sar off", "sar on", "eager"]
    checked = run("data", "check", str(DATA / "shapes_train.parquet"), *model, "--max-length", "200")
    assert "0 bad" in checked
    assert "--base_model must be left out without --model" in fails(
        "data", "check", "x.json", "--base_model", "miniature"
    )
    assert "--base_model 'miniature' has no effect on --model" in fails("generate", "--base_model", "miniature", *given)


def evaluate(out, model, **more):
    return benchmark.run(evaluation_arguments(out, model_name_or_path=str(model), max_samples=8, **more))


SETTINGS = [
    pytest.param({}, id="plain", marks=pytest.mark.slow),
    pytest.param({"use_sar": True, "sar_activation_layer_k": 2}, id="sar"),
]


@pytest.mark.parametrize("sar", SETTINGS)
def test_an_adapter_is_evaluated_and_so_is_its_merged_model(run_folder, merged, tmp_path, sar):
    scores = [evaluate(tmp_path / name, model, **sar) for name, model in (("a", run_folder), ("m", merged))]
    assert scores[0] == scores[1]
    replies = [(tmp_path / name / "samples.jsonl").read_text() for name in ("a", "m")]
    assert replies[0] == replies[1]
    settings = json.loads((tmp_path / "a" / "run_metadata.json").read_text())["settings"]
    assert (settings["model"], settings["base_model"]) == ("lora", "miniature")


def test_records_depend_on_adapter_and_base(run_folder, tmp_path):
    of = lambda model, base=None: model_settings(
        evaluation_arguments("x", model_name_or_path=str(model), base_model=base and str(base))
    )
    own = of(run_folder)
    assert of("miniature").get("base_weights") is None
    assert own["weights"] != own["base_weights"] == of("miniature")["weights"]
    base = shutil.copytree(MINIATURE_PATH, tmp_path / "base")
    assert of(run_folder, base) == {**own, "base_model": "base"}
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (base / "model.safetensors").write_bytes(bytes(content))
    assert of(run_folder, base)["base_weights"] != own["base_weights"]
    assert of(run_folder / "checkpoint-2")["weights"] != own["weights"]
    other = shutil.copytree(run_folder, tmp_path / "lora")
    assert of(other) == own


def test_training_goes_on_with_the_adapter(run_folder, tmp_path, caplog):
    caplog.set_level("INFO")
    start = load_file(run_folder / "adapter_model.safetensors")
    trainer = train(tmp_path / "out", model_name_or_path=run_folder, **{**GO_ON, "learning_rate": 0.0, "max_steps": 1})
    assert "lora goes on with" in caplog.text
    assert trainer.model.peft_config["default"].r == 4
    untouched = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(start) == set(untouched)
    assert all(torch.equal(start[name], untouched[name]) for name in start)
    trainer = train(tmp_path / "more", model_name_or_path=run_folder, **GO_ON)
    moved = load_file(tmp_path / "more" / "adapter_model.safetensors")
    assert not any(torch.equal(start[name], moved[name]) for name in start)
    assert all("lora_" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


def test_the_base_that_is_given_is_the_one_that_is_saved(run_folder, tmp_path):
    base = shutil.copytree(MINIATURE_PATH, tmp_path / "base")
    train(tmp_path / "out", model_name_or_path=run_folder, base_model=base, **{**GO_ON, "max_steps": 1})
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)


def test_a_relative_base_is_saved_as_it_is_found_from_anywhere(tmp_path, monkeypatch):
    shutil.copytree(MINIATURE_PATH, tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "out", model_name_or_path="models/base", **{**LORA, "max_steps": 1})
    monkeypatch.chdir("/")
    assert find_model(str(tmp_path / "out")).weights == str(tmp_path / "models" / "base")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 8}, r"lora_rank must be 4 as in the adapter .*, or left out, to go on with it; got 8"),
        ({"lora_alpha": 9}, "lora_alpha must be 8 as in the adapter .*; got 9"),
        ({"lora_dropout": 0.5}, r"lora_dropout must be 0\.0 as in the adapter .*; got 0\.5"),
        (
            {"lora_target": "q_proj"},
            r"lora_target must name the layers of the adapter .*, 8 \(q_proj, v_proj\), .*; got q_proj",
        ),
        ({"lora_target": "all"}, "got all, which is 28 layers"),
        ({"base_model": "/gone"}, "--base_model '/gone' is no folder on this machine"),
    ],
)
def test_flags_that_the_adapter_contradicts(run_folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build(parse(flags(tmp_path / "out", model_name_or_path=run_folder, **{**GO_ON, **changes})))
    assert not (tmp_path / "out").exists()


def test_flags_that_the_adapter_confirms(run_folder, tmp_path):
    build(parse(flags(tmp_path / "out", model_name_or_path=run_folder, **LORA, lora_alpha=8, lora_dropout=0.0)))


def test_an_adapter_of_another_kind_is_not_gone_on_with(tmp_path):
    folder = write_adapter(tmp_path / "ia3", peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(
        ValueError,
        match=r"finetuning_type must be full, .* for an adapter that is no LoRA; .*; got lora for .*ia3, IA3",
    ):
        build(parse(flags(tmp_path / "out", model_name_or_path=folder, finetuning_type="lora")))


@pytest.mark.parametrize("finetuning_type", ["full", pytest.param("freeze", marks=pytest.mark.slow)])
def test_other_types_train_the_merged_model(run_folder, merged, tmp_path, finetuning_type, caplog):
    caplog.set_level("INFO")
    changes = {"finetuning_type": finetuning_type, "max_steps": 2}
    of_adapter = train(tmp_path / "a", model_name_or_path=run_folder, **changes)
    assert f"{finetuning_type} trains the merged model" in caplog.text
    of_merged = train(tmp_path / "m", model_name_or_path=merged, **changes)
    expected = parameters(of_merged.model)
    assert set(parameters(of_adapter.model)) == set(expected)
    for name, value in parameters(of_adapter.model).items():
        torch.testing.assert_close(value, expected[name])
    trained = lambda trainer: {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained(of_adapter) == trained(of_merged)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "a")
    assert not (tmp_path / "a" / "adapter_config.json").exists()


def test_a_folder_holds_one_kind(run_folder, tmp_path):
    """A whole model beside an adapter would be taken for either."""
    out = shutil.copytree(run_folder, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-*"))
    with pytest.raises(ValueError, match=r"holds adapter_model.safetensors of an earlier run"):
        build(parse(flags(out)))
    with pytest.raises(ValueError, match=r"output_dir .* holds the model that is trained"):
        build(parse(flags(out, model_name_or_path=out, overwrite_output_dir=True)))
    train(out, max_steps=1, overwrite_output_dir=True)
    assert find_model(str(out)).adapter is None
    train(out, **{**LORA, "max_steps": 1}, overwrite_output_dir=True)
    assert find_model(str(out)).adapter == str(out)


SAVED = combinations(
    ("full", "lora"), (True, False, None), daily=lambda kind, given: (kind == "full") == (given is False)
)


@pytest.mark.everyday(finetuning_type=["lora"])
@pytest.mark.parametrize(("finetuning_type", "given"), SAVED)
def test_configurations_are_saved_as_they_were(tmp_path, finetuning_type, given):
    """Without a cache while training; files with the mode of any other file."""
    base = shutil.copytree(MINIATURE_PATH, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["text_config"].pop("use_cache", None)
    config["text_config"] |= {} if given is None else {"use_cache": given}
    (base / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    more = LORA if finetuning_type == "lora" else {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer = train(out, model_name_or_path=base, **more)
    assert trainer.model.config.get_text_config().use_cache is False
    saved = [out, out / "checkpoint-2"]
    for folder in saved:
        assert {file.stat().st_mode & 0o777 for file in folder.glob("*.safetensors")} == {usual_mode(tmp_path)}
    if finetuning_type == "lora":
        saved = [merge_into(find_model(str(f)), tmp_path / f"merged{n}") for n, f in enumerate(saved)]
    for folder in saved:
        written = json.loads((folder / "config.json").read_text())
        assert written["text_config"]["use_cache"] is (True if given is None else given)
        assert "use_cache" not in written


def test_the_commands_end_in_one_line(run_folder, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(run_folder, tmp_path / "lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    words = flags(tmp_path / "out", model_name_or_path=folder, finetuning_type="lora")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    error = capsys.readouterr().err
    assert error.strip().splitlines()[-1] == (
        f"error: --model_name_or_path {str(folder)!r} is an adapter on '/gone/base', which is no folder on this "
        "machine: say where it is with --base_model"
    )
    assert "Traceback" not in error
