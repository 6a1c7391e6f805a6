"""From data to a score by commands alone, as a user types them: each takes what the one before left behind.

The first is a process of its own; the others run the same main programs here, which imports once.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from tests.training.runs import environment
from tests.training.samples import DATA, REPOSITORY

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN = [
    "--model_name_or_path", "miniature", "--do_train", "--dataset", "mine", "--finetuning_type", "lora",
    "--lora_rank", "4", "--use_sar", "--sar_activation_layer_k", "2", "--sar_beta", "0.05", "--learning_rate", "1e-3",
    "--per_device_train_batch_size", "2", "--logging_steps", "1", "--save_steps", "2", "--report_to", "none",
]  # fmt: skip


def process(start: list[str], words: list[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a process of its own, which imports everything anew."""
    command = [sys.executable, *start, *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def here(start: list[str], words: list[str]) -> tuple[int, str, str]:
    """The same of the same main program, run in this process."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    program = runpy.run_module if start[0] == "-m" else runpy.run_path
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [start[-1], *words])
        try:
            program(start[-1], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def command(tmp_path, monkeypatch):
    """(program, words) -> stdout, or stderr of a failure; ``sar-fast`` or a script of ``experiments/``."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)

    def run(program: str, *words: str | Path, code: int = 0, by: Callable[..., tuple[int, str, str]] = here) -> str:
        is_script = program.endswith(".py")
        start = [str(REPOSITORY / "experiments" / program)] if is_script else ["-m", "sar_fast"]
        ended, out, err = by(start, [str(word) for word in (words if is_script else (program, *words))])
        assert ended == code, err
        assert "Traceback" not in err
        return err if code else out

    return run


def own_data(folder: Path) -> Path:
    """Records as people have them: photographs that lie on their side, cut-outs on nothing, 16-bit scans."""
    rows = json.loads((DATA / "shapes_llava.json").read_text())[:8]
    (folder / "pictures").mkdir(parents=True)
    for number, row in enumerate(rows):
        picture = Image.open(DATA / row["image"]).convert("RGB")
        row["image"] = f"pictures/{number}.png"
        if number % 4 == 1:
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = 6
            row["image"] = f"pictures/{number}.jpg"
            picture.transpose(Image.Transpose.ROTATE_90).save(folder / row["image"], exif=exif)
            continue
        if number % 4 == 2:
            picture.putalpha(picture.convert("L").point(lambda value: 255 if value < 250 else 0))
        elif number % 4 == 3:
            picture = picture.convert("I;16").point(lambda value: value * 257)
        picture.save(folder / row["image"])
    (folder / "mine.json").write_text(json.dumps(rows))
    entry = {"file_name": "mine.json", "formatting": "sharegpt", "columns": {"images": "image"}}
    (folder / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    return folder


def test_from_data_to_a_score(command, tmp_path):
    data = own_data(tmp_path / "data")
    assert "8 records, 8 images" in command("data", "check", data / "mine.json", "--model", "miniature", by=process)

    words = [*TRAIN, "--dataset_dir", data, "--output_dir", "lora", "--max_steps", "4"]
    command("train.py", *words)
    run = tmp_path / "lora"
    whole = json.loads((run / "train_results.json").read_text())
    for name in ("adapter_model.safetensors", "train_results.json", "all_results.json"):  # as a kill would leave it
        (run / name).unlink()
    for file in (run / "checkpoint-4").iterdir():
        file.unlink()
    (run / "checkpoint-4").rmdir()
    refused = command("train.py", *words, "--resume_from_checkpoint", "true", "--lora_rank", "8", code=2)
    assert "lora_rank is 8, was 4" in refused
    command("train.py", *words, "--resume_from_checkpoint", "true")
    again = json.loads((run / "train_results.json").read_text())
    assert again["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)

    benchmark = ["--task", "pope", "--data_dir", DATA / "benchmarks/pope", "--max_samples", "12"]
    benchmark += ["--scoring", "first_token"]  # its numbers tell a model from one that answers alike
    sar = ["--use_sar", "--sar_activation_layer_k", "2", "--sar_beta", "0.05"]
    found = {}
    command("merge", "lora", "--output_dir", "merged")
    runs = (("off", "lora", []), ("on", "lora", sar), ("merged", "merged", sar), ("base", "miniature", sar))
    for name, model, flags in runs:
        folder = tmp_path / f"score_{name}"
        command("evaluate.py", "--model_name_or_path", model, *benchmark, *flags, "--output_dir", folder)
        assert json.loads((folder / "all_results.json").read_text())["overall"]["accuracy"] > 0
        records = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
        found[name] = [value for record in records for value in record["log_probabilities"].values()]
    assert found["merged"] == pytest.approx(found["on"], abs=1e-3)
    for other in ("off", "base"):
        assert max(abs(a - b) for a, b in zip(found["on"], found[other])) > 0.01

    asked = ["--image", data / "pictures/1.jpg", "--question", "What colour is the circle?", "--use_sar", "--k", "2"]
    answers = [command("generate", "--model", model, *asked) for model in ("lora", "merged")]
    assert answers[0] == answers[1] != ""

    command("plot", "lora", "--output_dir", "figures")
    assert len(list((tmp_path / "figures").glob("*.png"))) == 2
