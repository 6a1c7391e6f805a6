"""Where things are in a transformers model: the model inside its wrappers, decoder layers, attention modules."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from sar_fast.base.errors import ArgumentTypeError
from sar_fast.hf.cache_argument import NEW, OLD
from sar_fast.hf.families import Family, UnsupportedModelError, find_family
from sar_fast.method.distributed import Shards


class Layout:
    """What SAR works with in one model: its attention modules, vision blocks and placeholders, and its family.

    Attributes:
        model: the transformers model inside its wrappers. base_model: the part whose forward takes pictures.
        peft_configs: those of the PEFT wrapper by adapter.
        total_layers: number of attention layers.
        prior_block: number of the vision block whose output makes the prior.
        placeholder_ids: modality -> token id.
        forward_parameters: names of the base model's arguments.

    Raises:
        UnsupportedModelError: the family is not known, or the model lacks something; the message says what.
    """

    def __init__(self, model: nn.Module) -> None:
        *wrappers, self.model = unwrapping(model)
        self.base_model = self.model.base_model
        self.peft_configs = next((w.peft_config for w in wrappers if hasattr(w, "peft_config")), {})
        self.total_layers = len(self.attention_modules)
        self.attention_config = inner_attention(self.attention_modules[-1]).config
        L = len(self.vision_blocks)
        self.prior_block = min(2 * L // 3, L - 1)
        self.placeholder_ids = self._find_placeholder_ids()
        self.forward_parameters = parameters_of(type(self.base_model).forward)
        if not {NEW, OLD} & set(self.forward_parameters):
            raise UnsupportedModelError(
                f"model: {type(self.base_model).__name__} takes no {NEW} or {OLD}, so SAR would not see its cache; a "
                "newer transformers may have given it another name"
            )

    @functools.cached_property
    def family(self) -> Family:
        """What SAR knows of the model's family; not part of a copy or a pickle."""
        return find_family(self.model.config)

    @property
    def attention_modules(self) -> list[nn.Module]:
        """The text model's self-attention modules as they are now, in depth order."""
        return find_attention_modules(self.model)

    @property
    def vision_blocks(self) -> nn.ModuleList:
        """The vision encoder's blocks that run now: PEFT keeps several copies of a module."""
        return self.family.find_vision_blocks(self.base_model)

    def prior_block_of(self, base_model: nn.Module) -> nn.Module:
        """The vision block whose output makes the prior, of ``base_model`` or a replica of it."""
        return self.family.find_vision_blocks(base_model)[self.prior_block]

    def _find_placeholder_ids(self) -> dict[str, int]:
        config, fields = self.model.config, self.family.placeholder_ids
        found = {modality: getattr(config, field, None) for modality, field in fields.items()}
        found = {modality: int(token) for modality, token in found.items() if token is not None}
        if not found:
            raise UnsupportedModelError(
                f"model: its config has no visual placeholder id ({', '.join(fields.values())})"
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "family"}


def parameters_of(method: Callable) -> tuple[str, ...]:
    """Names of a method's parameters after self; found once, as ``inspect`` does not belong in a traced graph."""
    return tuple(inspect.signature(method).parameters)[1:]


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
            raise ArgumentTypeError(
                "model", type(model).__name__, "be a transformers PreTrainedModel or a wrapper of one"
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


def foreign_forward(attention: nn.Module) -> str | None:
    """Full name of the forward that another library gave a self-attention module or its class; None = its own."""
    module = inner_attention(attention)
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    forward = vars(module).get("forward", vars(owner)["forward"])
    where = getattr(forward, "__module__", type(forward).__module__)
    return None if where == owner.__module__ else f"{where}.{getattr(forward, '__qualname__', type(forward).__name__)}"


def tensor_parallel_shards(model: nn.Module) -> Shards | None:
    """The ranks that share every layer's heads, where transformers' tp_plan split the model."""
    if getattr(model, "tp_size", None) in (None, 1):
        return None
    mesh = model._device_mesh
    return Shards(heads=(mesh["tp"] if mesh.mesh_dim_names else mesh).get_group())  # older ones: one mesh, unnamed
