"""Answers of a model to a set of questions under one setting, with what its heads did on the way."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from sar_fast.base.errors import ArgumentError
from sar_fast.config import SARConfig
from sar_fast.hf import apply_sar
from sar_fast.lab.miniature.drawing import PATCH_SIZE
from sar_fast.lab.miniature.places.sets import Pair
from sar_fast.lab.miniature.questions import build_prompt
from sar_fast.method.weighting import Mass

COVERAGE = 0.2  # share of a patch's pixels from which on it belongs to an object


@dataclasses.dataclass(frozen=True)
class Answers:
    """What was answered, and statistics of every re-weighted layer, means over the questions that have a target.

    Attributes:
        replies: in words, one per question. right: (questions,) bool.
        head_weights: (layers, heads) c. visual_mass, object_mass: (layers, heads) of the text queries' attention, on
            all visual tokens and on those that show the question's objects. None unless asked for.
    """

    replies: list[str]
    right: np.ndarray
    head_weights: np.ndarray | None = None
    visual_mass: np.ndarray | None = None
    object_mass: np.ndarray | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``right`` as a text of 0 and 1."""
        arrays = {name: getattr(self, name) for name in ("head_weights", "visual_mass", "object_mass")}
        means = {name: x.round(6).tolist() for name, x in arrays.items() if x is not None}
        return {"right": "".join("01"[int(r)] for r in self.right), "replies": self.replies, **means}


def target_patches(pair: Pair) -> np.ndarray:
    """(N,) bool: the patches that show the objects that a question is about, row by row."""
    drawn, question = pair
    side = drawn.scene.image.shape[0]
    grid = side // PATCH_SIZE
    mask = np.zeros((side, side), dtype=bool)
    for index in question.targets:
        mask |= drawn.scene.objects[index].mask
    return (mask.reshape(grid, PATCH_SIZE, grid, PATCH_SIZE).mean((1, 3)) >= COVERAGE).reshape(-1)


@torch.no_grad()
def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pairs: Sequence[Pair],
    config: SARConfig | None = None,
    *,
    pictures: Callable[[int], np.ndarray] | None = None,
    objects: Mass | None = None,
    statistics: bool = False,
    batch_size: int = 64,
) -> Answers:
    """Greedy answers to ``pairs``.

    Args:
        config: SAR while they are asked; None = without it.
        pictures: number of a question -> the (H, W, 3) uint8 picture that is shown in place of its own.
        objects: a statistic whose keys are set to each question's objects (:func:`target_patches`), for a rule that
            weighs by it.
        statistics: also keep the heads' weights and masses; needs a ``config``.
    """
    object_mass = objects or Mass(name="object")
    if statistics and config is None:
        raise ArgumentError("config", None, "be given with statistics, which SAR measures")
    if statistics:
        config = config.replace(record=True, row_statistics=(Mass(), object_mass))
    replies: list[str] = []
    kept: dict[str, list[Tensor]] = {"weights": [], "visual": [], "object": []}
    with contextlib.ExitStack() as stack:
        handle = stack.enter_context(apply_sar(model, config)) if config is not None else None
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            shown = [s.scene.image if pictures is None else pictures(start + i) for i, (s, _) in enumerate(batch)]
            prompts = [build_prompt(q.text) for _, q in batch]
            inputs = processor(images=shown, text=prompts, padding=True, return_tensors="pt")
            inputs = inputs.to(model.device, model.dtype)
            object_mass.keys = _keys(inputs["input_ids"], model.config.image_token_id, batch)
            output = model.generate(**inputs)
            replies += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            if statistics:
                model(**inputs)  # the prompt's own statistics, not those of the last decode step
                _keep(kept, handle.stats, [bool(q.targets) for _, q in batch])
    right = np.array([reply.split() == q.answer.split() for reply, (_, q) in zip(replies, pairs)])
    if not statistics:
        return Answers(replies, right)
    means = {name: torch.cat(values, 1).mean(1).double().cpu().numpy() for name, values in kept.items()}
    return Answers(replies, right, means["weights"], means["visual"], means["object"])


def _keys(input_ids: Tensor, image_token: int, batch: Sequence[Pair]) -> Tensor:
    """(B, S) bool: the tokens of a batch that show their question's objects."""
    keys = input_ids == image_token
    shown = np.concatenate([target_patches(pair) for pair in batch])
    keys[keys.clone()] = torch.from_numpy(shown).to(keys.device)
    return keys


def _keep(kept: dict[str, list[Tensor]], stats, has_target: list[bool]) -> None:
    """Append (layers, questions with a target, heads) of a batch."""
    layers = sorted(stats)
    chosen = torch.tensor(has_target)
    of_layer = {
        "weights": lambda s: s.head_weights,
        "visual": lambda s: s.rows["mass"],
        "object": lambda s: s.rows["object"],
    }
    for name, get in of_layer.items():
        kept[name].append(torch.stack([get(stats[layer])[chosen.to(get(stats[layer]).device)] for layer in layers]))
