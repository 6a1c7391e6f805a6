"""Draws shapes_grounding.parquet beside this file, the same bytes for the same seed: refcoco_val_sar in miniature.

    python experiments/data/make_grounding.py

One row per drawn object: ``image``, ``query``, ``object_prompt``, ``bbox`` (x1, y1, x2, y2 in pixels), ``mask`` (PNG),
``label`` (its shape). Pictures are those of sar_fast/lab/miniature, from seeds that training never used.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sar_fast.lab.miniature.drawing import draw_scene
from sar_fast.lab.miniature.questions import WORDINGS

HERE = Path(__file__).parent
BACKGROUNDS = ("plain", "plain", "gradient", "photograph")
QUERY = WORDINGS["box"][0]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def draw_rows(rng: np.random.Generator, pictures: int) -> list[dict]:
    rows = []
    for number in range(pictures):
        scene = draw_scene(rng, background=str(rng.choice(BACKGROUNDS)))
        image = {"bytes": png(scene.image), "path": f"{number:03d}.png"}
        for thing in scene.objects:
            query = QUERY.format(colour=thing.colour, shape=thing.shape)
            rows.append(
                {
                    "image": image,
                    "query": query,
                    "object_prompt": thing.name,
                    "bbox": list(thing.box),
                    "mask": {"bytes": png(thing.mask), "path": None},
                    "label": thing.shape,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=20_261_124)
    parser.add_argument("--pictures", type=int, default=320)
    args = parser.parse_args()
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [
            ("image", image),
            ("query", pa.string()),
            ("object_prompt", pa.string()),
            ("bbox", pa.list_(pa.float64())),
            ("mask", image),
            ("label", pa.string()),
        ]
    )
    table = pa.Table.from_pylist(draw_rows(np.random.default_rng(args.seed), args.pictures), schema=schema)
    pq.write_table(table, args.output_dir / "shapes_grounding.parquet", compression="zstd")


if __name__ == "__main__":
    main()
