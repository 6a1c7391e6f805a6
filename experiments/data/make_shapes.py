"""Draws the small datasets beside this file, the same bytes for the same seed.

    python experiments/data/make_shapes.py            # rewrites shapes*.parquet, shapes*.json and images/

Pictures and questions are the miniature's (sar_fast/lab/miniature), from seeds that its training never used.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sar_fast.lab.miniature.drawing import Scene, draw_scene
from sar_fast.lab.miniature.questions import ask

HERE = Path(__file__).parent
BACKGROUNDS = ("plain", "plain", "gradient", "photograph")
TURNS = 3


def png(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(scene.image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def sample_scene(rng: np.random.Generator) -> Scene:
    return draw_scene(rng, background=str(rng.choice(BACKGROUNDS)))


def conversation(scene: Scene, rng: np.random.Generator) -> list[dict[str, str]]:
    """sharegpt turns about one picture, the image in the first."""
    questions = ask(scene, rng, paraphrase=True)
    chosen = [questions[i] for i in rng.permutation(len(questions))[:TURNS]]
    turns = []
    for question in chosen:
        words = question.text if turns else f"<image>\n{question.text}"
        turns += [{"from": "human", "value": words}, {"from": "gpt", "value": question.answer}]
    return turns


def write_parquet(path: Path, rng: np.random.Generator, count: int) -> None:
    """sharegpt rows with the pictures' bytes in them."""
    rows = []
    for number in range(count):
        scene = sample_scene(rng)
        images = [{"bytes": png(scene), "path": None}]
        rows.append({"id": f"{path.stem}-{number}", "conversations": conversation(scene, rng), "images": images})
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    schema = pa.schema([("id", pa.string()), ("conversations", pa.list_(turn)), ("images", pa.list_(image))])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")


def write_llava(path: Path, rng: np.random.Generator, count: int) -> list[Scene]:
    """LLaVA's instruction format: one picture a record, by file name."""
    scenes, rows = [sample_scene(rng) for _ in range(count)], []
    for number, scene in enumerate(scenes):
        name = f"images/{number:03d}.png"
        (path.parent / name).write_bytes(png(scene))
        rows.append({"id": f"{path.stem}-{number}", "image": name, "conversations": conversation(scene, rng)})
    write_json(path, rows)
    return scenes


def write_pairs(path: Path, scenes: list[Scene]) -> None:
    """OpenAI's messages with two pictures a record."""
    rows = []
    for number in range(0, len(scenes) - 1, 2):
        first, second = scenes[number].objects[0], scenes[number + 1].objects[0]
        wanted = (first.colour, second.shape)
        there = any((o.colour, o.shape) == wanted for s in scenes[number : number + 2] for o in s.objects)
        rows.append(
            {
                "id": f"{path.stem}-{number // 2}",
                "messages": [
                    {"role": "user", "content": "<image><image>\nIs there a {} {}?".format(*wanted)},
                    {"role": "assistant", "content": "yes" if there else "no"},
                ],
                "images": [f"images/{number:03d}.png", f"images/{number + 1:03d}.png"],
            }
        )
    write_json(path, rows)


def write_json(path: Path, rows: list[dict]) -> None:
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=20_261_123)
    parser.add_argument("--train", type=int, default=256, help="pictures of shapes_train.parquet")
    parser.add_argument("--validation", type=int, default=48, help="pictures of shapes_validation.parquet")
    parser.add_argument("--folder", type=int, default=32, help="pictures of images/, for the two JSON files")
    args = parser.parse_args()
    (args.output_dir / "images").mkdir(parents=True, exist_ok=True)
    train, validation, llava = (np.random.default_rng(s) for s in np.random.SeedSequence(args.seed).spawn(3))
    write_parquet(args.output_dir / "shapes_train.parquet", train, args.train)
    write_parquet(args.output_dir / "shapes_validation.parquet", validation, args.validation)
    scenes = write_llava(args.output_dir / "shapes_llava.json", llava, args.folder)
    write_pairs(args.output_dir / "shapes_pairs.json", scenes)


if __name__ == "__main__":
    main()
