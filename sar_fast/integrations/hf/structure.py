"""Where things are in a transformers model: the model inside its wrappers, decoder layers, attention modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from sar_fast.distributed import Shards
from sar_fast.integrations.hf.families import UnsupportedModelError


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT, DDP and compile wrappers."""
    return unwrapping(model)[-1]


def unwrapping(model: nn.Module) -> list[nn.Module]:
    """The wrappers from outside in, then the transformers model."""
    from transformers import PreTrainedModel

    seen = [model]
    while not isinstance(seen[-1], PreTrainedModel):
        outer = seen[-1]
        if hasattr(outer, "get_base_model"):
            inner = outer.get_base_model()
        else:
            inner = getattr(outer, "module", None) or getattr(outer, "_orig_mod", None)
        if inner is None or inner is outer:
            raise TypeError(
                f"model must be a transformers PreTrainedModel or a wrapper of one; got {type(model).__name__}"
            )
        seen.append(inner)
    return seen


def find_decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The text model's list of decoder layers."""
    decoder = model.get_decoder()
    while decoder is not None and not hasattr(decoder, "layers"):
        decoder = getattr(decoder, "model", None) or getattr(decoder, "language_model", None)
    if decoder is None:
        raise UnsupportedModelError(f"model: {type(model).__name__} has no decoder with a list of layers")
    return decoder.layers


def attention_of(layer: nn.Module) -> nn.Module | None:
    """A decoder layer's self-attention, also where the layer is wrapped; None if it does not attend."""
    return next((m._modules["self_attn"] for m in layer.modules() if "self_attn" in m._modules), None)


def find_attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules of the text model, in depth order; each may be a wrapper of one or of several."""
    modules = [attention_of(layer) for layer in find_decoder_layers(model)]
    modules = [module for module in modules if module is not None]
    if not modules:
        raise UnsupportedModelError(f"model: the decoder layers of {type(model).__name__} have no self_attn")
    return modules


def inner_attention(module: nn.Module) -> nn.Module:
    """What a wrapper of a self-attention module stands for: the first module inside that knows its config."""
    for inner in module.modules():
        if has_config(inner):
            return inner
    raise UnsupportedModelError(f"model: its attention, {type(module).__name__}, has no config that says how to attend")


def configs_inside(modules: list[nn.Module]) -> Iterator[Any]:
    """The configs that these modules, their parts and copies (PEFT's, with a config of their own) read; each once."""
    found = {id(m.config): m.config for module in modules for m in module.modules() if has_config(m)}
    yield from found.values()


def has_config(module: nn.Module) -> bool:
    """Whether a module reads by itself how to attend."""
    return hasattr(module.__dict__.get("config"), "_attn_implementation")


def tensor_parallel_shards(model: nn.Module) -> Shards | None:
    """The ranks that share every layer's heads, where transformers' tp_plan split the model."""
    if getattr(model, "tp_size", None) in (None, 1):
        return None
    return Shards(heads=model._device_mesh["tp"].get_group())
