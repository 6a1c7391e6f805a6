"""Pictures with questions: the replies and the attention maps without SAR and with it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from sar_fast.lab.miniature.drawing import Scene, draw_scene
from sar_fast.lab.miniature.questions import KINDS, Question, ask, is_correct
from sar_fast.lab.show.overlay import grid_of, heat_overlay, seen_region, share_on_mask

PICTURE_SIZE = 256  # pixels of the pictures on the page; the model sees them at its own size


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A picture and a question; with ``scene`` and ``asked`` where the picture was drawn and the answer is known."""

    picture: Image.Image
    question: str
    scene: Scene | None = None
    asked: Question | None = None

    @property
    def truth(self) -> str | None:
        return None if self.asked is None else self.asked.answer

    @property
    def target(self) -> Any:
        """The drawn object that the question is about, if there is one."""
        return None if self.asked is None or self.asked.target is None else self.scene.objects[self.asked.target]

    def is_right(self, reply: str) -> bool | None:
        """None where the answer is not known."""
        return None if self.asked is None else is_correct(self.asked, reply, self.scene)


@dataclasses.dataclass(frozen=True)
class Maps:
    """Where the last text query looks, off and on, drawn on one colour scale from 0 to ``peak`` (share of the query's
    attention that one visual token gets). ``on_object`` are the shares of the attention on the picture that fall on
    the asked object, ``object_area`` is the object's share of the picture; None without such an object."""

    off: Image.Image
    on: Image.Image
    peak: float
    on_object: tuple[float, float] | None
    object_area: float | None


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with its two replies and its maps, or the reason why there are none."""

    prompt: Prompt
    reply_off: str
    reply_on: str
    maps: Maps | None
    no_maps: str | None = None

    @property
    def right_off(self) -> bool | None:
        return self.prompt.is_right(self.reply_off)

    @property
    def right_on(self) -> bool | None:
        return self.prompt.is_right(self.reply_on)


def drawn_prompts(seed: int, count: int) -> list[Prompt]:
    """Questions about drawn objects on photographs, kinds in turn, two or three objects in each picture."""
    rng = np.random.default_rng([seed, 1])
    prompts: list[Prompt] = []
    while len(prompts) < count:
        kind = KINDS[len(prompts) % len(KINDS)]
        scene = draw_scene(rng, size=PICTURE_SIZE, objects=int(rng.integers(2, 4)), background="photograph")
        fitting = [q for q in ask(scene, rng) if q.kind == kind]
        if fitting:
            asked = fitting[int(rng.integers(len(fitting)))]
            prompts.append(Prompt(Image.fromarray(scene.image), asked.text, scene, asked))
    return prompts


def draw_maps(prompt: Prompt, processor: Any, off: Tensor, on: Tensor, grid: tuple[int, int]) -> Maps:
    """Maps of attention (V,) without and with SAR on the part of the picture that the processor keeps."""
    fields = [grid_of(row, grid) for row in (off, on)]
    picture = prompt.picture
    picture = picture.crop(seen_region(getattr(processor, "image_processor", processor), picture.size))
    peak = float(max(field.max() for field in fields))
    drawn = [heat_overlay(picture, field, peak) for field in fields]
    on_object = area = None
    if prompt.target is not None:
        mask = prompt.target.mask
        on_object = (share_on_mask(fields[0], mask), share_on_mask(fields[1], mask))
        area = float(mask.mean())
    return Maps(*drawn, peak, on_object, area)
