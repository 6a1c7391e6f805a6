"""Small benchmark runs and tables, for the tests of ``evaluate.py --task``."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset, Image
from PIL import Image as Pictures

from sar_fast.cli.evaluate.arguments import EvaluationArguments
from sar_fast.lab.benchmark.tasks import find_task
from sar_fast.lab.run.results import SAMPLES

ROOT = Path(__file__).parents[2]
DATA = ROOT / "experiments" / "data" / "benchmarks"


def arguments(out, **change):
    """As flags make them, those of the task's own options included."""
    given = {"model_name_or_path": "miniature", "output_dir": str(out), "task": "mme", "data_dir": str(DATA / "mme")}
    given |= {"max_samples": 16, **change}
    known = {field.name for field in dataclasses.fields(EvaluationArguments)}
    made = EvaluationArguments(**{name: value for name, value in given.items() if name in known})
    if made.task is not None:
        own = {name: value for name, value in given.items() if name not in known}
        made.task_options = find_task(made.task).Options(**own)
    return made


def lines(out):
    return [json.loads(line) for line in (out / SAMPLES).read_text().splitlines()]


def write_table(folder, rows, name="test-00000-of-00001.parquet"):
    folder.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_list(rows)
    if "image" in rows[0] and isinstance(rows[0]["image"], dict):
        table = table.cast_column("image", Image())
    pq.write_table(table.data.table, folder / name)
    return str(folder)


def picture_bytes(colour="red", size=(24, 16)):
    buffer = io.BytesIO()
    Pictures.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def mme_rows(pictures, broken=()):
    return [
        {
            "question_id": f"{n}.png",
            "image": {"bytes": b"no picture" if n in broken else picture_bytes(), "path": None},
            "question": f"Is there a {word}? Please answer yes or no.",
            "answer": answer,
            "category": "existence",
        }
        for n in range(pictures)
        for word, answer in (("red circle", "Yes"), ("blue circle", "No"))
    ]
