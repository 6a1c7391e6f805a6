"""A dense oracle for whole models: one sample at a time, its own roles, its own prior, every matrix materialised.

It shares nothing with the integration. Scores, statistics and weights are loops over matrices in plain PyTorch; the
prior comes from the output of a vision block and from which patches each visual token depends on, found by autograd.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tests.hf.tiny import IMAGE, VERSION, tower

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")


def lacking_without_sar(what: str) -> None:
    """Ends a test of what plain transformers itself cannot do for this model, which the lines before have just shown.

    They ask for its failure, so that a version of transformers that mends it fails the test, and this call goes.
    """
    pytest.xfail(f"transformers without SAR: {what}")


def refuse_one_graph(model: nn.Module, batch: Mapping[str, object]) -> None:
    """Ends a test of one graph where plain transformers cannot be traced either."""
    if VERSION >= (5, 9):
        return
    model(**batch)  # nobody can trace a model's very first call
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="eager", fullgraph=True)(**batch)
    torch._dynamo.reset()
    lacking_without_sar("one graph")


# the prior


def visual_features(model: nn.Module, row: Mapping[str, Tensor], output: str = "pooler_output") -> Tensor:
    """(tokens, F): what the model makes of a row's pictures or clips, in the order of the placeholders."""
    base = getattr(model, "model", model)
    video = "pixel_values_videos" in row
    encode = base.get_video_features if video else base.get_image_features
    pixels = row["pixel_values_videos" if video else "pixel_values"]
    others = {name: x for name, x in row.items() if name not in TEXT_INPUTS and not name.startswith("pixel_values")}
    features = getattr(encode(pixels, **others, **required(model), return_dict=True), output)
    if VERSION < (5, 18) and video and hasattr(base, "image_newline"):  # the forward pass adds it, not this call
        features = torch.cat([features, base.image_newline.expand(len(features), 1, -1)], 1)
    features = [features] if isinstance(features, Tensor) else features
    return torch.cat([f.reshape(-1, f.shape[-1]) for f in features])


def required(model: nn.Module) -> dict[str, str]:
    """What ``get_image_features`` wants to be told besides pixels."""
    if VERSION >= (5, 18) or model.config.model_type != "llama4":
        return {}
    return {"vision_feature_select_strategy": model.config.vision_config.vision_feature_select_strategy}


@contextlib.contextmanager
def block_outputs(blocks: nn.ModuleList, *, cut: bool) -> Iterator[list[Tensor]]:
    """The outputs of all blocks; with ``cut`` each is a leaf that the rest of the model depends on alone."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not cut:
            seen.append(hidden.detach())
            return None
        seen.append(hidden.detach().requires_grad_())
        return (seen[-1], *output[1:]) if isinstance(output, tuple) else seen[-1]

    hooks = [block.register_forward_hook(keep, prepend=True) for block in blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def supports(
    model: nn.Module, row: Mapping[str, Tensor], blocks: str, output: str = "pooler_output"
) -> list[list[int]]:
    """For every visual token, which positions of a vision block's output it depends on (none: a newline token)."""
    with block_outputs(model.get_submodule(blocks), cut=True) as leaves, torch.enable_grad():
        features = visual_features(model, row, output)
        probe = torch.randn(features.shape[-1], generator=torch.Generator().manual_seed(0))
        found = []
        for feature in features:
            gradients = torch.autograd.grad(feature @ probe, leaves, retain_graph=True, allow_unused=True)
            nonzero = [g.flatten(0, -2).abs().sum(-1).nonzero()[:, 0].tolist() for g in gradients if g is not None]
            found.append(next((positions for positions in nonzero if positions), []))
    return found


def patch_norms(model: nn.Module, row: Mapping[str, Tensor], blocks: str, output: str) -> Tensor:
    """Norms of all positions of block min(2L/3, L-1)'s output."""
    found = model.get_submodule(blocks)
    with block_outputs(found, cut=False) as seen, torch.no_grad():
        visual_features(model, row, output)
    L = len(found)
    return seen[min(2 * L // 3, L - 1)].norm(dim=-1).flatten()


def visual_norms(model: nn.Module, row: Mapping[str, Tensor], blocks: str, output: str = "pooler_output") -> Tensor:
    """Mean norm of the patches behind each visual token of a row."""
    norms = patch_norms(model, row, blocks, output)
    return torch.stack([norms[s].mean() if s else torch.zeros(()) for s in supports(model, row, blocks, output)])


def visual_prior(model: nn.Module, row: Mapping[str, Tensor], blocks: str, output: str = "pooler_output") -> Tensor:
    """:func:`visual_norms`, sum 1."""
    norms = visual_norms(model, row, blocks, output)
    return norms / norms.sum()


def llava_prior(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """:func:`visual_prior` of LLaVA-1.5."""
    return visual_prior(model, {"pixel_values": pixel_values}, tower("model.vision_tower.encoder.layers"))


def qwen_prior(model: nn.Module, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
    """:func:`visual_prior` of Qwen2.5-VL."""
    return visual_prior(model, {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}, "model.visual.blocks")


# attention


class Oracle:
    """Dense SAR attention on the last ``k`` of the layers ``attending``, for one sample's forward pass.

    Positions from ``prompt`` on count as generated: with ``mode="running"`` their row's weights are those of the
    prompt's text and all generated positions up to it, with ``"prompt"`` the prompt's. As earlier positions never see
    later ones, one pass over prompt and answer gives what decoding one token at a time must give.
    """

    def __init__(
        self,
        model: nn.Module,
        ids: Tensor,
        prior: Tensor | None,
        *,
        k: int,
        beta: float,
        protect: bool = True,
        attending: tuple[int, ...] | None = None,
        placeholders: tuple[int, ...] = (IMAGE,),
        prompt: int | None = None,
        mode: str = "running",
    ) -> None:
        if attending is None:
            attending = tuple(range(model.config.get_text_config().num_hidden_layers))
        self.layers = attending[len(attending) - k :]
        self.beta, self.protect, self.mode = beta, protect, mode
        self.prompt = len(ids) if prompt is None else prompt
        self.visual = [i for i, token in enumerate(ids[: self.prompt].tolist()) if token in placeholders]
        self.text = [i for i in range(self.prompt) if self.visual and i > self.visual[-1]]
        self.prior = prior
        self.weights: dict[int, Tensor] = {}  # of the prompt, by layer
        self.shapes: dict[int, list[torch.Size]] = {}  # of q, k, v, by layer

    def __call__(self, module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
        self.shapes[module.layer_idx] = [x.shape for x in (query, key, value)]
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        s = query @ key.transpose(2, 3) * scaling
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        allowed = attention_mask[0, 0] == 0  # [Sq, Sk]
        p = s.masked_fill(~allowed, -torch.inf).softmax(-1)
        out = p @ value
        if module.layer_idx in self.layers and self.visual:
            rows = self.row_weights(s[0], p[0], allowed)
            if self.text:
                self.weights[module.layer_idx] = rows[self.text[-1]]
            out = out * rows.T[None, :, :, None]
        return out.transpose(1, 2).contiguous(), None

    def row_weights(self, s: Tensor, p: Tensor, allowed: Tensor) -> Tensor:
        """(Sq, H): the factor of every query's output."""
        statistics = {}  # counting query -> (variance, alignment), each (H,)
        for i in [*self.text, *range(self.prompt, s.shape[1])]:
            seen = [n for n, j in enumerate(self.visual) if allowed[i, j]]
            if len(seen) >= 2:
                keys = [self.visual[n] for n in seen]
                statistics[i] = (s[:, i, keys].var(-1, unbiased=True), (p[:, i, keys] * self.prior[seen]).sum(-1))
        rows = []
        for i in range(s.shape[1]):
            last = i if i >= self.prompt and self.mode == "running" else self.prompt - 1
            counting = [statistics[j] for j in statistics if j <= last]
            if i < self.prompt and rows:
                rows.append(rows[0])
            elif not counting:
                rows.append(torch.ones(s.shape[0]))
            else:
                av, sa = (sum(parts) / len(counting) for parts in zip(*counting))
                w = torch.softmax(av * sa / self.beta, 0)
                if self.protect:
                    w = torch.cat([w.max()[None], w[1:]])
                rows.append(len(w) * w)
        return torch.stack(rows)


@contextlib.contextmanager
def eager_oracle(model: nn.Module, kind: type[Oracle] = Oracle, **options) -> Iterator[Oracle]:
    """Run the model's text layers through an :class:`Oracle`."""
    oracle = kind(model, **options)
    AttentionInterface.register("sar_test_oracle", oracle)
    AttentionMaskInterface.register("sar_test_oracle", eager_mask)
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "sar_test_oracle"})
    try:
        yield oracle
    finally:
        model.set_attn_implementation({"text_config": before})
