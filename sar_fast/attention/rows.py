"""Attention rows of chosen queries over visual keys, without any attention matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from sar_fast.method.values import Call


def visual_attention_rows(call: Call) -> Tensor:
    """How much each sample's last text query attends to each visual key, per head.

    Args:
        call: dense, with roles; its ``v`` and prior are not read.

    Returns:
        (B, H, Sk) fp32: softmax over all keys that the query sees, kept at visual keys and 0 elsewhere; a sample
        without text queries gives zeros. Memory: one row per head.
    """
    q, k, scores = call.q, call.k, call.scores
    visual_mask, text_mask, _ = call.roles
    B, Sq, H, D = q.shape
    Sk, Hkv = k.shape[1], k.shape[2]
    index = torch.arange(Sq, device=q.device)
    last = torch.where(text_mask, index, -1).amax(-1)  # [B], -1 = none
    row = last.clamp_min(0)
    samples = torch.arange(B, device=q.device)
    q_row = q[samples, row].float().view(B, Hkv, H // Hkv, D)
    s = torch.einsum("bkgd,bnkd->bkgn", q_row, k.float()).flatten(1, 2) * scores.scale  # [B, H, Sk]
    if scores.softcap > 0:
        s = scores.softcap * torch.tanh(s / scores.softcap)
    key = torch.arange(Sk, device=q.device)[None]
    position = row[:, None] + (Sk - Sq)
    left, right = scores.window
    visible = torch.ones(B, Sk, dtype=torch.bool, device=q.device)
    if scores.causal:
        visible = visible & (key <= position)
    if left >= 0:
        visible = visible & (key >= position - left)
    if right >= 0:
        visible = visible & (key <= position + right)
    if call.bounds.first is not None:
        visible = visible & (key >= call.bounds.first.expand(B, -1)[samples, row, None])
    if call.bounds.end is not None:
        visible = visible & (key < call.bounds.end.expand(B, -1)[samples, row, None])
    if call.key_padding_mask is not None:
        visible = visible & call.key_padding_mask
    if call.attn_mask is not None:
        rows = call.attn_mask.expand(B, -1, -1, -1)[:, 0]
        visible = visible & rows[samples, row]
    p = torch.softmax(s.masked_fill(~visible[:, None], -torch.inf), dim=-1)
    keep = (visual_mask & visible & (last >= 0)[:, None])[:, None]
    return torch.where(keep, p, 0)
