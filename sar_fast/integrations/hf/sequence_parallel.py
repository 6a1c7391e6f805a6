"""Sequence parallelism for multimodal models: each rank computes a slice of the positions in the decoder layers.

DeepSpeed Ulysses exchanges slices of the sequence for slices of the heads around the attention function. It splits the
batch before the model, which pictures do not survive; here every rank embeds the whole batch, pictures included, and
the split happens in front of the text model. SAR's roles and prior are those of the whole sequence either way.

    handle = apply_sar(model, config, shards=Shards(heads=group))
    UlyssesSPAttentionHF.register_with_transformers(text_model, "sar", sequence_parallel_size=n, micro_batch_size=b)
    split = split_sequence(model, group)
    loss = model(**batch, use_cache=False, labels=split.slice(labels), shift_labels=split.shifted(labels)).loss
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sar_fast.integrations.hf.apply import find_decoder_layers, unwrap

IGNORED = -100  # label of positions without a loss, as in PyTorch's cross-entropy


class SequenceSplit:
    """The split of one model's text positions over a process group; made by :func:`split_sequence`."""

    def __init__(self, model: nn.Module, group: ProcessGroup) -> None:
        self.group = group
        self.model = unwrap(model)
        layers = find_decoder_layers(self.model)
        self.text_model = next(m for m in self.model.modules() if getattr(m, "layers", None) is layers)
        self._hooks = [
            self.model.base_model.register_forward_pre_hook(self._check_padding, with_kwargs=True),
            self.text_model.register_forward_pre_hook(self._slice_inputs, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Undo the split."""
        for hook in self._hooks:
            hook.remove()

    def positions(self, length: int) -> slice:
        """This rank's positions among ``length``."""
        ranks = dist.get_world_size(self.group)
        if length % ranks:
            raise ValueError(f"input_ids must be padded to a multiple of the {ranks} ranks that share it; got {length}")
        first = dist.get_rank(self.group) * (length // ranks)
        return slice(first, first + length // ranks)

    def slice(self, x: Tensor) -> Tensor:
        """(B, S, ...) -> this rank's (B, S / ranks, ...)."""
        return x[:, self.positions(x.shape[1])].contiguous()

    def shifted(self, labels: Tensor) -> Tensor:
        """(B, S) labels -> (B, S / ranks) labels of the next position; the last one has none."""
        return self.slice(F.pad(labels[:, 1:], (0, 1), value=IGNORED))

    def _check_padding(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None:
            return
        if mask.dim() != 2 or not torch.equal(mask != 0, (mask != 0).cummin(1).values):
            raise ValueError(
                "attention_mask must be (B, S) with padding on the right: between Ulysses' exchanges no mask reaches "
                "the attention function, and only later positions are out of sight without one"
            )

    def _slice_inputs(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
            raise ValueError("use_cache must be False under sequence parallelism: it is for training and scoring")
        embeds = kwargs["inputs_embeds"]
        own, positions = self.positions(embeds.shape[1]), kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device).expand(embeds.shape[:2])
        return args, {
            **kwargs,
            "inputs_embeds": embeds[:, own],
            "position_ids": positions[..., own],
            "attention_mask": None,
        }


def split_sequence(model: nn.Module, group: ProcessGroup) -> SequenceSplit:
    """Let every rank of ``group`` run the text model on its slice of the positions.

    The model's outputs, hidden states and logits, are then this rank's slice (B, S / ranks, ...), and so are gradients
    of parameters: they add up over the ranks. S must be a multiple of the ranks, padding on the right.

    Args:
        model: the multimodal model, SAR applied or not, under an attention function that exchanges sequence for heads.
        group: the ranks that share a batch, in the order of their slices.
    """
    return SequenceSplit(model, group)
