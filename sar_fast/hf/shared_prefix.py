"""Several prompts about each of several pictures: what a picture's prompts begin with runs once.

Attention is causal, so tokens up to the first that differs are computed the same whatever follows. Two passes take the
place of one over whole prompts: the pictures' common prefixes, then every prompt's remainder on the prefix's cache.
Which models this holds for, their family entries say (``Family.whole_prompts``).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from sar_fast.hf.cache_argument import cache_name
from sar_fast.hf.families import Family, UnsupportedModelError, find_family
from sar_fast.hf.features import select_norms
from sar_fast.hf.handle import SARHandle
from sar_fast.hf.structure import unwrap

PER_TOKEN = ("token_type_ids", "mm_token_type_ids")  # what processors give beside input_ids, of its shape; 0 is text


@dataclasses.dataclass(frozen=True)
class Sharing:
    """What prompts about one picture have in common on a model. Each field is the reason why not, "" = they share.

    Attributes:
        pictures: the vision encoder's output. prefix: all layers' work on the tokens that the prompts begin with.
    """

    pictures: str
    prefix: str

    def describe(self) -> dict[str, str]:
        """Plain values for a run's metadata."""
        return {
            "vision encoder": f"once per prompt: {self.pictures}" if self.pictures else "once per picture",
            "common prefix": f"once per prompt: {self.prefix}" if self.prefix else "once per picture",
        }


def sharing_of(model: nn.Module) -> Sharing:
    """What prompts about one picture can share on this model, exactly."""
    model = unwrap(model)
    try:
        family = find_family(model.config)
    except UnsupportedModelError:
        reason = f"model_type {model.config.model_type!r} has no family entry"
        return Sharing(reason, reason)
    pictures = _cannot_take_encoded(model, family)
    return Sharing(pictures, pictures or family.whole_prompts or _cannot_continue(model))


def _cannot_take_encoded(model: nn.Module, family: Family) -> str:
    forward = inspect.signature(type(model.base_model).forward).parameters
    if "mm_encoder_outputs" in forward and family.features == "pooler_output":
        return ""
    return f"{type(model.base_model).__name__} does not take pictures that are encoded already (mm_encoder_outputs)"


def _cannot_continue(model: nn.Module) -> str:
    text = model.config.get_text_config()
    others = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if others:
        return f"its layers of {', '.join(others)} keep something else than keys and values of every token"
    if getattr(text, "num_kv_shared_layers", 0):
        return "its last layers read the keys and values of earlier ones"
    return ""


@dataclasses.dataclass(frozen=True)
class PromptGroups:
    """B pictures (or lists of pictures) with one or more prompts each; R prompts in all, a picture's together.

    Attributes:
        inputs: what the processor made of the pictures, each with its first prompt: ``pixel_values`` and the like.
        ids: [B][prompts] token ids of every prompt, without padding.
        extras: name -> [B][prompts] values of the processor's further per-token outputs.
        pad: the id that fills rows up.
    """

    inputs: Any
    ids: list[list[list[int]]]
    extras: dict[str, list[list[list[int]]]]
    pad: int

    @property
    def counts(self) -> list[int]:
        """Prompts of each picture."""
        return [len(rows) for rows in self.ids]

    def pixels(self) -> dict[str, Any]:
        """The inputs that speak of pictures, not of tokens."""
        return {k: v for k, v in self.inputs.items() if k not in ("input_ids", "attention_mask", *PER_TOKEN)}

    def to(self, device: torch.device, dtype: torch.dtype) -> PromptGroups:
        """On the model's device, pictures in its dtype."""
        return dataclasses.replace(self, inputs=self.inputs.to(device, dtype))


class SharedPrefix:
    """The passes of a batch of prompts whose pictures are encoded once.

    Args:
        handle: SAR on the model, with whatever K. groups: the prompts, on the model's device.

    Attributes:
        why_whole: why all prompts of this batch run from their first token; "" = what they begin with runs once.

    Raises:
        UnsupportedModelError: pictures cannot be shared.
    """

    def __init__(self, handle: SARHandle, groups: PromptGroups) -> None:
        self.handle, self.groups = handle, groups
        self._base_model = handle.layout.base_model
        sharing = sharing_of(handle.model)
        if sharing.pictures:
            raise UnsupportedModelError(f"model: {sharing.pictures}, so several prompts cannot share one")
        self.device = groups.inputs["input_ids"].device
        self.rows = torch.repeat_interleave(torch.tensor(groups.counts)).to(self.device)  # picture of every prompt
        self.cuts = [common_prefix(rows) for rows in groups.ids]
        self._tails = [ids[cut:] for rows, cut in zip(groups.ids, self.cuts) for ids in rows]
        visual = set(handle.layout.placeholder_ids.values())
        self.why_whole = sharing.prefix
        if not self.why_whole and max(groups.counts) == 1:
            self.why_whole = "no picture has several prompts"
        elif not self.why_whole and (min(self.cuts) == 0 or any(visual.intersection(tail) for tail in self._tails)):
            self.why_whole = "prompts differ before their picture ends: the chat template puts the question first"
        self._spatial = hasattr(self._base_model, "get_rope_index")  # finds positions in time, height and width itself
        self._cache: Cache | None = None

    @property
    def shares(self) -> bool:
        """Whether what the prompts begin with runs once per picture."""
        return not self.why_whole

    @functools.cached_property
    def _encoded(self) -> tuple[Any, dict[str, Any], list[list[int]]]:
        """(output of ``get_image_features`` or None, what else the model is told, [B] each picture list's images)."""
        base, pixels = self._base_model, self.groups.pixels()
        if not pixels:
            return None, {}, [[] for _ in self.groups.ids]
        accepted = inspect.signature(type(base).get_image_features).parameters
        encoded = base.get_image_features(**{k: v for k, v in pixels.items() if k in accepted}, return_dict=True)
        placeholders, images, at = set(self.handle.layout.placeholder_ids.values()), [], 0
        sizes = [len(image) for image in encoded.pooler_output]
        for rows in self.groups.ids:
            wanted, first = sum(token in placeholders for token in rows[0]), at
            while sum(sizes[first:at]) < wanted:
                at += 1
            images.append(list(range(first, at)))
        forward = inspect.signature(type(base).forward).parameters
        about = {
            k: v
            for k, v in pixels.items()
            if k in forward and not k.startswith("pixel") and isinstance(v, Tensor) and len(v) in (at, len(images))
        }
        return encoded, about, images

    def inputs(self) -> dict[str, Any]:
        """Model inputs of all prompts as one batch (R, S), padded on the left; their pictures are encoded already."""
        ids, mask = padded([ids for rows in self.groups.ids for ids in rows], self.groups.pad, "left", self.device)
        extras = {
            name: padded([v for rows in values for v in rows], 0, "left", self.device)[0]
            for name, values in self.groups.extras.items()
        }
        encoded, about, images = self._encoded
        given = {"input_ids": ids, "attention_mask": mask, **extras}
        if encoded is not None:
            index = [i for row in self.rows.tolist() for i in images[row]]
            given["mm_encoder_outputs"] = {"image": _select_images(encoded, index, self.handle.config.prior_source)}
            for name, value in about.items():
                of_images = len(value) == len(encoded.pooler_output)
                given[name] = value[torch.tensor(index, device=value.device)] if of_images else value[self.rows]
        return given

    def first(self) -> None:
        """Run the prefixes, (B, longest) padded on the left; they fill a new cache."""
        ids, self._mask = padded(
            [rows[0][:cut] for rows, cut in zip(self.groups.ids, self.cuts)], self.groups.pad, "left", self.device
        )
        extras = {
            name: padded([rows[0][:cut] for rows, cut in zip(values, self.cuts)], 0, "left", self.device)[0]
            for name, values in self.groups.extras.items()
        }
        encoded, about, _ = self._encoded
        if encoded is not None:
            extras |= {"mm_encoder_outputs": {"image": copy.copy(encoded)}, **about}
        if not self._spatial:
            extras["position_ids"] = (self._mask.cumsum(-1) - 1).clamp_min(0)
        self._cache = Cache(layer_class_to_replicate=_PrefixLayer)
        self._base_model(input_ids=ids, attention_mask=self._mask, **extras, **self._on_cache())

    def second(self) -> None:
        """Run what follows the prefixes, (R, longest) padded on the right, on the cache of :meth:`first`."""
        tails, tail_mask = padded(self._tails, self.groups.pad, "right", self.device)
        self._cache.batch_select_indices(self.rows)
        mask = torch.cat([self._mask[self.rows], tail_mask], dim=1)
        positions = (mask.cumsum(-1) - 1)[:, self._mask.shape[1] :]
        if self._spatial:  # text counts on in all three dimensions
            positions = (positions + self._base_model.rope_deltas.to(self.device)[self.rows]).expand(3, -1, -1)
        self._base_model(
            input_ids=tails,
            attention_mask=mask,
            position_ids=positions,
            **self._on_cache(),
        )

    def _on_cache(self) -> dict[str, Any]:
        return {cache_name(self._base_model): self._cache, "use_cache": True}

    def whole(self, first: Tensor, second: Tensor) -> Tensor:
        """(R, S, ...) in the layout of :meth:`inputs`, zeros in its padding, from values (B, prefix, ...) and
        (R, remainder, ...) of the two passes."""
        lengths = [(self.cuts[row], len(tail)) for row, tail in zip(self.rows.tolist(), self._tails)]
        length = max(map(sum, lengths))
        joined = second.new_zeros(len(lengths), length, *second.shape[2:])
        for i, (cut, tail) in enumerate(lengths):
            joined[i, length - tail :] = second[i, :tail]
            joined[i, length - tail - cut : length - tail] = first[self.rows[i], -cut:]
        return joined

    def whole_cache(self) -> list[DynamicLayer]:
        """The layers of a cache that :meth:`inputs` would have filled, as many as ran in both passes."""
        layers = []
        for ran in self._cache.layers:
            layer = DynamicLayer()
            join = lambda first, second: self.whole(first.transpose(1, 2), second.transpose(1, 2)).transpose(1, 2)
            keys, values = (join(*pair) for pair in zip((ran.keys, ran.values), ran.continuation))
            layer.update(keys, values)
            layers.append(layer)
        return layers


class _PrefixLayer(DynamicLayer):
    """A cache layer of B prefixes. After ``batch_select_indices`` it serves their continuations: those see their own
    prefix repeated for them, which is not kept."""

    continuation: tuple[Tensor, Tensor] | None = None
    counts: list[int] | None = None

    def batch_select_indices(self, indices: Tensor) -> None:
        self.counts = indices.bincount().tolist()  # a picture's prompts are together

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.counts is None:
            return super().update(key_states, value_states, *args, **kwargs)
        self.continuation = key_states, value_states
        return self._continued(self.keys, key_states), self._continued(self.values, value_states)

    def _continued(self, prefix: Tensor, new: Tensor) -> Tensor:
        """(B, H, P, D) and (R, H, T, D) -> (R, H, P + T, D)."""
        length = prefix.shape[2]
        both = new.new_empty(*new.shape[:2], length + new.shape[2], new.shape[3])
        both[:, :, length:] = new
        for own, rows in zip(prefix, both.split(self.counts)):
            rows[:, :, :length] = own
        return both


def _select_images(encoded: Any, index: Sequence[int], source: str) -> Any:
    """``get_image_features``'s output for the images ``index``, in that order, SAR's norms included."""
    chosen, images = copy.copy(encoded), encoded.pooler_output
    pick = lambda values: (
        values[torch.tensor(index, device=values.device)] if isinstance(values, Tensor) else [values[i] for i in index]
    )
    chosen.pooler_output = pick(images)
    if getattr(encoded, "deepstack_features", None) is not None:
        chosen.deepstack_features = [pick(layer) for layer in encoded.deepstack_features]
    sizes = [len(image) for image in images]
    select_norms(chosen, "image", source, lambda norms: torch.cat(pick(norms.split(sizes))))
    return chosen


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
