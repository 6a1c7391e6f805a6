"""Attention of a rank that holds some of a sequence's queries; and the splits that SAR must not meet unknowingly."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sar_fast.hf.forward_pass import Pass
from sar_fast.hf.refusals import CURE
from sar_fast.method.distributed import Shards, gather
from sar_fast.method.roles import TokenRoles

ULYSSES_GROUPS = "deepspeed.runtime.sequence_parallel.parallel_state_sp"


def refuse_unnamed_splits(shards: Shards | None) -> None:
    """``RuntimeError`` before a pass of whose sequence this rank would get a slice that SAR cannot tell from a whole.

    They are process-wide: torch's ``context_parallel`` (accelerate's and the Trainer's ``cp_size``) replaces SDPA, and
    DeepSpeed's Ulysses (``sp_size``) the attention function that it was registered for, "sar" or another one.
    """
    sdpa = F.scaled_dot_product_attention
    if sdpa is not torch._C._nn.scaled_dot_product_attention and sdpa.__module__.startswith("torch.distributed."):
        raise RuntimeError(
            "SAR: the model runs under torch's context_parallel (cp_size), which gives each rank a slice of every "
            f"input and exchanges keys in scaled_dot_product_attention alone; SAR weighs whole sequences. {CURE}"
        )
    if torch.compiler.is_compiling():  # Ulysses' exchanges are not traced
        return
    ulysses = sys.modules.get(ULYSSES_GROUPS)
    if shards is None and ulysses is not None and ulysses._SEQUENCE_PARALLEL_GROUP is not None:
        raise RuntimeError(
            "SAR: DeepSpeed's sequence parallelism (Ulysses, sp_size) is on in this process, and the model's SAR knows "
            "of no ranks that share its heads: apply_sar(model, config, shards=Shards(heads=group)), then "
            'UlyssesSPAttentionHF.register_with_transformers(text_model, "sar", ...)'
        )


def keys_of_all_ranks(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, running: Pass
) -> tuple[Tensor, Tensor, Pass]:
    """What this rank's queries, slice number rank of the sequence, attend to: all positions up to their last one.

    One collective per layer; its backward sums the gradients of keys and values over the ranks.

    Args:
        query (B, H, S / ranks, D), key (B, Hkv, S / ranks, D), value (B, Hkv, S / ranks, Dv): of this rank's positions.
        attention_mask: must be None. running: the pass, of the whole sequence.

    Returns:
        key (B, Hkv, end, D), value (B, Hkv, end, Dv), and the pass of these queries and keys.
    """
    group = running.shards.queries
    ranks, local, whole = dist.get_world_size(group), query.shape[2], running.roles.text_mask.shape[1]
    if local * ranks != whole or key.shape[2] != local:
        raise RuntimeError(
            f"SAR: shards.queries has {ranks} ranks, and this one attends with {local} of {whole} positions to "
            f"{key.shape[2]} keys; needed {whole} / {ranks} of both: split_sequence(model, group) makes the slices"
        )
    if attention_mask is not None or running.packing is not None:
        what = "packed sequences" if attention_mask is None else "a mask (sliding window, patterns of pictures)"
        raise RuntimeError(f"SAR: {what} cannot be attended to with queries split over ranks; only plain causal layers")
    first = dist.get_rank(group) * local
    end = first + local
    both = gather(torch.cat([key, value], dim=-1), group, dim=2)[:, :, :end]  # [B, Hkv, end, D + Dv]
    key, value = both.split([key.shape[-1], value.shape[-1]], dim=-1)
    changes = {"roles": TokenRoles(running.roles.visual_mask[:, first:end], running.roles.text_mask[:, first:end])}
    if running.prior is not None:
        changes |= {"visual_mask": running.visual_mask[:, :end], "prior": running.prior[:, :end]}
    return key, value, running.but(**changes)
