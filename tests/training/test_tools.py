"""``sar-fast plot`` and ``sar-fast data check``: what they draw and find, and what they say about bad input."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from sar_fast.cli import app
from tests.training.runs import train
from tests.training.samples import REPOSITORY, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")


def command(*words):
    """(exit code, output) of ``sar-fast``."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_figures_are_drawn(tmp_path):
    for name in ("sft", "control"):
        train(tmp_path / name, max_steps=2, custom_trainer="control_sft" if name == "control" else None)
    done = CliRunner().invoke(
        app, ["plot", *(str(tmp_path / n) for n in ("sft", "control")), "--output_dir", str(tmp_path / "f")]
    )
    assert done.exit_code == 0, done.output
    for name in ("figure_3.png", "figure_4.png"):
        assert Image.open(tmp_path / "f" / name).size[0] > 500
    missing = CliRunner().invoke(app, ["plot", str(tmp_path / "nowhere")])
    assert missing.exit_code == 2
    assert "does not exist" in missing.output


LINE = json.dumps({"step": 1, "gradient_analysis/avg_text_token_grad_L1": 0.5})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"garbage", "gradient_sparsity.jsonl, line 1 is not JSON"),
        ((LINE + "\n").encode("utf-16"), "gradient_sparsity.jsonl, line 1 is not JSON"),
        (LINE.encode() + b"\n[1]\n", "line 2 has no step"),
        (b'{"step": 1}\n', "gradient_sparsity.jsonl holds no gradient measurement"),
        (b"", "holds no gradient measurement"),
    ],
)
def test_plot_names_a_bad_log(tmp_path, text, message):
    (tmp_path / "gradient_sparsity.jsonl").write_bytes(text)
    code, output = command("plot", tmp_path, "--output_dir", tmp_path / "f")
    assert (code, message in output) == (2, True), output
    assert not (tmp_path / "f").exists()


def test_plot_refuses_a_run_given_twice_and_a_file_to_write_into(tmp_path):
    log = tmp_path / "gradient_sparsity.jsonl"
    log.write_text(LINE + "\n")
    code, output = command("plot", tmp_path, log, "--output_dir", tmp_path / "f")
    assert (code, "is given twice" in output) == (2, True), output
    for out in (log, "/proc/x"):
        code, output = command("plot", tmp_path, "--output_dir", out)
        assert (code, f"--output_dir must be a folder to write into; got '{out}'" in output) == (2, True), output


def test_data_check_names_bad_records(tmp_path):
    shipped = REPOSITORY / "experiments" / "data" / "shapes_llava.json"
    good = CliRunner().invoke(app, ["data", "check", str(shipped), "--model", "miniature", "--json"])
    assert good.exit_code == 0, good.output
    found = json.loads(good.stdout)
    assert (found["records"], found["images"], found["answers"], found["bad"]) == (32, 32, 96, [])
    path = write_jsonl(tmp_path / "rows.jsonl", [{"id": "x", "conversations": []}, {"messages": 3}])
    bad = CliRunner().invoke(app, ["data", "check", str(path)])
    assert bad.exit_code == 1
    assert "record 0 (id x): column 'conversations'" in bad.output
    assert "record 1: " in bad.output
    assert "2 records, 0 images, 0 answers; 2 bad" in bad.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{data}", "--dataset_info", "/nope"], "--dataset_info '/nope' is no dataset_info.json nor a folder with one"),
        (["{data}", "--model", "miniature", "--max_length", "0"], "--max_length must be at least 1; got 0"),
        (["{data}", "--model", "/nope"], "--model '/nope' is no folder on this machine"),
        (["{folder}"], "is a folder, needed a file"),
        (["{utf16}"], "utf16.json is not UTF-8 text"),
        (["{empty}"], "empty.json has no rows"),
        (["{grounding}", "--model", "miniature"], "--model must be left out for a grounding table"),
    ],
)
def test_data_check_names_what_is_wrong_with_its_arguments(tmp_path, words, message):
    (tmp_path / "utf16.json").write_text("[]", encoding="utf-16")
    (tmp_path / "empty.json").write_text("[]")
    data = REPOSITORY / "experiments" / "data"
    places = {
        "data": data / "shapes_llava.json",
        "folder": data,
        "utf16": tmp_path / "utf16.json",
        "empty": tmp_path / "empty.json",
        "grounding": data / "shapes_grounding.parquet",
    }
    code, output = command("data", "check", *(word.format(**places) for word in words))
    assert (code, message in output) == (2, True), output


def test_data_check_knows_grounding_tables(tmp_path):
    shipped = REPOSITORY / "experiments" / "data" / "shapes_grounding.parquet"
    code, output = command("data", "check", shipped, "--json")
    assert code == 0, output
    found = json.loads(output)
    assert (found["records"], found["images"], found["boxes"], found["bad"]) == (581, 581, 581, [])
    Image.new("RGB", (40, 20)).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    good = {"image": "good.png", "query": "Where?", "object_prompt": "dog", "bbox": [1, 2, 30, 20]}
    changes = {
        "": {},
        "no query": {"query": None},
        "object_prompt is ' ', needed words": {"object_prompt": " "},
        "needed four numbers": {"bbox": [1, 2, 3]},
        "box has no area": {"bbox": [30, 2, 1, 20]},
        "lies outside of the picture's 40 x 20 pixels": {"bbox": [1, 2, 30, 25]},
        "box in fractions of the picture, needed pixels: [0.1, 0.2, 0.9, 0.8]": {"bbox": [0.1, 0.2, 0.9, 0.8]},
        "unreadable image": {"image": "cut.png"},
        "neither bbox nor mask": {"bbox": None},
        "id 'a' is in record 9 already": {"id": "a"},
    }
    rows = [{**good, **change} for change in (*list(changes.values())[:-1], {"id": "a"}, {"id": "a"})]
    code, output = command("data", "check", write_jsonl(tmp_path / "rows.jsonl", rows))
    assert code == 1, output
    lines = output.splitlines()
    assert len(lines) == 10, output
    for line, message in zip(lines, list(changes)[1:]):
        assert message in line
    assert lines[0].startswith("record 1: no query")
    assert lines[-1].endswith("11 records, 2 images, 2 boxes, 0 masks; 9 bad")
