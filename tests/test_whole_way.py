"""From data to a score by commands alone, as a user types them: each takes what the one before left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from tests.training.runs import environment
from tests.training.samples import DATA, REPOSITORY

TRAIN = [
    "--model_name_or_path", "miniature", "--do_train", "--dataset", "mine", "--finetuning_type", "lora",
    "--lora_rank", "4", "--use_sar", "--sar_activation_layer_k", "2", "--sar_beta", "0.05", "--learning_rate", "1e-3",
    "--per_device_train_batch_size", "2", "--logging_steps", "1", "--save_steps", "2", "--report_to", "none",
]  # fmt: skip


@pytest.fixture
def command(tmp_path):
    """(program, words) -> stdout, or stderr of a failure; ``sar-fast`` or a script of ``experiments/``."""

    def run(program: str, *words: str | Path, code: int = 0) -> str:
        script = REPOSITORY / "experiments" / program
        start = [str(script)] if program.endswith(".py") else ["-m", "sar_fast", program]
        done = subprocess.run(
            [sys.executable, *start, *map(str, words)],
            cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr if code else done.stdout

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
    assert "8 records, 8 images" in command("data", "check", data / "mine.json", "--model", "miniature")

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
