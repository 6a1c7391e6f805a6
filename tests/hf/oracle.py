"""An eager oracle for whole models: one sample at a time, its own roles, its own prior, every matrix materialised.

It shares nothing with the integration: it reads the vision encoder's hidden states itself and finds which patches feed
which visual token by pushing patch numbers through the model's own reordering.
"""

from __future__ import annotations

import contextlib

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tests.hf.tiny import IMAGE


def llava_prior(model, pixel_values):
    """Norms of the patches at block min(2L/3, L-1) of one sample, class token dropped, sum 1."""
    tower = model.model.vision_tower
    hidden = tower(pixel_values, output_hidden_states=True).hidden_states
    L = len(tower.encoder.layers)
    norms = hidden[min(2 * L // 3, L - 1) + 1][:, 1:].norm(dim=-1).flatten()
    return norms / norms.sum()


def qwen_prior(model, pixel_values, image_grid_thw):
    """Mean norm of the four patches of each token, in reading order, sum 1."""
    from transformers.vision_utils import get_vision_window_index

    visual = model.model.visual
    window_index, _ = get_vision_window_index(
        image_grid_thw, spatial_merge_size=2, window_size=visual.window_size, patch_size=visual.patch_size
    )
    total = pixel_values.shape[0]
    numbers = torch.arange(total, dtype=torch.float32)[:, None]
    order = visual.permute_input_for_window_attn(numbers, window_index, total)[:, 0].long()
    L = len(visual.blocks)
    hidden = visual(pixel_values, grid_thw=image_grid_thw, output_hidden_states=True).hidden_states
    in_window_order = hidden[min(2 * L // 3, L - 1) + 1].norm(dim=-1)
    norms = torch.empty(total)
    norms[order] = in_window_order  # back to the processor's patch order: 4 neighbours are one token
    norms = torch.tensor([norms[i : i + 4].mean() for i in range(0, total, 4)])
    return norms / norms.sum()


class Oracle:
    """Eager SAR on the last ``k`` layers of one sample's forward pass."""

    def __init__(self, model, ids, prior, *, k, beta, protect=True):
        self.first = model.config.get_text_config().num_hidden_layers - k
        self.beta, self.protect = beta, protect
        visual = (ids == IMAGE).nonzero()[:, 0].tolist()
        self.visual = visual
        self.text = [i for i in range(len(ids)) if visual and i > visual[-1]]
        self.prior = prior
        self.weights = {}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        s = query @ key.transpose(2, 3) * scaling
        n = s.shape[-1]
        allowed = torch.ones(s.shape[-2], n, dtype=torch.bool).tril(n - s.shape[-2])
        p = s.masked_fill(~allowed, -torch.inf).softmax(-1)
        out = p @ value
        if module.layer_idx >= self.first and len(self.visual) > 1 and self.text:
            sav = []
            for h in range(s.shape[1]):
                variances = [s[0, h, i, self.visual].var(unbiased=True) for i in self.text]
                alignments = [(p[0, h, i, self.visual] * self.prior).sum() for i in self.text]
                sav.append(sum(variances) / len(variances) * (sum(alignments) / len(alignments)))
            w = torch.softmax(torch.stack(sav) / self.beta, 0)
            if self.protect:
                w = torch.cat([w.max()[None], w[1:]])
            self.weights[module.layer_idx] = len(w) * w
            out = out * (len(w) * w)[None, :, None, None]
        return out.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def eager_oracle(model, **options):
    """Run the model's text layers through an :class:`Oracle`."""
    oracle = Oracle(model, **options)
    AttentionInterface.register("sar_test_oracle", oracle)
    AttentionMaskInterface.register("sar_test_oracle", eager_mask)
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "sar_test_oracle"})
    try:
        yield oracle
    finally:
        model.set_attn_implementation({"text_config": before})
