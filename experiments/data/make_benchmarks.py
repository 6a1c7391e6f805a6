"""Draws small benchmarks in the layouts of the published ones, the same bytes for the same seed.

    python experiments/data/make_benchmarks.py            # rewrites benchmarks/ beside this file

Pictures are the miniature's (sar_fast/lab/miniature), from seeds that its training never used, and so are the words:
the miniature knows no others. The layouts are those of lmms-lab's parquet files, so the commands are those of full
scale.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, Image
from PIL import Image as Pictures

from sar_fast.lab.miniature.drawing import COLOURS, SHAPES, Scene, draw_scene
from sar_fast.lab.miniature.questions import WORDINGS

HERE = Path(__file__).parent
BACKGROUNDS = ("plain", "gradient", "texture", "photograph")
SUFFIX = " Please answer yes or no."


def sample_scene(rng: np.random.Generator, objects: int | None = None) -> Scene:
    return draw_scene(rng, background=str(rng.choice(BACKGROUNDS)), objects=objects)


def png(scene: Scene) -> dict[str, Any]:
    buffer = io.BytesIO()
    Pictures.fromarray(scene.image).save(buffer, format="PNG", optimize=True)
    return {"bytes": buffer.getvalue(), "path": None}


def named(scene: Scene) -> Iterator[tuple[Any, str, str]]:
    """(object, colour, shape) of every object."""
    return ((item, item.colour, item.shape) for item in scene.objects)


def exists(colour: str, shape: str) -> str:
    return WORDINGS["existence"][1].format(colour=colour, shape=shape)


def absent(scene: Scene, rng: np.random.Generator, *, shared: str) -> tuple[str, str]:
    """A colour and a shape that are not there together; ``shared`` with an object: 'colour', 'shape' or 'neither'."""
    colours, shapes = {o.colour for o in scene.objects}, {o.shape for o in scene.objects}
    there = {(o.colour, o.shape) for o in scene.objects}
    fits = {
        "colour": lambda c, s: c in colours and s not in shapes,
        "shape": lambda c, s: c not in colours and s in shapes,
        "neither": lambda c, s: c not in colours and s not in shapes,
    }[shared]
    pairs = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in there and fits(c, s)]
    return pairs[int(rng.integers(len(pairs)))]


def mme(rng: np.random.Generator, count: int) -> Dataset:
    """Pairs of a question whose answer is yes and one whose answer is no: existence, and colour."""
    rows = []
    for category, shared in (("existence", "neither"), ("color", "shape")):
        for number in range(count):
            scene = sample_scene(rng, objects=1)
            picture, item = png(scene), scene.objects[0]
            questions = [(exists(item.colour, item.shape), "Yes"), (exists(*absent(scene, rng, shared=shared)), "No")]
            for question, answer in questions:
                rows.append(
                    {
                        "question_id": f"{category}/{number:04d}.png",
                        "image": picture,
                        "question": question + SUFFIX,
                        "answer": answer,
                        "category": category,
                    }
                )
    return table(rows, ("question_id", "image", "question", "answer", "category"))


def pope(rng: np.random.Generator, count: int) -> Dataset:
    """Half yes, half no; what is absent is random, or shares a shape (popular) or a colour (adversarial)."""
    rows = []
    for category, shared in (("adversarial", "colour"), ("popular", "shape"), ("random", "neither")):
        for number in range(count):
            scene = sample_scene(rng, objects=1)
            item, there = scene.objects[0], number % 2 == 0
            colour, shape = (item.colour, item.shape) if there else absent(scene, rng, shared=shared)
            rows.append(
                {
                    "id": str(len(rows)),
                    "question_id": str(number + 1),
                    "question": exists(colour, shape),
                    "answer": "yes" if there else "no",
                    "image_source": f"{category}_{number:04d}",
                    "image": png(scene),
                    "category": category,
                }
            )
    return table(rows, ("id", "question_id", "question", "answer", "image_source", "image", "category"))


def refcoco(rng: np.random.Generator, count: int) -> Dataset:
    """A row per object with two expressions; ``bbox`` is (x, y, width, height), ``segmentation`` its outline."""
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        scene = sample_scene(rng)
        picture = png(scene)
        for item, colour, shape in named(scene):
            x1, y1, x2, y2 = map(float, item.box)
            rows.append(
                {
                    "question_id": str(len(rows)),
                    "image": picture,
                    "question": "Please carefully observe the area circled in the image and come up with a caption.",
                    "answer": [f"{colour} {shape}", f"the {colour} {shape}"],
                    "segmentation": [x1, y1, x2, y1, x2, y2, x1, y2],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "iscrowd": 0,
                    "file_name": f"shapes_{len(rows):06d}.png",
                }
            )
    return table(
        rows[:count],
        ("question_id", "image", "question", "answer", "segmentation", "bbox", "iscrowd", "file_name"),
    )


def colour_question(rng: np.random.Generator) -> tuple[Scene, str, str, list[str]]:
    """(scene, question, right answer, three wrong ones) about a colour or a shape, of one object."""
    scene = sample_scene(rng, objects=1)
    item = scene.objects[0]
    if rng.random() < 0.7:
        question, answer, pool = WORDINGS["colour"][0].format(shape=item.shape), item.colour, list(COLOURS)
    else:
        question, answer, pool = WORDINGS["shape"][0].format(colour=item.colour), item.shape, list(SHAPES)
    wrong = [value for value in pool if value != answer]
    return scene, question, answer, [wrong[i] for i in rng.permutation(len(wrong))[:3]]


def mmbench(rng: np.random.Generator, count: int) -> Dataset:
    """Every question in all its rotations, the rotation r as index + r x 10^6, as the hub has them."""
    rows = []
    for number in range(count):
        scene, question, answer, wrong = colour_question(rng)
        options = [answer, *wrong]
        options = [options[i] for i in rng.permutation(len(options))]
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            letters = {letter: turned[i] if i < len(turned) else "nan" for i, letter in enumerate("ABCD")}
            rows.append(
                {
                    "index": number + turn * 1_000_000,
                    "question": question,
                    "hint": "nan",
                    "answer": "ABCD"[turned.index(answer)],
                    **letters,
                    "category": "attribute_recognition",
                    "image": png(scene),
                    "source": "shapes",
                    "L2-category": "finegrained_perception (instance-level)",
                    "comment": "nan",
                    "split": "dev",
                }
            )
    order = ("index", "question", "hint", "answer", "A", "B", "C", "D", "category", "image", "source", "L2-category")
    return table(sorted(rows, key=lambda row: row["index"]), (*order, "comment", "split"))


def scienceqa(rng: np.random.Generator, count: int) -> Dataset:
    rows = []
    for _ in range(count):
        scene, question, answer, wrong = colour_question(rng)
        choices = [answer, *wrong]
        choices = [choices[i] for i in rng.permutation(len(choices))]
        rows.append(
            {
                "image": png(scene),
                "question": question,
                "choices": choices,
                "answer": choices.index(answer),
                "hint": "",
                "task": "closed choice",
                "grade": "grade1",
                "subject": "natural science",
                "topic": "shapes",
                "category": "attributes",
                "skill": "look",
                "lecture": "",
                "solution": "",
            }
        )
    return table(rows, tuple(rows[0]))


def textvqa(rng: np.random.Generator, count: int) -> Dataset:
    """Ten answers a question; now and then annotators disagree."""
    rows = []
    for number in range(count):
        scene, question, answer, wrong = colour_question(rng)
        dissent = int(rng.integers(0, 4))
        rows.append(
            {
                "image_id": f"{number:016x}",
                "question_id": 34_602 + number,
                "question": question,
                "image": png(scene),
                "answers": [wrong[0]] * dissent + [answer] * (10 - dissent),
                "ocr_tokens": [],
            }
        )
    return table(rows, tuple(rows[0]))


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> Dataset:
    """Rows with the picture's type declared, as the hub's parquet files have it."""
    drawn = Dataset.from_list([{name: row[name] for name in columns} for row in rows])
    return drawn.cast_column("image", Image())


def write(drawn: Dataset, path: Path) -> None:
    """One parquet file; equal pictures are stored once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(drawn.data.table.combine_chunks(), path, compression="zstd", use_dictionary=True)


BENCHMARKS = {
    "mme": (mme, "mme/data/test-00000-of-00001.parquet", 24),
    "pope": (pope, "pope/data/test-00000-of-00001.parquet", 24),
    "refcoco": (refcoco, "refcoco/data/val-00000-of-00001.parquet", 48),
    "mmbench": (mmbench, "mmbench/en/dev-00000-of-00001.parquet", 24),
    "scienceqa": (scienceqa, "scienceqa/ScienceQA-IMG/test-00000-of-00001.parquet", 24),
    "textvqa": (textvqa, "textvqa/data/validation-00000-of-00001.parquet", 24),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE / "benchmarks")
    parser.add_argument("--seed", type=int, default=20_261_124)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of questions")
    args = parser.parse_args()
    for (name, (draw, place, count)), seed in zip(BENCHMARKS.items(), np.random.SeedSequence(args.seed).spawn(99)):
        drawn = draw(np.random.default_rng(seed), max(2, round(count * args.scale)))
        write(drawn, args.output_dir / place)
        print(f"{name}: {len(drawn)} rows, {(args.output_dir / place).stat().st_size} bytes")


if __name__ == "__main__":
    main()
