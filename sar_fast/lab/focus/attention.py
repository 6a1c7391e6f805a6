"""Attention of each prompt's last token over its picture, without eager attention.

Weights that change nothing are put on the layers asked for, and the rows come from their queries and keys. What the
prompts about a picture begin with runs once, in all layers; with SAR on, the words change how the picture's tokens are
computed, so from the first re-weighted layer on whole prompts run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError
from sar_fast.config import SARConfig
from sar_fast.hf import apply_sar
from sar_fast.hf.branching import run_branches
from sar_fast.hf.shared_prefix import PromptGroups, SharedPrefix
from sar_fast.lab.show.overlay import head_average
from sar_fast.method.weighting import Equal


@dataclasses.dataclass(frozen=True)
class PromptAttention:
    """Attention of one prompt's last token over the picture's V visual tokens, mean over layers: ``mean`` (V,) over
    heads, ``weighted`` (V,) with heads counting by their factor c (equal to ``mean`` without SAR)."""

    mean: Tensor
    weighted: Tensor


def layer_indices(layers: Sequence[int], total: int, config: SARConfig | None) -> list[int]:
    """Layers as indices from 0; negative ones count from the end.

    ``ArgumentError`` for a layer that the model has not, or that SAR leaves alone and so does not record.
    """
    if not layers:
        raise ArgumentError("layers", "none", "be one attention layer or more, -1 is the last")
    first = 0 if config is None else total - config.activation_layer_k
    found = []
    for layer in layers:
        index = layer + total if layer < 0 else layer
        if not 0 <= index < total:
            raise ArgumentError("layers", layer, f"be among the model's {total} attention layers")
        if index < first:
            read = f"be among layers {first} to {total - 1}: with SAR on, attention is read where heads are re-weighted"
            raise ArgumentError("layers", layer, read)
        found.append(index)
    return sorted(set(found))


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
        total = len(bare.layout.attention_modules)
    chosen = layer_indices(layers, total, config)
    recording = {"record": True, "record_rows": "last_text"}
    neutral = SARConfig(activation_layer_k=total - chosen[0], weighting=Equal(), **recording)
    with apply_sar(model, neutral if config is None else config.replace(**recording)) as handle:
        prefix = SharedPrefix(handle, groups)
        if config is None and prefix.shares:
            prefix.first()
            visual = handle.roles.visual_mask[prefix.rows]
            prefix.second()
        else:
            call = lambda: model(**prefix.inputs(), use_cache=False, logits_to_keep=1)
            for _ in run_branches(handle, [handle.config], call, prefix) if prefix.shares else [call()]:
                visual = handle.roles.visual_mask
        found = []
        for i, seen in enumerate(visual):
            maps = [handle.rows[layer][i][:, : len(seen)][:, seen] for layer in chosen]  # (H, V) each
            weights = [None if config is None else handle.stats[layer].head_weights[i] for layer in chosen]
            mean = torch.stack([head_average(m) for m in maps]).mean(0)
            weighted = torch.stack([head_average(m, c) for m, c in zip(maps, weights)]).mean(0)
            found.append(PromptAttention(mean, weighted))
    rows = iter(found)
    return [[next(rows) for _ in range(count)] for count in groups.counts]
