"""Eager SAR with memory: an oracle for decoding, one sample at a time, whatever the cache.

It is told the sample's visual positions and prior and sees nothing but queries, keys, values and transformers' own
eager mask. Per layer it keeps the sums that docs/method.md, section 3, defines, in fp64.
"""

from __future__ import annotations

import contextlib

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tests.hf.oracle import llava_prior, qwen_prior
from tests.hf.tiny import IMAGE


class DecodeOracle:
    """Attention function; ``weights[layer]`` are those of the last call."""

    def __init__(self, model, ids, prior, *, k, beta, mode, protect=True):
        text = model.config.get_text_config()
        self.first = text.num_hidden_layers - k
        self.beta, self.mode, self.protect, self.prior = beta, mode, protect, prior
        self.visual = (ids == IMAGE).nonzero()[:, 0]
        self.seen, self.sums, self.weights = {}, {}, {}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        layer, new = module.layer_idx, query.shape[2]
        past = self.seen.get(layer, 0)
        self.seen[layer] = total = past + new
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        s = query @ key.transpose(2, 3) * scaling
        position = torch.arange(total)[-key.shape[2] :]  # of every key: a sliding layer has dropped the oldest
        if attention_mask is None:
            visible = position <= torch.arange(past, total)[:, None]
        else:
            visible = attention_mask[0, 0] >= 0
        p = s.masked_fill(~visible, -torch.inf).softmax(-1)
        out = p @ value
        if layer >= self.first and len(self.visual) > 1:
            c = self._weights(layer, past, new, s[0], p[0], position, visible)
            if c is not None:
                self.weights[layer] = c
                out = out * c[None, :, None, None].to(out.dtype)
        return out.transpose(1, 2).contiguous(), None

    def _weights(self, layer, past, new, s, p, position, visible):
        if past and self.mode == "prompt":
            return self.weights.get(layer)
        av, sa, count = self.sums.get(layer, (0, 0, 0)) if past and self.mode == "running" else (0, 0, 0)
        for i in range(new):
            if past + i <= int(self.visual[-1]):
                continue
            keys = [j for j, at in enumerate(position.tolist()) if visible[i, j] and at in set(self.visual.tolist())]
            if len(keys) < 2:
                continue
            prior = self.prior[[self.visual.tolist().index(int(position[j])) for j in keys]]
            av = av + s[:, i, keys].double().var(-1, unbiased=True)
            sa = sa + (p[:, i, keys] * prior).double().sum(-1)
            count += 1
        self.sums[layer] = av, sa, count
        if not count:
            return None
        w = torch.softmax(av / count * (sa / count) / self.beta, 0)
        if self.protect:
            w = torch.cat([w.max()[None], w[1:]])
        return len(w) * w


def prior_of(model, row):
    """The prior of one sample over its visual tokens, or None for text alone."""
    if "pixel_values" not in row:
        return None
    if "image_grid_thw" in row:
        return qwen_prior(model, row["pixel_values"], row["image_grid_thw"]).detach()
    return llava_prior(model, row["pixel_values"]).detach()


@contextlib.contextmanager
def decode_oracle(model, row, *, prior=None, **options):
    """Run the text layers of ``model`` on ``row`` (one sample, no padding) through a :class:`DecodeOracle`."""
    oracle = DecodeOracle(model, row["input_ids"][0], prior_of(model, row) if prior is None else prior, **options)
    AttentionInterface.register("sar_test_decode_oracle", oracle)
    AttentionMaskInterface.register("sar_test_decode_oracle", eager_mask)
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "sar_test_decode_oracle"})
    try:
        yield oracle
    finally:
        model.set_attn_implementation({"text_config": before})
