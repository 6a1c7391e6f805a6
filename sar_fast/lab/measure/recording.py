"""One forward pass recorded: each layer's statistics, and where the last text query looks in the picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError
from sar_fast.config import SARConfig
from sar_fast.hf import SARHandle, apply_sar
from sar_fast.lab.show.overlay import head_average
from sar_fast.method.state import SARStats
from sar_fast.method.weighting import Equal


@dataclasses.dataclass(frozen=True)
class Recording:
    """What SAR measured on a batch of prompts.

    Attributes:
        stats: layer -> :class:`~sar_fast.SARStats`, (B, H) each.
        rows: layer -> (B, H, S) fp32 attention of the last text query over the visual keys, 0 elsewhere.
        visual_mask, text_mask: (B, S) bool. prior: (B, S) fp32.
    """

    stats: dict[int, SARStats]
    rows: dict[int, Tensor]
    visual_mask: Tensor
    text_mask: Tensor
    prior: Tensor

    def attention(self, sample: int, layers: list[int], *, weighted: bool) -> Tensor:
        """(V,) attention of the sample's last text query over its visual tokens: mean over ``layers`` and heads.
        ``weighted``: heads count by their factor c, as their outputs do."""
        seen = self.visual_mask[sample]
        maps = [
            head_average(self.rows[i][sample][:, seen], self.stats[i].head_weights[sample] if weighted else None)
            for i in layers
        ]
        return torch.stack(maps).mean(0)

    def head_weights(self) -> Tensor:
        """(layers, H) fp32 factors c, mean over the samples."""
        return torch.stack([self.stats[i].head_weights.mean(0) for i in sorted(self.stats)]).cpu()


def record(model: nn.Module, inputs: Mapping[str, Tensor], config: SARConfig) -> Recording:
    """Runs the prompt once with SAR as configured. ``ValueError`` if it has no visual token."""
    with apply_sar(model, config) as handle:
        return record_with(handle, model, inputs)


@torch.no_grad()
def record_with(handle: SARHandle, model: nn.Module, inputs: Mapping[str, Tensor]) -> Recording:
    """:func:`record` with the SAR that is on the model already, whose options are as before afterwards."""
    before = handle.config
    handle.reconfigure(before.replace(record=True, record_rows="last_text"))
    try:
        model(**inputs, use_cache=False)
        if handle.roles is None or not handle.roles.visual_mask.any():
            raise ArgumentError("inputs", "none", "hold visual tokens, for SAR to look at")
        return Recording(dict(handle.stats), dict(handle.rows), *handle.roles, handle.prior)
    finally:
        handle.reconfigure(before)


def recording_off(model: nn.Module, config: SARConfig) -> SARConfig:
    """The configuration that measures every layer and changes nothing: equal weights, so each factor c is 1."""
    layers = attention_layers(model)
    return config.replace(activation_layer_k=layers, weighting=Equal())


def attention_layers(model: nn.Module) -> int:
    """Number of attention layers that SAR could re-weight."""
    with apply_sar(model, SARConfig(activation_layer_k=0)) as handle:
        return handle.describe()["attention_layers"]
