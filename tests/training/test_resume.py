"""A resumed run is the run that was stopped; what an earlier run left is lost only to a whole save."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
import shutil

import pytest

from sar_fast.lab.training.arguments import ControlArguments, DataArguments, ModelArguments, SFTArguments, parse
from sar_fast.lab.training.checkpoints import COMPLETE, checkpoints
from sar_fast.lab.training.resume import BY_PRODUCT, MAY_CHANGE
from sar_fast.lab.training.run import build, run
from tests.training.runs import flags, lines, train
from tests.training.samples import DATA, REPOSITORY, write_jsonl

RUN = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "gradient_analysis": False}
HALF = {**RUN, "resume_from_checkpoint": "true"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with two checkpoints; copied by whoever changes it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(folder, **RUN)
    return folder


@pytest.fixture
def half(finished, tmp_path):
    """The run as a kill after its first checkpoint leaves it."""
    folder = tmp_path / "half"
    shutil.copytree(finished / "checkpoint-2", folder / "checkpoint-2")
    shutil.copy(finished / "run_metadata.json", folder)
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 1e-4}, "learning_rate is 0.0001, was 0.001"),
        ({"dataset": "shapes_train"}, r"dataset is \[.shapes_train .*was \[.shapes_llava "),
        ({"per_device_train_batch_size": 4}, "total_train_batch_size is 4, was 2"),
        ({"gradient_accumulation_steps": 2}, "total_train_batch_size is 4, was 2"),
        ({"seed": 4}, "seed is 4, was 3"),
        ({"max_steps": 6}, "max_steps is 6, was 4"),
        ({"num_train_epochs": 5}, "num_train_epochs is 5.*was 3"),
        ({"use_sar": True, "sar_activation_layer_k": 2}, "use_sar is true, was false.*sar_activation_layer_k is 2"),
        ({"finetuning_type": "lora"}, "finetuning_type is lora, was full"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, was 0"),
        ({"warmup_steps": 1}, "warmup_steps is 1.0, was 0"),
        ({"custom_trainer": "control_sft"}, "custom_trainer is control_sft, was null"),
        ({"max_samples": 8}, "max_samples is 8, was null"),
        ({"max_length": 300}, "max_length is 300, was null"),
    ],
)
def test_another_run_is_no_resume(half, changes, named):
    before = contents(half)
    with pytest.raises(
        ValueError,
        match=f"(?s)must go on with the same run; .*model_name_or_path and another output_dir; got .*{named}",
    ):
        build(parse(flags(half, **{**HALF, **changes})))
    assert contents(half) == before


def test_another_rank_of_lora_is_no_resume(tmp_path):
    changes = {**RUN, "max_steps": 2, "finetuning_type": "lora", "lora_rank": 4}
    train(tmp_path, **changes)
    changes["resume_from_checkpoint"] = "true"
    for rank in (8, None):  # 8 is the default
        with pytest.raises(ValueError, match="lora_rank is 8, was 4; lora_alpha is 16, was 8"):
            build(parse(flags(tmp_path, **{**changes, "lora_rank": rank})))
    build(parse(flags(tmp_path, **changes, lora_alpha=8, lora_target="all")))


def test_changed_data_is_another_run(tmp_path):
    rows = json.loads((DATA / "shapes_llava.json").read_text())[:4]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    common = {**RUN, "max_steps": 2, "dataset": data, "media_dir": DATA}
    train(tmp_path / "run", **common)
    rows[0]["conversations"][-1]["value"] += " Indeed."
    write_jsonl(data, rows)
    with pytest.raises(ValueError, match=r"dataset is \['?.*was"):
        build(parse(flags(tmp_path / "run", **common, resume_from_checkpoint="true")))


def test_a_replaced_picture_is_another_run(tmp_path):
    rows = json.loads((DATA / "shapes_llava.json").read_text())[:4]
    for number, row in enumerate(rows):
        shutil.copy(DATA / row["image"], tmp_path / f"{number}.png")
        row["image"] = f"{number}.png"
    common = {**RUN, "max_steps": 2, "dataset": write_jsonl(tmp_path / "data.jsonl", rows)}
    train(tmp_path / "run", **common)
    build(parse(flags(tmp_path / "run", **common, resume_from_checkpoint="true")))
    shutil.copy(tmp_path / "1.png", tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"content of the pictures is .*, was"):
        build(parse(flags(tmp_path / "run", **common, resume_from_checkpoint="true")))


@pytest.mark.everyday(streaming=[True])
@pytest.mark.parametrize(
    ("entry", "streaming", "named"),
    [
        ({"num_samples": 6}, False, "content of the records is .*, was"),
        ({"columns": {"messages": "other"}}, False, "content of the records is .*, was"),
        ({"num_samples": 6}, True, "dataset_info is .*num_samples.*6.*, was"),
    ],
)
def test_another_entry_of_the_registry_is_another_run(tmp_path, entry, streaming, named):
    turns = lambda *words: [{"from": who, "value": value} for who, value in zip(("human", "gpt"), words)]
    rows = [{"conversations": turns(f"{n}?", "red"), "other": turns(f"{n}?", "blue")} for n in range(8)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    common = {**RUN, "max_steps": 2, "dataset": "rows", "dataset_dir": tmp_path, "streaming": streaming}

    def register(**changes):
        (tmp_path / "dataset_info.json").write_text(
            json.dumps({"rows": {"file_name": "rows.jsonl", "formatting": "sharegpt", **changes}})
        )

    register()
    train(tmp_path / "run", **common)
    build(parse(flags(tmp_path / "run", **common, resume_from_checkpoint="true")))
    register(**entry)
    with pytest.raises(ValueError, match=named):
        build(parse(flags(tmp_path / "run", **common, resume_from_checkpoint="true")))


def test_what_may_change(half, finished, tmp_path):
    """The total batch counts, not how it is divided; data and folders may have moved."""
    moved = tmp_path / "moved"
    half.rename(moved)
    shutil.copy(DATA / "shapes_llava.json", tmp_path)
    changes = {"dataset": tmp_path / "shapes_llava.json", "media_dir": DATA, "logging_steps": 2, "save_steps": 3}
    again = train(moved, **{**HALF, **changes, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2})
    assert again.state.global_step == 4
    whole = json.loads((finished / "train_results.json").read_text())
    assert json.loads((moved / "train_results.json").read_text())["train_loss"] == pytest.approx(
        whole["train_loss"], rel=1e-4
    )


def test_the_docs_list_what_may_change():
    groups = (ModelArguments, DataArguments, ControlArguments, SFTArguments)
    flags = {field.name for group in groups for field in dataclasses.fields(group)}
    text = (REPOSITORY / "docs" / "training.md").read_text().partition("**May change:**")[2].partition("**Anything")[0]
    listed = set(re.findall(r"`([a-z_*]+)`", text)) - {"max_length", "control_sft"}  # which are explained there
    for pattern in listed:
        assert fnmatch.filter(flags, pattern), pattern
    found = {flag for flag in flags for pattern in listed if fnmatch.fnmatchcase(flag, pattern)}
    assert found == (MAY_CHANGE | set(BY_PRODUCT)) & flags


def test_figures_are_of_the_whole_run(half, finished):
    trainer = train(half, **HALF)
    again, whole = (json.loads((folder / "all_results.json").read_text()) for folder in (half, finished))
    assert again["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-6)
    logged = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert again["train_loss"] == pytest.approx(sum(logged) / 4, rel=1e-5)
    before = json.loads((half / "checkpoint-2" / "run_totals.json").read_text())
    assert again["train_runtime"] > before["seconds"] > 0
    assert again["train_steps_per_second"] == pytest.approx(4 / again["train_runtime"], abs=2e-3)
    assert again["train_samples_per_second"] == pytest.approx(8 / again["train_runtime"], abs=2e-3)
    metadata = json.loads((half / "run_metadata.json").read_text())
    assert [r["checkpoint"] for r in metadata["resumed"]] == [str(half / "checkpoint-2")]
    assert metadata["configuration"]["training"]["resume_from_checkpoint"] == "None"  # as it began


def test_a_finished_run_stays_as_it_is(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = contents(folder)
    train(folder, **HALF)
    after = contents(folder)
    metadata = json.loads(after.pop("run_metadata.json"))
    assert after == {n: c for n, c in before.items() if n != "run_metadata.json"}
    assert len(metadata["resumed"]) == 1
    trainer = train(folder, **HALF, do_eval=True, eval_dataset="shapes_pairs")  # with the trained weights
    results = json.loads((folder / "all_results.json").read_text())
    assert results["train_loss"] == json.loads(before["train_results.json"])["train_loss"]
    assert results["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])
    assert contents(folder)["model.safetensors"] == before["model.safetensors"]
    assert contents(folder)["trainer_state.json"] == before["trainer_state.json"]


def test_a_run_that_was_stopped_before_its_results_gets_them(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished / "checkpoint-4", folder / "checkpoint-4")
    train(folder, **HALF)
    again, whole = (json.loads((f / "train_results.json").read_text()) for f in (folder, finished))
    assert again["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-6)
    assert (folder / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere", "resume_from_checkpoint must be a whole checkpoint; got nowhere"),
        ("{run}", "resume_from_checkpoint must be a checkpoint, as checkpoint-4 in it; got {run}, a run's folder"),
    ],
)
def test_what_is_no_checkpoint_is_named_whatever_the_folder_holds(finished, tmp_path, place, message):
    place, message = (words.format(run=finished) for words in (place, message))
    for output in (finished, tmp_path):
        with pytest.raises(ValueError, match=message):
            build(parse(flags(output, **{**RUN, "resume_from_checkpoint": place})))


def test_weights_alone_are_no_resume(tmp_path):
    common = {**RUN, "max_steps": 2, "save_only_model": True}
    train(tmp_path, **common)
    with pytest.raises(
        ValueError,
        match=r"must go on from .* optimizer state, .* \(save_only_model\); or .*model_name.*; got .*checkpoint-2",
    ):
        build(parse(flags(tmp_path, **common, resume_from_checkpoint="true")))


def test_a_checkpoint_without_settings_is_resumed_with_a_warning(half, caplog):
    (half / "checkpoint-2" / "run_settings.json").unlink()
    build(parse(flags(half, **HALF)))
    assert "whether this is the run that wrote it is not known" in caplog.text


# an earlier run in the output folder


@pytest.mark.parametrize(
    "wrong", [{"dataset": "shapes_lava"}, {"model_name_or_path": "./nowhere"}, {"lora_target": "nothing"}], ids=str
)
def test_nothing_is_lost_to_a_run_that_cannot_start(finished, tmp_path, wrong):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = contents(folder)
    extra = {"finetuning_type": "lora"} if "lora_target" in wrong else {}
    with pytest.raises((ValueError, OSError)):
        build(parse(flags(folder, **{**RUN, **wrong, **extra, "overwrite_output_dir": True})))
    assert contents(folder) == before


def test_an_earlier_run_waits_for_the_first_whole_save(finished, tmp_path):
    """A run that dies before it keeps the earlier one aside, and so does a second one; then it goes."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    asked = {**RUN, "overwrite_output_dir": True}
    for _ in range(2):
        arguments = parse(flags(folder, **asked))
        trainer, checkpoint = build(arguments)
        trainer.training_step = lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError("no room"))
        with pytest.raises(MemoryError):
            run(trainer, arguments, checkpoint)
        kept = contents(folder / "replaced_run")
        assert kept == {name: content for name, content in before.items() if name != "notes.txt"}
    train(folder, **{**asked, "max_steps": 2})
    assert [p.name for p in checkpoints(folder)] == ["checkpoint-2"]
    assert not (folder / "replaced_run").exists()
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_half_written_first_checkpoint_does_not_count(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    arguments = parse(flags(folder, **RUN, overwrite_output_dir=True))
    trainer, checkpoint = build(arguments)

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", fail)
    with pytest.raises(RuntimeError, match="checkpoint-2 could not be written"):
        run(trainer, arguments, checkpoint)
    assert (folder / "replaced_run" / "checkpoint-4" / COMPLETE).is_file()


def test_a_model_without_checkpoints_is_not_replaced_unasked(tmp_path):
    train(tmp_path, max_steps=1)
    before = contents(tmp_path)
    for resume in (None, "true", "false"):
        with pytest.raises(
            ValueError,
            match=r"output_dir must be another folder, or .* overwrite_output_dir; got .*model.safetensors of an ear",
        ):
            build(parse(flags(tmp_path, max_steps=1, resume_from_checkpoint=resume)))
    assert contents(tmp_path) == before
    train(tmp_path, max_steps=2, overwrite_output_dir=True)
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 2
    assert [line["step"] for line in lines(tmp_path / "gradient_sparsity.jsonl")] == [1, 2]


@pytest.mark.parametrize("place", [".", "checkpoint-4"])
def test_the_model_that_is_trained_is_not_overwritten(finished, place):
    with pytest.raises(ValueError, match="holds the model that is trained"):
        build(parse(flags(finished, **RUN, overwrite_output_dir=True, model_name_or_path=finished / place)))
