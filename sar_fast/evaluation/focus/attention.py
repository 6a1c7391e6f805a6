"""Attention of each prompt's last token over its picture, without eager attention.

Weights that change nothing are put on the layers asked for, and the rows come from their queries and keys. Where heads
are left as they are, the tokens up to the picture's end run once for all prompts about it and the prompts continue from
the cache. With SAR on, the words change how the picture's tokens are computed: from the first re-weighted layer on,
whole prompts run.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from sar_fast.analysis.overlay import head_average
from sar_fast.config import SARConfig
from sar_fast.evaluation.focus.prompts import PromptGroups, common_prefix, padded
from sar_fast.integrations.hf import UnsupportedModelError, apply_sar
from sar_fast.integrations.hf.apply import SARHandle, find_decoder_layers

# Causal over text, and positions that a continued cache gets right: prompts can continue from a shared prefix.
CONTINUES_PREFIX = (
    "deepseek_vl",
    "glm46v",
    "glm4v",
    "idefics3",
    "internvl",
    "kimi_k25",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "ovis2",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
)


@dataclasses.dataclass(frozen=True)
class PromptAttention:
    """Attention of one prompt's last token over the picture's V visual tokens, mean over layers: ``mean`` (V,) over
    heads, ``weighted`` (V,) with heads counting by their factor c (equal to ``mean`` without SAR)."""

    mean: Tensor
    weighted: Tensor


def layer_indices(layers: Sequence[int], total: int, config: SARConfig | None) -> list[int]:
    """Layers as indices from 0; negative ones count from the end.

    ``ValueError`` for a layer that the model has not, or that SAR leaves alone and so does not record.
    """
    if not layers:
        raise ValueError("layers is empty: name at least one attention layer, -1 is the last")
    first = 0 if config is None else total - config.activation_layer_k
    found = []
    for layer in layers:
        index = layer + total if layer < 0 else layer
        if not 0 <= index < total:
            raise ValueError(f"layers: {layer} is none of the model's {total} attention layers")
        if index < first:
            raise ValueError(
                f"layers: {layer} is not re-weighted with activation_layer_k={config.activation_layer_k}; with SAR on, "
                f"attention is read in layers {first} to {total - 1}"
            )
        found.append(index)
    return sorted(set(found))


def continues_prefix(model: nn.Module) -> bool:
    """Whether prompts about one picture can continue from one cache of it, exactly."""
    text = model.config.get_text_config()
    layer_types = getattr(text, "layer_types", None)
    if layer_types is None:
        sees_all = getattr(text, "sliding_window", None) is None
    else:
        sees_all = set(layer_types) == {"full_attention"}
    return sees_all and model.config.model_type in CONTINUES_PREFIX


@torch.no_grad()
def prompt_attention(
    model: nn.Module, groups: PromptGroups, layers: Sequence[int], config: SARConfig | None = None
) -> list[list[PromptAttention]]:
    """[B][P] attention of the last token of every prompt.

    Args:
        model: a transformers model of a supported family without SAR on it.
        groups: the prompts. layers: attention layers to average, negative from the end.
        config: SAR as it shall be on while looking; None leaves the heads as they are.
    """
    with apply_sar(model, SARConfig(activation_layer_k=0)) as bare:
        total = len(bare.attention_modules)
    chosen = layer_indices(layers, total, config)
    recording = {"record": True, "record_rows": "last_text"}
    neutral = SARConfig(activation_layer_k=total - chosen[0], beta=math.inf, protect_first_head=False, **recording)
    run = _whole_prompts
    if continues_prefix(model) and all(groups.visual_end):
        plain_below = config is not None and config.activation_layer_k < total
        run = _from_shared_prefix if config is None else _whole_above_shared_prefix if plain_below else _whole_prompts
    with apply_sar(model, neutral if config is None else config.replace(**recording)) as handle:
        rows, visual = run(model, handle, groups)
        found = []
        for i, seen in enumerate(visual):
            maps = [handle.rows[layer][i][:, : len(seen)][:, seen] for layer in chosen]  # (H, V) each
            weights = [None if config is None else handle.stats[layer].head_weights[i] for layer in chosen]
            mean = torch.stack([head_average(m) for m in maps]).mean(0)
            weighted = torch.stack([head_average(m, c) for m, c in zip(maps, weights)]).mean(0)
            found.append(PromptAttention(mean, weighted))
    assert len(found) == rows
    size = rows // groups.pictures
    return [found[b * size : (b + 1) * size] for b in range(groups.pictures)]


def _from_shared_prefix(model: nn.Module, handle: SARHandle, groups: PromptGroups) -> tuple[int, Tensor]:
    """Runs every picture's common prefix, then all its prompts' remainders on copies of the cache."""
    prefix = _Prefix(groups)
    first = model.base_model(**prefix.inputs, **groups.pixels(), use_cache=True)
    visual = handle.roles.visual_mask.repeat_interleave(groups.per_picture, 0)
    model.base_model(**prefix.continuation(model, first.past_key_values))
    return len(visual), visual


def _whole_prompts(model: nn.Module, handle: SARHandle, groups: PromptGroups) -> tuple[int, Tensor]:
    """Runs all prompts as one left-padded batch; each picture is encoded once."""
    ids, inputs = _whole_inputs(model, groups, *_encode_pictures(model, handle, groups))
    model.base_model(**inputs)
    return len(ids), handle.roles.visual_mask


def _whole_above_shared_prefix(model: nn.Module, handle: SARHandle, groups: PromptGroups) -> tuple[int, Tensor]:
    """Layers below the first re-weighted one as in :func:`_from_shared_prefix`, the others on whole prompts."""
    layers = find_decoder_layers(model)
    below = layers[: handle.sar_layers[0]]
    encoded, about = _encode_pictures(model, handle, groups)
    prefix, cache = _Prefix(groups), DynamicCache(config=model.config.get_text_config())
    picture = {"mm_encoder_outputs": {"image": copy.copy(encoded)}, **about}
    starts = _output_of(
        below[-1],
        lambda: model.base_model(**prefix.inputs, **picture, past_key_values=cache, use_cache=True),
    )
    ends = _output_of(below[-1], lambda: model.base_model(**prefix.continuation(model, cache)))
    ids, inputs = _whole_inputs(model, groups, encoded, about)
    with _layers_give(below, prefix.joined(starts, ends, inputs["input_ids"].shape[1])):
        model.base_model(**inputs)
    return len(ids), handle.roles.visual_mask


class _Prefix:
    """What the prompts about each picture begin with, (B, longest) padded on the left, and how they go on, (B * P,
    longest) padded on the right: then positions count on from the prefix in every row."""

    def __init__(self, groups: PromptGroups) -> None:
        device = groups.inputs["input_ids"].device
        self.per_picture = groups.per_picture
        self.cuts = [common_prefix(rows) for rows in groups.ids]
        ids, self.mask = padded([rows[0][:cut] for rows, cut in zip(groups.ids, self.cuts)], groups.pad, "left", device)
        extras = {
            name: padded([rows[0][:cut] for rows, cut in zip(values, self.cuts)], 0, "left", device)[0]
            for name, values in groups.extras.items()
        }
        self.inputs = {"input_ids": ids, "attention_mask": self.mask, **extras}
        rests = [ids[cut:] for rows, cut in zip(groups.ids, self.cuts) for ids in rows]
        self.tails, self.tail_mask = padded(rests, groups.pad, "right", device)

    def continuation(self, model: nn.Module, cache: Cache) -> dict[str, Any]:
        """Inputs of the pass that continues ``cache``, which the prefixes filled; it gets a row for every prompt."""
        cache.batch_repeat_interleave(self.per_picture)
        mask = torch.cat([self.mask.repeat_interleave(self.per_picture, 0), self.tail_mask], dim=1)
        inputs = {"input_ids": self.tails, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        deltas = getattr(model.base_model, "rope_deltas", None)
        if deltas is not None:  # positions in time, height and width; text counts on in all three
            after = (mask.cumsum(-1) - 1)[:, self.mask.shape[1] :]
            after = after + deltas.to(after.device).repeat_interleave(self.per_picture, 0)
            inputs["position_ids"] = after.expand(3, -1, -1)
        return inputs

    def joined(self, starts: Tensor, ends: Tensor, length: int) -> Tensor:
        """(B * P, length, d) of whole prompts, padded on the left by zeros, from the two passes' hidden states."""
        whole = starts.new_zeros(len(self.tails), length, starts.shape[-1])
        for row, tail in enumerate(self.tail_mask.sum(-1).tolist()):
            picture = row // self.per_picture
            whole[row, length - tail :] = ends[row, :tail]
            cut = self.cuts[picture]
            whole[row, length - tail - cut : length - tail] = starts[picture, -cut:]
        return whole


def _encode_pictures(model: nn.Module, handle: SARHandle, groups: PromptGroups) -> tuple[Any, dict[str, Tensor]]:
    """(output of ``get_image_features``, what else the model wants to know of each picture)."""
    forward = inspect.signature(type(model.base_model).forward).parameters
    if "mm_encoder_outputs" not in forward or handle.family.features != "pooler_output":
        raise UnsupportedModelError(
            f"model: {type(model.base_model).__name__} does not take pictures that are encoded already "
            "(mm_encoder_outputs), so several prompts cannot share one"
        )
    pixels = groups.pixels()
    accepted = inspect.signature(type(model.base_model).get_image_features).parameters
    encoded = model.base_model.get_image_features(
        **{k: v for k, v in pixels.items() if k in accepted}, return_dict=True
    )
    about = {
        k: v
        for k, v in pixels.items()
        if k in forward and not k.startswith("pixel") and isinstance(v, Tensor) and len(v) == groups.pictures
    }
    return encoded, about


def _whole_inputs(
    model: nn.Module, groups: PromptGroups, encoded: Any, about: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Any]]:
    """(ids, inputs) of all prompts as one left-padded batch that shares the encoded pictures."""
    device = groups.inputs["input_ids"].device
    shared = model._expand_multimodal_outputs(
        groups.inputs["input_ids"], {"image": copy.copy(encoded)}, expand_size=groups.per_picture
    )
    ids, mask = padded([ids for rows in groups.ids for ids in rows], groups.pad, "left", device)
    extras = {
        name: padded([v for rows in values for v in rows], 0, "left", device)[0]
        for name, values in groups.extras.items()
    }
    per_row = {k: v.repeat_interleave(groups.per_picture, 0) for k, v in about.items()}
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_encoder_outputs": shared, "use_cache": False}
    return ids, inputs | extras | per_row


class _Enough(Exception):
    """Leaves the model's forward where no further layer is needed."""


def _output_of(layer: nn.Module, call: Callable[[], Any]) -> Tensor:
    """(rows, S, d) output of a decoder layer in ``call``, which ends there."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)
        raise _Enough

    hook = layer.register_forward_hook(keep)
    try:
        with contextlib.suppress(_Enough):
            call()
    finally:
        hook.remove()
    return kept[0]


@contextlib.contextmanager
def _layers_give(layers: Sequence[nn.Module], hidden: Tensor) -> Iterator[None]:
    """In here these layers compute nothing and give ``hidden``."""

    saved = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.__dict__["forward"] = lambda *args, **kwargs: hidden
    try:
        yield
    finally:
        for layer, forward in zip(layers, saved):
            del layer.__dict__["forward"]
            if forward is not None:  # an offloading wrapper's
                layer.__dict__["forward"] = forward
