"""Makes refcoco_val_sar.parquet beside this file out of RefCOCO as lmms-lab publishes it.

    python experiments/data/make_refcoco_sar.py --data_dir RefCOCO        # a folder with val-*.parquet

One row per object and its first expression: ``id``, ``image``, ``query``, ``object_prompt`` (the expression) and
``bbox`` (x1, y1, x2, y2 in pixels; RefCOCO has x, y, width, height). ``--dataset refcoco_val_sar`` reads it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sar_fast.lab.benchmark.tables import Table, open_table
from sar_fast.lab.benchmark.tasks import Sample, find_task
from sar_fast.lab.io.records import RecordError, open_image

HERE = Path(__file__).parent
QUERY = "Where is {} in the image?"
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("query", pa.string()),
        ("object_prompt", pa.string()),
        ("bbox", pa.list_(pa.float64())),
    ]
)
ROWS_AT_ONCE = 256


def to_row(sample: Sample, table: Table, query: str) -> dict[str, Any]:
    """``RecordError`` if the picture cannot be read; else its bytes as they are."""
    reference = table.reference(sample.row)
    open_image(reference)
    expression = sample.about["expression"]
    return {
        "id": sample.key,
        "image": {"bytes": reference["bytes"] or Path(reference["path"]).read_bytes(), "path": None},
        "query": query.format(expression),
        "object_prompt": expression,
        "bbox": sample.about["box"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="refcoco", help="refcoco, refcoco+ or refcocog")
    parser.add_argument("--data_dir", help="folder of its parquet files; without it they come from the hub")
    parser.add_argument("--split", default="val")
    parser.add_argument("--query", default=QUERY, help="what the model is asked, with {} for the expression")
    parser.add_argument("--all_expressions", action="store_true", help="a row per expression, not per object")
    parser.add_argument("--max_rows", type=int)
    parser.add_argument("--output_dir", type=Path, default=HERE, help="folder of TASK_SPLIT_sar.parquet")
    args = parser.parse_args()
    if "{}" not in args.query:
        parser.error(f"--query is {args.query!r}, needed words with {{}} for the expression")
    kind = find_task(args.task)
    task = kind(kind.Options(box_format="pixels"))
    table = open_table(task, args.data_dir, args.split)
    samples, skips = task.samples(table.rows)
    if not args.all_expressions:
        samples = list({sample.row: sample for sample in reversed(samples)}.values())[::-1]
    written, left_out = 0, [f"{skip.key}: {skip.reason}" for skip in skips]
    path = args.output_dir / f"{args.task}_{args.split}_sar.parquet"
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        rows: list[dict[str, Any]] = []
        for sample in samples[: args.max_rows]:
            try:
                rows.append(to_row(sample, table, args.query))
            except RecordError as error:
                left_out.append(f"{sample.key}: {error}")
            if len(rows) == ROWS_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
                written, rows = written + len(rows), []
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
        written += len(rows)
    print(f"{path}: {written} rows, {len(left_out)} left out")
    for reason in left_out:
        sys.stderr.write(f"left out {reason}\n")


if __name__ == "__main__":
    main()
