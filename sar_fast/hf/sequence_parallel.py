"""Sequence parallelism for multimodal models: each rank computes a slice of the positions in the decoder layers.

Other libraries split the batch before the model, which pictures do not survive; here every rank embeds the whole batch,
pictures included, and the split happens in front of the text model. SAR's roles and prior are those of the whole
sequence either way. Two ways for attention to see all positions:

- Context parallel: each rank's queries attend to the keys of all ranks, gathered in one collective per layer. Any
  number of heads; the last rank does the most work.

      handle = apply_sar(model, config, shards=Shards(queries=group))
- DeepSpeed Ulysses exchanges slices of the sequence for slices of the heads around the attention function.

      handle = apply_sar(model, config, shards=Shards(heads=group))
      UlyssesSPAttentionHF.register_with_transformers(text_model, "sar", sequence_parallel_size=n, micro_batch_size=b)

Then, in both:

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

from sar_fast.base.errors import ArgumentError
from sar_fast.hf.cache_argument import cache_in
from sar_fast.hf.features import handle_of
from sar_fast.hf.structure import find_decoder_layers, unwrap

IGNORED = -100  # label of positions without a loss, as in PyTorch's cross-entropy


class SequenceSplit:
    """The split of one model's text positions over a process group; made by :func:`split_sequence`."""

    def __init__(self, model: nn.Module, group: ProcessGroup) -> None:
        self.group = group
        self.model = unwrap(model)
        layers = find_decoder_layers(self.model)
        self.text_model = next(m for m in self.model.modules() if getattr(m, "layers", None) is layers)
        _check_layers(self.model)
        _check_shards(self.model, group)
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
            raise ArgumentError("input_ids", length, f"be padded to a multiple of the {ranks} ranks that share it")
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
            raise ArgumentError(
                "attention_mask",
                "another",
                (
                    "be (B, S) with padding on the right: no mask reaches the attention function of a split "
                    "sequence, and only later positions are out of sight without one"
                ),
            )

    def _slice_inputs(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if cache_in(kwargs) is not None or kwargs.get("use_cache"):
            raise ArgumentError(
                "use_cache", True, "be False under sequence parallelism: it is for training and scoring"
            )
        masks = kwargs.get("attention_mask")
        for mask in masks.values() if isinstance(masks, dict) else [masks]:
            if mask is not None and mask.dim() != 2:
                raise ValueError(
                    f"{type(module).__name__} is given a mask {tuple(mask.shape)} that is not plain causal (windows, "
                    "pictures that see ahead); a split sequence cannot keep to it"
                )
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


def _check_layers(model: nn.Module) -> None:
    """No mask reaches the attention function, so a layer that needs one would silently see every earlier position."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        kinds = {"sliding_attention"}
    if kinds - {"full_attention"}:
        raise ArgumentError(
            "model",
            f"layers of {', '.join(sorted(kinds - {'full_attention'}))}",
            "have plain causal attention in all layers, for a split sequence",
        )


def _check_shards(model: nn.Module, group: ProcessGroup) -> None:
    """SAR must know the ranks that share the sequence: it would take a slice for the whole."""
    handle = handle_of(model.base_model)
    if handle is not None and (handle.shards is None or group not in (handle.shards.queries, handle.shards.heads)):
        raise ArgumentError(
            "group",
            "one that SAR on this model does not know",
            (
                "be given to SAR: apply_sar(model, config, shards=Shards(queries=group)), or Shards(heads=group) "
                "for Ulysses"
            ),
        )


def split_sequence(model: nn.Module, group: ProcessGroup) -> SequenceSplit:
    """Let every rank of ``group`` run the text model on its slice of the positions.

    The model's outputs, hidden states and logits, are then this rank's slice (B, S / ranks, ...), and so are gradients
    of parameters: they add up over the ranks. S must be a multiple of the ranks, padding on the right.

    Args:
        model: the multimodal model, with SAR and ``shards`` on it as above; without SAR under an attention function
            that sees to all positions by itself (Ulysses).
        group: the ranks that share a batch, in the order of their slices.

    Raises:
        ValueError: layers with sliding windows or the like; SAR that does not know ``group``.
    """
    return SequenceSplit(model, group)
