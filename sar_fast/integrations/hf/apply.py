"""``apply_sar``, ``remove_sar`` and the handle between them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from sar_fast.backends.protocol import Request
from sar_fast.backends.select import choose_backend
from sar_fast.cache_state import Switch
from sar_fast.config import SARConfig
from sar_fast.distributed import Shards
from sar_fast.integrations.hf import attention, flow, rule_module
from sar_fast.integrations.hf.families import Family, UnsupportedModelError, find_family
from sar_fast.integrations.hf.features import (
    HANDLE_MARK,
    handle_of,
    keep_patch_norms,
    norms_of,
    parameters_of,
    unwatch_features,
    watch_block,
    watch_features,
)
from sar_fast.integrations.hf.speculation import announce_drafts, forget_drafts
from sar_fast.integrations.hf.structure import (
    configs_inside,
    find_attention_modules,
    find_decoder_layers,
    inner_attention,
    tensor_parallel_shards,
    unwrap,
    unwrapping,
)
from sar_fast.roles import TokenRoles
from sar_fast.types import SARStats
from sar_fast.weighting.split import Split, module_of

HOOKS = (flow.before_forward, flow.after_forward, flow.before_layer, keep_patch_norms)


class SARHandle:
    """SAR on one model: removes it, describes it, and holds what the last call recorded. Also a context manager.

    Attributes:
        config: the options in force.
        stats: layer index -> :class:`~sar_fast.SARStats` of the last call, with ``SARConfig(record=True)``.
        rows: layer index -> (B, H, Sk) fp32 attention of each sample's last text query over its visual keys, with
            ``SARConfig(record_rows="last_text")``.
        roles, prior: token roles of the last prompt, and its (B, S) fp32 prior.
    """

    def __init__(self, model: nn.Module, config: SARConfig, shards: Shards | None = None) -> None:
        self.config = config
        *wrappers, self.model = unwrapping(model)
        self.peft_configs = next((w.peft_config for w in wrappers if hasattr(w, "peft_config")), {})
        self.shards = tensor_parallel_shards(self.model) if shards is None else shards
        self.base_model = self.model.base_model
        self.total_layers = len(self.attention_modules)
        self._attention_config = inner_attention(self.attention_modules[-1]).config
        if self.shards is not None:
            self.shards.check_heads(self.model.config.get_text_config().num_attention_heads)
        self.check_options(config)
        L = len(self.vision_blocks)
        self.prior_block = min(2 * L // 3, L - 1)
        self.placeholder_ids = {
            modality: int(getattr(self.model.config, field))
            for modality, field in self.family.placeholder_ids.items()
            if getattr(self.model.config, field, None) is not None
        }
        if not self.placeholder_ids:
            fields = ", ".join(self.family.placeholder_ids.values())
            raise UnsupportedModelError(f"model: its config has no visual placeholder id ({fields})")
        self.forward_parameters = parameters_of(type(self.base_model).forward)
        self.switch = Switch(on=False)
        self._installed = False
        self._previous_implementation: str | None = None
        self.stats: dict[int, SARStats] = {}
        self.rows: dict[int, Tensor] = {}
        self.roles: TokenRoles | None = None
        self.prior: Tensor | None = None

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

    def check_options(self, config: SARConfig) -> None:
        """Whether this handle can take other options: K must fit, and the prior's source is fixed once SAR is on."""
        if config.activation_layer_k > self.total_layers:
            raise ValueError(
                f"activation_layer_k must be at most the number of attention layers, {self.total_layers}; got "
                f"{config.activation_layer_k}"
            )
        if config.prior_source != self.config.prior_source:
            raise ValueError(
                f"prior_source is fixed while SAR is applied, {self.config.prior_source!r}; got {config.prior_source!r}"
            )

    def reconfigure(self, config: SARConfig) -> None:
        """Other options for the calls to come; a cache that holds pictures cannot be continued under them.

        A rule that is a module takes the place of the one before it as a part of the model.
        """
        self.check_options(config)
        before, after = module_of(self.config.weighting), module_of(config.weighting)
        if self._installed and before is not after:
            self._take_rule_off(before)
            self._put_rule_on(after)
        self.config = config
        self.switch.on = config.measures
        self._mark_layers()

    def _mark_layers(self) -> None:
        modules = self.attention_modules
        self._unmark_layers(modules)
        for index in self.sar_layers:
            for module in modules[index].modules():  # what attends may be inside a wrapper, or be several copies
                module.__dict__[attention.LAYER_MARK] = index

    def _unmark_layers(self, modules: list[nn.Module]) -> None:
        for attending in modules:
            for module in attending.modules():
                module.__dict__.pop(attention.LAYER_MARK, None)

    def _put_rule_on(self, rule: nn.Module | None) -> None:
        if rule is not None:
            rule_module.put_on(self.model, rule, like=self.attention_modules[-1])

    def _take_rule_off(self, rule: nn.Module | None) -> None:
        if rule is not None:
            rule_module.take_off(self.model, rule)

    def config_of(self, base_model: nn.Module) -> SARConfig:
        """The options in force on ``base_model``; a replica of it (DataParallel) has a replica of the rule."""
        weighting = self.config.weighting
        if base_model is self.base_model or (rule := module_of(weighting)) is None:
            return self.config
        replica = rule_module.replica_of(rule, base_model)
        if isinstance(weighting, Split):
            replica = Split(replica, weighting.heads, weighting.queries)
        return self.config.replace(weighting=replica)

    @property
    def sar_layers(self) -> list[int]:
        """Indices of the re-weighted attention layers, counted among layers that attend."""
        return list(range(self.total_layers - self.config.activation_layer_k, self.total_layers))

    def install(self) -> SARHandle:
        """Put SAR on the model; ``apply_sar`` calls it."""
        self._put_rule_on(module_of(self.config.weighting))
        attention.register()
        self._previous_implementation = self._implementation()
        self._set_implementation(attention.ATTENTION_NAME)
        self._mark_layers()
        self.base_model.__dict__[HANDLE_MARK] = self
        self._installed = True
        self.switch.on = self.config.measures
        self._watch_features()
        announce_drafts(self.model)
        self.base_model.register_forward_pre_hook(flow.before_forward, with_kwargs=True)
        self.base_model.register_forward_hook(flow.after_forward, with_kwargs=True, always_call=True)
        watch_block(self.prior_block_of(self.base_model))
        for layer in find_decoder_layers(self.model):
            layer.register_forward_pre_hook(flow.before_layer, with_kwargs=True)
        return self

    def _watch_features(self) -> None:
        for modality in self.placeholder_ids:
            watch_features(type(self.base_model), modality, self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "family"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, of a model with SAR on, needs its class's feature methods as the original does."""
        self.__dict__.update(state)
        attention.register()
        if self._installed:
            self._watch_features()

    def __deepcopy__(self, memo: dict[int, Any]) -> SARHandle | None:
        """A copy of the model gets a handle of its own; a copy of a part of it gets none."""
        if memo and id(self.model) not in memo:
            return None
        memo[id(self)] = other = object.__new__(type(self))
        state = {k: v if k == "shards" else copy.deepcopy(v, memo) for k, v in self.__getstate__().items()}
        other.__setstate__({**state, "switch": Switch(self.switch.on)})
        return other

    def remove(self) -> None:
        """Restore the model exactly; a second call does nothing.

        Its class too, once no other model of that class has SAR; what others patched or set meanwhile stays.
        """
        if handle_of(self.base_model) is not self:
            return
        self.switch.on = self._installed = False
        del self.base_model.__dict__[HANDLE_MARK]
        for module in self.base_model.modules():
            _unhook(module)
        unwatch_features(self)
        forget_drafts(self.model)
        self._unmark_layers(self.attention_modules)
        self._take_rule_off(module_of(self.config.weighting))
        if self._implementation() == attention.ATTENTION_NAME:  # not what the user set meanwhile
            self._set_implementation(self._previous_implementation)

    def __enter__(self) -> SARHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def describe(self) -> dict[str, Any]:
        """What this model gets, as plain values; head counts and the head dim of queries are the last layer's."""
        last = inner_attention(self.attention_modules[-1])  # configs may hold them per layer
        heads = self.model.config.get_text_config().num_attention_heads
        parameter = next(self.model.parameters())
        head_dim = getattr(last, "qk_head_dim", None) or last.head_dim  # latent attention names it so
        request = Request(parameter.device, parameter.dtype, head_dim=head_dim)
        return {
            "model_type": self.model.config.model_type,
            "family": self.family.name,
            "attention_layers": self.total_layers,
            "sar_layers": self.sar_layers,
            "num_heads": heads,
            "num_kv_heads": heads // last.num_key_value_groups,
            "head_dim": head_dim,
            "vision_blocks": len(self.vision_blocks),
            "prior_block": self.prior_block,
            "prior_source": self.config.prior_source,
            "backend": choose_backend(self.config.backend, request).name,
            "image_token_ids": self.placeholder_ids,
        }

    # what attention layers call

    def record(self, layer: int, stats: SARStats) -> None:
        """Keep a layer's statistics of the call that is running."""
        self.stats[layer] = stats

    def record_rows(self, layer: int, rows: Tensor) -> None:
        """Keep a layer's attention rows of the call that is running."""
        self.rows[layer] = rows

    def _implementation(self) -> str | None:
        """Name of the attention function that the text model's layers call."""
        return self._attention_config._attn_implementation

    def check_implementation(self) -> None:
        """``RuntimeError`` if the text model's layers call another attention function."""
        name = self._implementation()
        if name != attention.ATTENTION_NAME:
            raise RuntimeError(
                f"SAR: the text model's attention is {name!r}, not {attention.ATTENTION_NAME!r}; nothing would be "
                "re-weighted. set_attn_implementation was called while SAR is applied: handle.remove() (or "
                "remove_sar(model)) keeps that choice, and apply_sar(model, config) after it puts SAR on again"
            )

    def _set_implementation(self, name: str | None) -> None:
        text_config = self.model.config.get_text_config()
        if text_config is self.model.config:
            self.model.set_attn_implementation(name)
        else:
            key = next(k for k in self.model.config.sub_configs if getattr(self.model.config, k, None) is text_config)
            self.model.set_attn_implementation({key: name})
        for config in configs_inside(self.attention_modules):
            config._attn_implementation = name

    def token_norms(self, modality: str, output: Any, patch_norms: list[Tensor], arguments: dict[str, Any]) -> Tensor:
        """(n,) fp32 norms of a modality's visual tokens in placeholder order."""
        features = getattr(output, self.family.features)
        features = features if isinstance(features, Tensor) else torch.cat([f.flatten(0, -2) for f in features])
        if modality == "video" and self.family.whole_video_features is not None:
            features = self.family.whole_video_features(self.base_model, features, arguments)
        if self.config.prior_source == "projected":
            if self.family.projector is not None:
                with torch.no_grad():
                    features = self.base_model.get_submodule(self.family.projector)(features)
            return norms_of(features.flatten(0, -2))
        if len(patch_norms) != 1:
            raise RuntimeError(
                f"SAR: vision block {self.prior_block} ran {len(patch_norms)} times in get_{modality}_features, not "
                f"once; the prior cannot be built. Use prior_source='projected' or describe the {self.family.name} "
                "family's vision blocks"
            )
        token_norms = self.family.token_norms
        if modality == "video" and self.family.video_token_norms is not None:
            token_norms = self.family.video_token_norms
        norms = token_norms(self.base_model, patch_norms[0], arguments)
        expected = features.flatten(0, -2).shape[0]
        if norms.numel() != expected:
            raise RuntimeError(
                f"SAR: the {self.family.name} family maps patches to {norms.numel()} visual tokens, the model made "
                f"{expected}"
            )
        return norms


def _unhook(module: nn.Module) -> None:
    """Take SAR's hooks off a module, whoever put them there: copies that PEFT made have them too."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in HOOKS]:
            del hooks[key]
            for kind in ("forward_pre_hooks_with_kwargs", "forward_hooks_with_kwargs", "forward_hooks_always_called"):
                getattr(module, f"_{kind}").pop(key, None)


def apply_sar(model: nn.Module, config: SARConfig | None = None, *, shards: Shards | None = None) -> SARHandle:
    """Put SAR on a Hugging Face multimodal model, in place.

    Args:
        model: a transformers model of a supported family, PEFT-wrapped or not.
        config: default :class:`~sar_fast.SARConfig`. A ``weighting`` that is a module becomes the submodule
            ``sar_weighting`` of the base model, on the device of its attention layers: give optimizers the model's
            parameters after this call. PEFT freezes what it finds: call it first.
        shards: the ranks that hold a layer's heads between them (:class:`~sar_fast.distributed.Shards`), where another
            library split the model; transformers' own tensor parallelism is found by itself.

    Returns:
        A handle: ``handle.remove()`` restores the model exactly; ``with apply_sar(model):`` does it at the end.

    Raises:
        UnsupportedModelError: the model's family is not known, or lacks something; the message says what.
        ValueError: K exceeds the number of attention layers, SAR is on this model already, or its ``sar_weighting`` is
            somebody else's.
    """
    config = SARConfig() if config is None else config
    if not isinstance(config, SARConfig):
        raise TypeError(f"config must be a SARConfig; got {type(config).__name__}")
    if handle_of(unwrap(model).base_model) is not None:
        raise ValueError("model: SAR is applied to it already; call remove_sar(model) or handle.remove() first")
    return SARHandle(model, config, shards).install()


def remove_sar(model: nn.Module) -> None:
    """Take SAR off a model that ``apply_sar`` put it on."""
    handle = handle_of(unwrap(model).base_model)
    if handle is None:
        raise ValueError("model: SAR is not applied to it")
    handle.remove()


def patch_model_for_sar(
    model: nn.Module,
    use_sar: bool = True,
    sar_activation_layer_k: int = 10,
    sar_beta: float = 0.5,
    **options: Any,
) -> SARHandle | None:
    """The research code's name for :func:`apply_sar`; ``use_sar=False`` is the model without SAR, which is taken off
    where it is applied, and returns None.

    ``options`` are further fields of :class:`~sar_fast.SARConfig`.
    """
    if not isinstance(use_sar, bool):
        raise TypeError(f"use_sar must be a bool; got {type(use_sar).__name__} {use_sar!r}")
    if not use_sar:
        handle = handle_of(unwrap(model).base_model)
        if handle is not None:
            handle.remove()
        return None
    return apply_sar(model, SARConfig(activation_layer_k=sar_activation_layer_k, beta=sar_beta, **options))
