"""``apply_sar``, ``remove_sar`` and the handle between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sar_fast.backends.select import choose_backend
from sar_fast.cache_state import attach, state_of
from sar_fast.config import SARConfig
from sar_fast.distributed import Shards
from sar_fast.integrations.hf import attention
from sar_fast.integrations.hf.context import SARContext, roles_of_pass, this_thread
from sar_fast.integrations.hf.families import Family, UnsupportedModelError, find_family
from sar_fast.integrations.hf.features import (
    HANDLE_MARK,
    norms_of,
    norms_on,
    parameters_of,
    unwatch_features,
    watch_features,
)
from sar_fast.integrations.hf.packing import find_packing
from sar_fast.integrations.hf.refusals import (
    PIXELS,
    refuse_merged_embeddings,
    refuse_unfilled,
    refuse_unseen_cache,
)
from sar_fast.integrations.hf.speculation import announce_drafts, drafting, forget_drafts, take_drafts
from sar_fast.integrations.hf.split_queries import refuse_unnamed_splits
from sar_fast.roles import TokenRoles
from sar_fast.types import AttentionOptions, SARStats


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
        *wrappers, self.model = _unwrapping(model)
        self.peft_configs = next((w.peft_config for w in wrappers if hasattr(w, "peft_config")), {})
        self.shards = _tensor_parallel_shards(self.model) if shards is None else shards
        self.family: Family = find_family(self.model.config)
        self.base_model = self.model.base_model
        self.attention_modules = find_attention_modules(self.model)
        if self.shards is not None:
            self.shards.check_heads(self.model.config.get_text_config().num_attention_heads)
        self.check_options(config)
        self.vision_blocks = self.family.find_vision_blocks(self.base_model)
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
        self._forward_parameters = parameters_of(type(self.base_model).forward)
        self._hooks: list[Any] = []
        self._previous_implementation: str | None = None
        self.stats: dict[int, SARStats] = {}
        self.rows: dict[int, Tensor] = {}
        self.roles: TokenRoles | None = None
        self.prior: Tensor | None = None

    def check_options(self, config: SARConfig) -> None:
        """Whether this handle can take other options: K must fit, and the prior's source is fixed once SAR is on."""
        total = len(self.attention_modules)
        if config.activation_layer_k > total:
            raise ValueError(
                f"activation_layer_k must be at most the number of attention layers, {total}; got "
                f"{config.activation_layer_k}"
            )
        if config.prior_source != self.config.prior_source:
            raise ValueError(
                f"prior_source is fixed while SAR is applied, {self.config.prior_source!r}; got {config.prior_source!r}"
            )

    def reconfigure(self, config: SARConfig) -> None:
        """Other options for the calls to come; caches filled under other options should not be continued."""
        self.check_options(config)
        self.config = config
        self._mark_layers()

    def _mark_layers(self) -> None:
        for module in self.attention_modules:
            module.__dict__.pop(attention.LAYER_MARK, None)
        for index in self.sar_layers:
            setattr(self.attention_modules[index], attention.LAYER_MARK, index)

    @property
    def sar_layers(self) -> list[int]:
        """Indices of the re-weighted attention layers, counted among layers that attend."""
        total = len(self.attention_modules)
        return list(range(total - self.config.activation_layer_k, total))

    def install(self) -> SARHandle:
        """Put SAR on the model; ``apply_sar`` calls it."""
        attention.register()
        self._previous_implementation = self._implementation()
        self._set_implementation(attention.ATTENTION_NAME)
        self._mark_layers()
        self.base_model.__dict__[HANDLE_MARK] = self
        self._watch_features()
        announce_drafts(self.model)
        decoder_layers = find_decoder_layers(self.model)
        self._hooks = [
            self.base_model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.base_model.register_forward_hook(self._after_forward, always_call=True),
            self.vision_blocks[self.prior_block].register_forward_hook(self._after_vision_block),
            *(layer.register_forward_pre_hook(self._before_layer, with_kwargs=True) for layer in decoder_layers),
        ]
        return self

    def _watch_features(self) -> None:
        for modality in self.placeholder_ids:
            watch_features(type(self.base_model), modality, self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, of a model with SAR on, needs its class's feature methods as the original does."""
        self.__dict__.update(state)
        if self._hooks:
            self._watch_features()

    def remove(self) -> None:
        """Restore the model exactly; a second call does nothing.

        Its class too, once no other model of that class has SAR; what others patched or set meanwhile stays.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.base_model.__dict__.get(HANDLE_MARK) is not self:
            return
        del self.base_model.__dict__[HANDLE_MARK]
        unwatch_features(self)
        forget_drafts(self.model)
        for module in self.attention_modules:
            module.__dict__.pop(attention.LAYER_MARK, None)
        if self._implementation() == attention.ATTENTION_NAME:  # not what the user set meanwhile
            self._set_implementation(self._previous_implementation)

    def __enter__(self) -> SARHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def describe(self) -> dict[str, Any]:
        """What this model gets, as plain values; head counts and the head dim of queries are the last layer's."""
        last = self.attention_modules[-1]  # configs may hold them per layer
        heads = self.model.config.get_text_config().num_attention_heads
        parameter = next(self.model.parameters())
        head_dim = getattr(last, "qk_head_dim", None) or last.head_dim  # latent attention names it so
        options = AttentionOptions(softmax_scale=1.0)
        return {
            "model_type": self.model.config.model_type,
            "family": self.family.name,
            "attention_layers": len(self.attention_modules),
            "sar_layers": self.sar_layers,
            "num_heads": heads,
            "num_kv_heads": heads // last.num_key_value_groups,
            "head_dim": head_dim,
            "vision_blocks": len(self.vision_blocks),
            "prior_block": self.prior_block,
            "prior_source": self.config.prior_source,
            "backend": choose_backend(
                self.config.backend,
                parameter.device,
                parameter.dtype,
                options,
                padded=False,
                masked=False,
                head_dim=head_dim,
            ),
            "image_token_ids": self.placeholder_ids,
        }

    # what attention layers call

    def record(self, layer: int, stats: SARStats) -> None:
        """Keep a layer's statistics of the call that is running."""
        self.stats[layer] = stats

    def record_rows(self, layer: int, rows: Tensor) -> None:
        """Keep a layer's attention rows of the call that is running."""
        self.rows[layer] = rows

    # hooks; bound methods, so that a deep copy of the model gets hooks of its own handle

    def _implementation(self) -> str | None:
        """Name of the attention function that the text model's layers call."""
        return self.attention_modules[-1].config._attn_implementation

    def _check_implementation(self) -> None:
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
            return
        key = next(k for k in self.model.config.sub_configs if getattr(self.model.config, k, None) is text_config)
        self.model.set_attn_implementation({key: name})

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Build the pass's context and send it down with the other keyword arguments."""
        self._check_implementation()
        refuse_unnamed_splits(self.shards)
        if self.config.record or self.config.record_rows != "none":
            self.stats, self.rows = {}, {}  # of this pass alone, also if it re-weights nothing
        given = {**dict(zip(self._forward_parameters, args)), **kwargs}
        cache = given.get("past_key_values")
        past_length = 0 if cache is None else cache.get_seq_length()
        past = state_of(cache)
        if past is not None and past.packed:
            raise ValueError("past_key_values: packed sequences filled this cache; it cannot be continued")
        encoded = given.get("mm_encoder_outputs") or {}
        if encoded and "mm_encoder_outputs" not in self._forward_parameters:
            raise ValueError(
                f"mm_encoder_outputs: {type(module).__name__} of this transformers version would ignore it; pass pixels"
            )
        comes = {m for m, pixels in PIXELS.items() if encoded.get(m) is not None or given.get(pixels) is not None}
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        shape = (ids if ids is not None else embeds).shape[:2]
        device = (ids if ids is not None else embeds).device
        drafts = take_drafts(self.model)
        if self.config.activation_layer_k:
            refuse_unseen_cache(cache, past, past_length, shape[1], self.peft_configs)
            self._check_pictures(module, given, comes, past_length, drafts)
        placeholders = {
            m: _placeholder_mask(module, ids, embeds, token) for m, token in self.placeholder_ids.items() if m in comes
        }
        visual = torch.zeros(shape, dtype=torch.bool, device=device)
        for mask in placeholders.values():
            visual = visual | mask
        attention_mask = given.get("attention_mask")
        if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
            attention_mask = None
        if attention_mask is not None and isinstance(past_length, Tensor) and shape[1] == 1:
            new = past_length.clamp_max(attention_mask.shape[1] - 1).view(1)  # the mask may run over unfilled slots
            attention_mask = attention_mask.index_select(1, new)
        packing = find_packing(given, shape, past_length)
        if packing is not None:
            roles = packing.roles(visual, self.config.text_queries)
        else:
            roles = roles_of_pass(visual, attention_mask, past, self.config)
        context = SARContext(self.config, roles, past_length, placeholders, past, self, packing, self.shards, drafts)
        for modality in placeholders:
            if encoded.get(modality) is not None:
                context.add_norms(modality, norms_on(encoded[modality], modality))
        if placeholders:
            self.roles, self.prior = roles, context.prior
        this_thread.context = context
        if self.family.computes_last_queries_only:
            kwargs["logits_to_keep"] = None
        return args, {**kwargs, "sar_context": context}

    def _check_pictures(
        self, module: nn.Module, given: dict[str, Any], comes: set[str], past_length: int | Tensor, drafts: int
    ) -> None:
        """Placeholders and embeddings of this pass must say where pictures are. Generated tokens are none."""
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        new = (ids if ids is not None else embeds).shape[1]
        if ids is None and not comes:
            refuse_merged_embeddings(given, new, self.peft_configs)
        if new == 1 or (drafts and past_length) or drafting() or torch.compiler.is_compiling():
            return
        filled = {self.placeholder_ids.get(m) for m in comes}  # clips may use the pictures' placeholder
        for modality, token in self.placeholder_ids.items():
            if token not in filled:
                mask = _placeholder_mask(module, ids, embeds, token)[:, : new - drafts]
                refuse_unfilled("inputs_embeds" if ids is None else "input_ids", modality, mask)

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        context = getattr(this_thread, "context", None)
        if context is not None and context.placeholders:
            self.prior = context.prior
        this_thread.context = None

    def _before_layer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Decoder layers see the cache that the text model made itself; its state knows of text-only passes too."""
        context, cache = kwargs.get("sar_context"), kwargs.get("past_key_values")
        if context is None or cache is None or context.cache is not None:
            return
        context.cache = cache
        if context.config.activation_layer_k:
            state = attach(cache, rows=not torch.compiler.is_compiling())
            if not cache.is_compileable:  # a number that changes each step would compile a graph again
                state.length = context.past_length + context.roles.text_mask.shape[1]

    def _after_vision_block(self, module: nn.Module, args: tuple, output: Any) -> None:
        collected = getattr(this_thread, "patch_norms", None)
        if collected is not None and self.config.prior_source == "vision_layer":
            hidden = output[0] if isinstance(output, tuple) else output
            collected.append(norms_of(hidden))

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


def _placeholder_mask(base_model: nn.Module, ids: Tensor | None, embeds: Tensor | None, token: int) -> Tensor:
    """(B, S) bool: where the ids, or the embeddings when only they are given, are placeholder ``token``."""
    if ids is not None:
        return ids == token
    row = base_model.get_input_embeddings()(torch.full((), token, dtype=torch.long, device=embeds.device))
    return (embeds == row).all(-1)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT, DDP and compile wrappers."""
    return _unwrapping(model)[-1]


def _unwrapping(model: nn.Module) -> list[nn.Module]:
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


def find_attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules of the text model, in depth order."""
    modules = [layer.self_attn for layer in find_decoder_layers(model) if hasattr(layer, "self_attn")]
    if not modules:
        raise UnsupportedModelError(f"model: the decoder layers of {type(model).__name__} have no self_attn")
    return modules


def _tensor_parallel_shards(model: nn.Module) -> Shards | None:
    """The ranks that share every layer's heads, where transformers' tp_plan split the model."""
    if getattr(model, "tp_size", None) in (None, 1):
        return None
    return Shards(heads=model._device_mesh["tp"].get_group())


def apply_sar(model: nn.Module, config: SARConfig | None = None, *, shards: Shards | None = None) -> SARHandle:
    """Put SAR on a Hugging Face multimodal model, in place.

    Args:
        model: a transformers model of a supported family, PEFT-wrapped or not.
        config: default :class:`~sar_fast.SARConfig`.
        shards: the ranks that hold a layer's heads between them (:class:`~sar_fast.distributed.Shards`), where another
            library split the model; transformers' own tensor parallelism is found by itself.

    Returns:
        A handle: ``handle.remove()`` restores the model exactly; ``with apply_sar(model):`` does it at the end.

    Raises:
        UnsupportedModelError: the model's family is not known, or lacks something; the message says what.
        ValueError: K exceeds the number of attention layers, or SAR is on this model already.
    """
    config = SARConfig() if config is None else config
    if not isinstance(config, SARConfig):
        raise TypeError(f"config must be a SARConfig; got {type(config).__name__}")
    if HANDLE_MARK in unwrap(model).base_model.__dict__:
        raise ValueError("model: SAR is applied to it already; call remove_sar(model) or handle.remove() first")
    return SARHandle(model, config, shards).install()


def remove_sar(model: nn.Module) -> None:
    """Take SAR off a model that ``apply_sar`` put it on."""
    handle = unwrap(model).base_model.__dict__.get(HANDLE_MARK)
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
        handle = unwrap(model).base_model.__dict__.get(HANDLE_MARK)
        if handle is not None:
            handle.remove()
        return None
    return apply_sar(model, SARConfig(activation_layer_k=sar_activation_layer_k, beta=sar_beta, **options))
