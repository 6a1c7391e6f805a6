"""The scripts that make benchmark data: what they draw is what is shipped, and boxes mean what they say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from sar_fast.lab.benchmark.tables import open_table
from sar_fast.lab.benchmark.tasks.refcoco import RefCOCO
from sar_fast.lab.focus.dataset import load_grounding_samples

DATA = Path(__file__).parents[2] / "experiments" / "data"


def run_script(monkeypatch, name, *flags):
    monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
    return runpy.run_path(str(DATA / name), run_name="__main__")


def test_the_shipped_benchmarks_are_what_the_script_draws(tmp_path, monkeypatch):
    """Rows, pictures included; the bytes of the files depend on the version of pyarrow."""
    run_script(monkeypatch, "make_benchmarks.py", "--output_dir", tmp_path)
    drawn = sorted(f.relative_to(tmp_path) for f in tmp_path.rglob("*.parquet"))
    shipped = sorted(f.relative_to(DATA / "benchmarks") for f in (DATA / "benchmarks").rglob("*.parquet"))
    assert drawn == shipped
    for name in drawn:
        assert pq.read_table(tmp_path / name).equals(pq.read_table(DATA / "benchmarks" / name)), name


def test_benchmarks_are_balanced_so_that_a_constant_answer_scores_as_chance_does():
    for name, answers in (("mme", {"Yes", "No"}), ("pope", {"yes", "no"})):
        (file,) = (DATA / "benchmarks" / name).rglob("*.parquet")
        rows = pq.read_table(file, columns=["answer", "category"]).to_pylist()
        for category in {row["category"] for row in rows}:
            mine = [row["answer"] for row in rows if row["category"] == category]
            assert {mine.count(answer) for answer in answers} == {len(mine) // 2}


def test_boxes_of_the_drawn_refcoco_hold_the_object(tmp_path):
    """x, y, width, height: inside the box are pixels of the object's colour, right of it the picture goes on."""
    task = RefCOCO(RefCOCO.Options(box_format="pixels"))
    table = open_table(task, str(DATA / "benchmarks" / "refcoco"), None)
    samples, skips = task.samples(table.rows)
    assert (len(samples), skips) == (96, [])
    for sample in samples[::8]:
        x1, y1, x2, y2 = map(int, sample.about["box"])
        pixels = np.asarray(table.picture(sample.row)).astype(int)
        centre = pixels[(y1 + y2) // 2, (x1 + x2) // 2]
        primary = {"red": 0, "green": 1, "blue": 2}
        colour = next((c for c in primary if c in sample.about["expression"]), None)
        if colour is not None:
            assert centre.argmax() == primary[colour]


def test_refcoco_becomes_the_analyses_dataset(tmp_path, monkeypatch, capsys):
    out = tmp_path / "refcoco_val_sar.parquet"
    run_script(
        monkeypatch,
        "make_refcoco_sar.py",
        "--data_dir",
        DATA / "benchmarks/refcoco",
        "--output_dir",
        tmp_path,
        "--max_rows",
        10,
    )
    assert "10 rows, 0 left out" in capsys.readouterr().out
    samples = load_grounding_samples(str(out), DATA)
    source = pq.read_table(next((DATA / "benchmarks/refcoco").rglob("*.parquet"))).to_pylist()
    for sample, row in zip(samples, source):
        x, y, width, height = row["bbox"]
        assert sample.bbox == pytest.approx((x, y, x + width, y + height))
        assert sample.object_prompt == row["answer"][0]
        assert sample.query == f"Where is {row['answer'][0]} in the image?"


def test_the_query_must_name_the_object(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "make_refcoco_sar.py", "--query", "Where is it?")
    assert "needed words with {} for the expression" in capsys.readouterr().err
