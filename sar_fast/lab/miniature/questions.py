"""Questions about a drawn scene, their answers, and the prompt that carries them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.io.boxes import BOX_BINS, box_iou
from sar_fast.lab.io.chat_template import llava_prompt
from sar_fast.lab.miniature.drawing import COLOURS, HELD_OUT_PHOTOGRAPHS, SHAPES, Scene, draw_scene

KINDS = ("colour", "shape", "existence", "position", "box")
BOX_IOU = 0.5  # a box answer is right from this intersection over union on
MIDLINE_MARGIN = 0.06  # no position question about an object whose centre is nearer to a midline; fraction of the side

# The first wording of a kind is the canonical one, the only one that evaluation asks.
WORDINGS = {
    "colour": ("What colour is the {shape}?", "What is the colour of the {shape}?"),
    "shape": ("What shape is the {colour} object?", "What is the shape of the {colour} object?"),
    "existence": ("Is there a {colour} {shape}?", "Is there a {colour} {shape} in the image?"),
    "position": ("Where is the {colour} {shape}?", "In which corner is the {colour} {shape}?"),
    "box": ("Give the box of the {colour} {shape}.", "What is the box of the {colour} {shape}?"),
}
POSITIONS = ("top left", "top right", "bottom left", "bottom right")


@dataclass(frozen=True)
class Question:
    """A question, its ``answer`` in the model's words, and ``target``, the index in ``scene.objects`` of the object
    it is about; ``None`` where the right answer is that there is no such object."""

    kind: str
    text: str
    answer: str
    target: int | None


def ask(scene: Scene, rng: np.random.Generator, *, paraphrase: bool = False) -> list[Question]:
    """All questions that have one right answer in the scene, in the order of ``KINDS``.

    Every object is asked about in every kind that identifies it: colour needs a shape that occurs once, shape a colour
    that occurs once, position a centre clear of the midlines. For every object that exists the scene gets one existence
    question about an object that does not: in 8 cases of 10 a hard negative that shares a colour or a shape with
    an object of the scene. With ``paraphrase`` half of the questions take a wording other than the canonical one.
    """
    facts: list[tuple[str, str, str, str, int | None]] = []
    size = scene.image.shape[:2]
    colours, shapes = [o.colour for o in scene.objects], [o.shape for o in scene.objects]
    for index, item in enumerate(scene.objects):
        name = (item.colour, item.shape)
        if shapes.count(item.shape) == 1:
            facts.append(("colour", *name, item.colour, index))
        if colours.count(item.colour) == 1:
            facts.append(("shape", *name, item.shape, index))
        facts.append(("existence", *name, "yes", index))
        facts.append(("existence", *_absent_object(scene, rng), "no", None))
        position = quadrant(item.box, size)
        if position is not None:
            facts.append(("position", *name, position, index))
        facts.append(("box", *name, encode_box(item.box, size), index))
    facts.sort(key=lambda fact: KINDS.index(fact[0]))
    questions = []
    for kind, colour, shape, answer, target in facts:
        wording = WORDINGS[kind][int(paraphrase and rng.random() < 0.5)]
        questions.append(Question(kind, wording.format(colour=colour, shape=shape), answer, target))
    return questions


def draw_questions(
    rng: np.random.Generator,
    per_kind: int,
    backgrounds: Sequence[str],
    *,
    size: int = 64,
    photographs: Sequence[str] = HELD_OUT_PHOTOGRAPHS,
) -> list[tuple[Scene, Question]]:
    """``per_kind`` questions of every kind, in the order of ``KINDS``, about random scenes.

    The background of a scene is one of ``backgrounds``; ``size`` and ``photographs`` as in ``draw_scene``.
    """
    if per_kind < 1:
        raise ArgumentError("per_kind", per_kind, "be at least 1")
    found: dict[str, list[tuple[Scene, Question]]] = {kind: [] for kind in KINDS}
    while min(map(len, found.values())) < per_kind:
        scene = draw_scene(rng, size=size, background=str(rng.choice(backgrounds)), photographs=photographs)
        for question in ask(scene, rng):
            if len(found[question.kind]) < per_kind:
                found[question.kind].append((scene, question))
    return [pair for pairs in found.values() for pair in pairs]


def build_prompt(text: str) -> str:
    """The LLaVA-1.5 prompt for one image and one question in free words; the answer follows it."""
    if "<image>" in text:
        raise ArgumentError("text", "'<image>' in it", "be a question in words: the prompt adds the image itself")
    return llava_prompt(text)


def quadrant(box: tuple[float, float, float, float], shape: tuple[int, int]) -> str | None:
    """The quadrant of the picture that a box (x1, y1, x2, y2) is in by its centre, ``None`` if that is too near a
    midline to call. ``shape`` is (height, width) in the box's unit."""
    height, width = shape
    x, y = (box[0] + box[2]) / 2 / width - 0.5, (box[1] + box[3]) / 2 / height - 0.5
    if min(abs(x), abs(y)) < MIDLINE_MARGIN:
        return None
    return f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"


def encode_box(box: tuple[float, float, float, float], shape: tuple[int, int]) -> str:
    """A box in pixels as four bin numbers ``"x1 y1 x2 y2"``, each 0 to ``BOX_BINS - 1``.

    ``shape`` is (height, width) of the picture.
    """
    height, width = shape
    bins = [min(int(v / side * BOX_BINS), BOX_BINS - 1) for v, side in zip(box, (width, height, width, height))]
    return " ".join(map(str, bins))


def decode_box(text: str, shape: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """The box in pixels that four bin numbers stand for, every edge at the middle of its bin; ``None`` if the text is
    not a box of positive size (a model may answer anything). ``shape`` is (height, width) of the picture."""
    words = text.split()
    if len(words) != 4 or not all(w.isdecimal() and int(w) < BOX_BINS for w in words):
        return None
    height, width = shape
    x1, y1, x2, y2 = ((int(w) + 0.5) / BOX_BINS * side for w, side in zip(words, (width, height, width, height)))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def is_correct(question: Question, reply: str, scene: Scene) -> bool:
    """Whether a reply answers the question: the same words, or for a box an overlap of at least ``BOX_IOU`` with the
    object's true box in pixels."""
    if question.kind == "box":
        box = decode_box(reply, scene.image.shape[:2])
        return box is not None and bool(box_iou(box, scene.objects[question.target].box) >= BOX_IOU)
    return reply.split() == question.answer.split()


def _absent_object(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    present = {(o.colour, o.shape) for o in scene.objects}
    missing = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in present]
    if rng.random() < 0.8:
        colours, shapes = {c for c, _ in present}, {s for _, s in present}
        missing = [(c, s) for c, s in missing if c in colours or s in shapes]
    return missing[int(rng.integers(len(missing)))]
