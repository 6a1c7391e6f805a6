"""Visual supervision beside the text loss (section 3.3 of the paper): a symmetric CLIP-style loss.

The last layer's hidden states are pooled twice per sample, over its visual and over its text positions, and normalised.
With similarities s_ij = v_i . t_j / temperature over all n samples of the micro-batch, of all ranks,

    loss = (mean_i CE(s_i., i) + mean_j CE(s_.j, j)) / 2

A sample without visual or without text positions takes no part.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from sar_fast.base.errors import ArgumentError
from sar_fast.hf.structure import unwrap

TEXT_POOLS = ("all", "prompt", "answer")
HEAD_NAME = "visual_contrastive_head"
OUTPUT_NAME = "loss_contrastive"


def contrastive_loss(visual: Tensor, text: Tensor, valid: Tensor, inverse_temperature: Tensor | float) -> Tensor:
    """The loss over the samples of all ranks, scaled so that the mean over ranks is the loss of all of them.

    Args:
        visual, text: (B, D) pooled features of this rank's samples, not normalised.
        valid: (B,) bool, samples that take part.
        inverse_temperature: what similarities are multiplied by.

    Returns:
        0-dim fp32: this rank's rows and columns over the number of all samples, times the number of ranks, with
        gradients to the features of other ranks through the gather. Averaging gradients over ranks, as DDP and
        DeepSpeed do, gives the gradient of the loss over all samples. 0 if no sample takes part anywhere.
    """
    visual, text = (F.normalize(x.float(), dim=-1) for x in (visual, text))
    all_visual, all_text, all_valid, start, world = visual, text, valid, 0, 1
    if dist.is_initialized() and dist.get_world_size() > 1:
        world = dist.get_world_size()
        size = torch.tensor(visual.shape[0], device=visual.device)
        dist.all_reduce(size, op=dist.ReduceOp.MAX)  # a last micro-batch may be smaller on some ranks
        missing = int(size) - visual.shape[0]
        visual, text = (F.pad(x, (0, 0, 0, missing)) for x in (visual, text))
        valid = F.pad(valid, (0, missing))
        all_visual, all_text = (torch.cat(all_gather(x)) for x in (visual, text))
        gathered = [torch.empty_like(valid) for _ in range(world)]
        dist.all_gather(gathered, valid)
        all_valid, start = torch.cat(gathered), dist.get_rank() * int(size)
    count = all_valid.sum().clamp_min(1)
    target = start + torch.arange(visual.shape[0], device=visual.device)
    total = visual.new_zeros(())
    for own, others in ((visual, all_text), (text, all_visual)):
        similarity = (own @ others.t()) * inverse_temperature  # (B, B of all ranks)
        similarity = similarity.masked_fill(~all_valid, torch.finfo(similarity.dtype).min)
        each = F.cross_entropy(similarity, target, reduction="none")
        total = total + torch.where(valid, each, 0.0).sum()
    return total / 2 / count * world


class ContrastiveHead(nn.Module):
    """Holds the temperature, so that optimizers, checkpoints, DDP and ZeRO treat it like any parameter.

    Args:
        temperature: > 0; where a learnable one starts.
        learnable: train log(1 / temperature), clamped so that similarities are multiplied by at most 100.
    """

    def __init__(self, temperature: float = 1.0, learnable: bool = False) -> None:
        super().__init__()
        if not temperature > 0:
            raise ArgumentError("visual_contrastive_temperature", temperature, "be > 0")
        self.log_scale = nn.Parameter(torch.full((1,), -math.log(temperature))) if learnable else None
        self.scale = 1 / temperature

    def forward(self, visual: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        scale = self.scale if self.log_scale is None else self.log_scale.float().exp().clamp(max=100.0)
        with torch.autocast(visual.device.type, enabled=False):  # similarities close to each other need fp32
            return contrastive_loss(visual, text, valid, scale)


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, S, D) and (B, S) bool -> (B, D) fp32: mean over the positions of ``mask``, 0 where there is none."""
    weights = mask.to(torch.float32)
    summed = torch.einsum("bsd,bs->bd", hidden.float(), weights)
    return summed / weights.sum(-1, keepdim=True).clamp_min(1)


class ContrastiveSupervision:
    """Lets a model's forward pass return a dict with ``loss_contrastive`` beside its outputs, whenever it gets labels.

    Inside the forward, so that DDP's and ZeRO's hooks see every use of every parameter; last hidden states are taken
    from the language model as it returns them, no other layer is kept.

    Args:
        model: of transformers, PEFT-wrapped or not, before a Trainer wraps it.
        head: registered on it as ``visual_contrastive_head``; with a learnable temperature it is part of checkpoints.
        text_pool: which text positions are pooled: ``"all"`` (the paper's), those of the ``"prompt"`` or of the
            ``"answer"``, as the labels tell them apart.
        differentiable: False computes the loss for the log alone.
    """

    def __init__(
        self, model: nn.Module, head: ContrastiveHead, text_pool: str = "all", differentiable: bool = True
    ) -> None:
        if text_pool not in TEXT_POOLS:
            raise ArgumentError("visual_contrastive_text_pool", repr(text_pool), f"be one of {', '.join(TEXT_POOLS)}")
        self.inner = unwrap(model)
        names = ("image_token_id", "video_token_id")
        self.visual_ids = [int(t) for n in names if (t := getattr(self.inner.config, n, None)) is not None]
        if not self.visual_ids:
            raise ArgumentError(
                "model", "none", "have an image_token_id in its config, by which its visual positions are known"
            )
        self.text_pool, self.differentiable = text_pool, differentiable
        self._hidden: Tensor | None = None
        device = next(self.inner.parameters()).device
        self.inner.add_module(HEAD_NAME, head.to(device))
        self._hooks = [
            self.inner.get_decoder().register_forward_hook(self._after_decoder),
            self.inner.register_forward_hook(self._after_model, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Take hooks and head off the model."""
        for hook in self._hooks:
            hook.remove()
        delattr(self.inner, HEAD_NAME)

    def _after_decoder(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state

    def _after_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        hidden, self._hidden = self._hidden, None
        labels, ids = kwargs.get("labels"), kwargs.get("input_ids")
        if labels is None:
            return output
        if ids is None:
            raise ArgumentError(
                "input_ids", None, "be given: the contrastive loss tells visual tokens from text by them"
            )
        mask = kwargs.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
        visual = torch.isin(ids, torch.tensor(self.visual_ids, device=ids.device)) & real
        text = ~visual & real
        if self.text_pool != "all":
            text &= (labels != -100) == (self.text_pool == "answer")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable):
            valid = visual.any(-1) & text.any(-1)
            loss = getattr(module, HEAD_NAME)(pool(hidden, visual), pool(hidden, text), valid)
        return {**output, OUTPUT_NAME: loss}  # a model's output class has no room for it, and DDP builds it anew
