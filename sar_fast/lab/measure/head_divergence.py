"""How far the picture moves each head's output: which heads look at it, without a row of attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.hf.families import UnsupportedModelError
from sar_fast.hf.structure import find_attention_modules, has_config, unwrap

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "wo", "dense")


def head_divergence(
    model: nn.Module,
    with_picture: Mapping[str, Any],
    without_picture: Mapping[str, Any],
    *,
    zero_surges: bool = False,
) -> dict[int, Tensor]:
    """Vision-aware head divergence, VHD (He et al., ACL 2025, arXiv 2412.13949): the Euclidean distance between a
    head's output at the last prompt position with and without the picture.

    Two forward passes without gradients. A head's output is what enters the attention's output projection, after a
    family's gate and after the weights of SAR where it is applied; to measure layers as the paper does, each after the
    earlier ones are reinforced, measure again under the weights found so far.

    Args:
        model: a transformers multimodal model in eval mode, wrapped or not; every layer's heads on this process.
        with_picture, without_picture: its keyword arguments for the same questions, (B, S) each with its own S, padded
            on either side.
        zero_surges: the paper's rule against heads that the picture calms: the divergence is 0 where both it and the
            squared norm of the output without the picture exceed their mean over the layer's heads by more than their
            standard deviation (dividing by H - 1, which the paper leaves open).

    Returns:
        Layer index, as the keys of ``handle.stats`` -> (B, H), fp32, fp64 of a model in fp64.

    Raises:
        TypeError, ValueError: inputs that do not fit together, or a model in training mode.
        UnsupportedModelError: an attention module whose output projection or heads cannot be found.
    """
    if model.training:
        raise ArgumentError(
            "model", "training mode", "be in eval mode, as dropout would count as divergence; call model.eval()"
        )
    seen, blind = (last_head_outputs(model, inputs) for inputs in (with_picture, without_picture))
    divergence = {}
    for layer, outputs in seen.items():
        if outputs.shape != blind[layer].shape:
            raise ArgumentError(
                "with_picture and without_picture",
                f"batches of {outputs.shape[0]} and {blind[layer].shape[0]}",
                "hold the same samples",
            )
        distance = (outputs - blind[layer]).norm(dim=-1)
        if zero_surges:
            activation = blind[layer].square().sum(-1)
            distance = distance.masked_fill(_stands_out(distance) & _stands_out(activation), 0)
        divergence[layer] = distance
    return divergence


def last_head_outputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[int, Tensor]:
    """Layer index -> (B, H, Dv) fp32 (fp64) outputs of its heads at each sample's last real position; one forward pass
    without gradients."""
    if not isinstance(inputs, Mapping):
        raise ArgumentTypeError("inputs", type(inputs).__name__, "be a mapping of the model's keyword arguments")
    attending = find_attention_modules(unwrap(model))
    with torch.no_grad(), _recorded(attending, last_positions(inputs)) as outputs:
        model(**{**inputs, "use_cache": False})
    missing = [index for index in range(len(attending)) if index not in outputs]
    if missing:
        name = type(attending[missing[0]]).__name__
        raise UnsupportedModelError(f"model: its attention, {name} of layer {missing[0]}, ran no output projection")
    return dict(sorted(outputs.items()))


def last_positions(inputs: Mapping[str, Any]) -> Tensor:
    """(B,) int64: each sample's last position that is no padding, whichever side is padded."""
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        raise ArgumentError("inputs", "neither", "have input_ids or inputs_embeds")
    batch, length = tokens.shape[:2]
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.full((batch,), length - 1, device=tokens.device)
    if mask.shape != (batch, length):
        raise ArgumentError(
            "inputs['attention_mask']",
            tuple(mask.shape),
            f"have shape (batch, positions), {(batch, length)} like the tokens",
        )
    real = mask != 0
    if not bool(real.any(1).all()):
        raise ArgumentError("inputs['attention_mask']", "a sample that is all padding", "leave each sample a position")
    return (real * torch.arange(length, device=mask.device)).amax(1)


@contextlib.contextmanager
def _recorded(attending: list[nn.Module], positions: Tensor) -> Iterator[dict[int, Tensor]]:
    """Within the block, what enters the output projections at these positions is kept; hooks go also after an error."""
    outputs: dict[int, Tensor] = {}
    hooks: list[Any] = []
    try:
        for index, module in enumerate(attending):
            for attention in _inside(module):  # PEFT keeps several copies of a module, of which one runs
                hook = _recorder(index, attention, positions, outputs)
                hooks.append(_output_projection(attention).register_forward_pre_hook(hook, with_kwargs=True))
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _recorder(index: int, attention: nn.Module, positions: Tensor, outputs: dict[int, Tensor]) -> Any:
    heads, width = attention.config.num_attention_heads, _width(attention)

    def keep(projection: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if x.dim() != 3 or x.shape[0] != len(positions) or x.shape[-1] != heads * width:
            raise UnsupportedModelError(
                f"model: {type(attention).__name__} of layer {index} must give its output projection all heads, "
                f"(batch, positions, heads x head dim), here ({len(positions)}, S, {heads} x {width}); got "
                f"{tuple(x.shape)}"
            )
        rows = x[torch.arange(len(x), device=x.device), positions.to(x.device)]
        rows = rows.unflatten(-1, (heads, width))
        outputs[index] = rows if rows.dtype == torch.float64 else rows.float()

    return keep


def _inside(module: nn.Module) -> list[nn.Module]:
    """The modules that attend in a layer's self-attention: itself, or what its wrapper holds."""
    found = [m for m in module.modules() if has_config(m)]
    if not found:
        raise UnsupportedModelError(f"model: its attention, {type(module).__name__}, has no config that says its heads")
    return found


def _output_projection(attention: nn.Module) -> nn.Module:
    found = next((attention._modules[n] for n in OUTPUT_PROJECTIONS if n in attention._modules), None)
    if found is None:
        raise UnsupportedModelError(
            f"model: {type(attention).__name__} has no output projection under a known name "
            f"({', '.join(OUTPUT_PROJECTIONS)}); its parts are {', '.join(attention._modules) or 'none'}"
        )
    return found


def _width(attention: nn.Module) -> int:
    """Width of one head's output: latent attention's values have their own."""
    width = getattr(attention, "v_head_dim", None) or getattr(attention, "head_dim", None)
    if width is None:
        raise UnsupportedModelError(f"model: {type(attention).__name__} has no head_dim")
    return width


def _stands_out(x: Tensor) -> Tensor:
    """(B, H): more than a standard deviation above the mean over heads."""
    return x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True)
