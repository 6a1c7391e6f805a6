"""What a folder of results takes for its own: the same data and weights, whatever their names, sizes and times."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq
import pytest

from sar_fast.evaluation import benchmark
from sar_fast.evaluation.results import METADATA
from sar_fast.evaluation.stamps import BLOCK, sampled_stamp
from sar_fast.evaluation.tables import open_table
from sar_fast.evaluation.tasks import TaskOptions, find_task
from sar_fast.miniature.checkpoint import MINIATURE_PATH
from tests.evaluation.test_benchmark import (  # noqa: F401  (a fixture)
    DATA,
    _caches,
    arguments,
    mme_rows,
    picture_bytes,
    write_table,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def keep_time(path, content):
    """Other bytes in a file, and the times it had."""
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_models_of_one_name_are_told_apart(tmp_path):
    """Folders by their weights, wherever they lie; hub ids by their owner too."""
    task = find_task("mme")(TaskOptions())
    table = open_table(task, str(DATA / "mme"), None)
    of = lambda name: benchmark.settings_of(arguments("x", model_name_or_path=name), task, table, "generate")
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
