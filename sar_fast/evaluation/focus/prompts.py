"""Several prompts about each of several pictures: every picture is read and encoded once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sar_fast.cli.loading import build_prompt, tokenizer_of

PER_TOKEN = ("token_type_ids", "mm_token_type_ids")  # what processors give beside input_ids, of its shape; 0 is text

DEFAULT_TEMPLATES = (
    "the {} in the image",
    "a photo of the {}",
    "the location of the {}",
    "focus on the {}",
    "where is the {} in this picture?",
)


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """The templates, if each has exactly one place for the object's name."""
    if isinstance(templates, str) or not templates:
        raise ValueError(f"templates must be a non-empty list of texts; got {templates!r}")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"templates: {template!r} needs exactly one {{}}, where the object's name goes")
    return tuple(templates)


@dataclasses.dataclass(frozen=True)
class PromptGroups:
    """B pictures with P prompts each.

    Attributes:
        inputs: what the processor made of the pictures, each with its first prompt: ``pixel_values`` and the like.
        ids: [B][P] token ids of every prompt, without padding.
        extras: name -> [B][P] values of the processor's further per-token outputs.
        visual_end: [B] position after the picture's last visual token where all its prompts are the same up to there,
            else 0 (a chat template that puts the question first).
        pad: the id that fills rows up.
    """

    inputs: dict[str, Tensor]
    ids: list[list[list[int]]]
    extras: dict[str, list[list[list[int]]]]
    visual_end: list[int]
    pad: int

    @property
    def pictures(self) -> int:
        return len(self.ids)

    @property
    def per_picture(self) -> int:
        return len(self.ids[0])

    def pixels(self) -> dict[str, Tensor]:
        """The inputs that speak of pictures, not of tokens."""
        return {k: v for k, v in self.inputs.items() if k not in ("input_ids", "attention_mask", *PER_TOKEN)}


def encode_groups(
    model: nn.Module, processor: Any, pictures: Sequence[Any], questions: Sequence[Sequence[str]]
) -> PromptGroups:
    """Tokens of ``questions[b]`` about ``pictures[b]``, in the model's prompt format.

    The image processor sees every picture once: what replaces the placeholder in the first prompt of a picture replaces
    it in the others.
    ``ValueError`` if the processor writes no visual token.
    """
    texts = [[build_prompt(processor, q) for q in row] for row in questions]
    inputs = processor(images=list(pictures), text=[row[0] for row in texts], padding=True, return_tensors="pt")
    visual_ids = _visual_ids(model)
    tokenizer = tokenizer_of(processor)
    groups: list[list[list[int]]] = []
    ends = []
    for b, row in enumerate(texts):
        real = inputs["attention_mask"][b].bool()
        first = inputs["input_ids"][b][real].tolist()
        end = _after_last(first, visual_ids)
        if end == 0:
            raise ValueError(
                f"the prompt of picture {b} has no visual token: {type(processor).__name__} wrote none of the ids "
                f"{sorted(visual_ids)} of this model"
            )
        raw = [tokenizer(text)["input_ids"] for text in row]
        tail = len(first) - end
        start = len(raw[0]) - tail  # where the text after the picture begins in the text with one placeholder
        same = start > 0 and raw[0][start:] == first[end:] and all(r[:start] == raw[0][:start] for r in raw)
        if same:
            groups.append([first, *(first[:end] + r[start:] for r in raw[1:])])
        else:  # the processor rewrites the text around pictures: let it do so for every prompt
            groups.append([first, *(_alone(processor, pictures[b], text) for text in row[1:])])
        ends.append(end if all(ids[:end] == first[:end] for ids in groups[-1]) else 0)
    extras = {
        name: [
            [_token_types(inputs[name][b][inputs["attention_mask"][b].bool()].tolist(), rows[0], ids) for ids in rows]
            for b, rows in enumerate(groups)
        ]
        for name in PER_TOKEN
        if name in inputs
    }
    pad = getattr(tokenizer, "pad_token_id", None)
    moved = inputs.to(model.device, model.dtype)
    return PromptGroups(dict(moved), groups, extras, ends, 0 if pad is None else pad)


def padded(rows: Sequence[Sequence[int]], fill: int, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(values, mask), both (rows, longest) int64; the mask is 1 on the rows' own values, padding on ``side``."""
    length = max(map(len, rows))
    values = torch.full((len(rows), length), fill)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        values[i, place] = torch.tensor(list(row), dtype=torch.long)
        mask[i, place] = 1
    return values.to(device), mask.to(device)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Number of leading ids that all rows share, less than every row's length."""
    shortest = min(map(len, rows)) - 1
    return next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)


def _visual_ids(model: nn.Module) -> set[int]:
    from sar_fast.integrations.hf.families import find_family

    fields = find_family(model.config).placeholder_ids.values()
    return {int(getattr(model.config, f)) for f in fields if getattr(model.config, f, None) is not None}


def _after_last(ids: Sequence[int], visual: set[int]) -> int:
    return max((i + 1 for i, token in enumerate(ids) if token in visual), default=0)


def _alone(processor: Any, picture: Any, text: str) -> list[int]:
    return processor(images=[picture], text=[text], return_tensors="pt")["input_ids"][0].tolist()


def _token_types(known: list[int], first: list[int], ids: list[int]) -> list[int]:
    """Types of a prompt's tokens: what the processor gave the same ids in the picture's first prompt, else text's."""
    types = dict(zip(first, known))
    return [types.get(token, 0) for token in ids]
