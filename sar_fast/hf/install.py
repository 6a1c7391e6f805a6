"""What SAR changes in a model, and its exact removal: marks, hooks, the attention function, class methods, the rule."""

from __future__ import annotations

from typing import Any

from torch import nn

from sar_fast.hf import attention, flow, rule_module
from sar_fast.hf.features import (
    HANDLE_MARK,
    keep_patch_norms,
    unwatch_features,
    watch_block,
    watch_features,
)
from sar_fast.hf.speculation import announce_drafts, forget_drafts
from sar_fast.hf.structure import Layout, configs_inside, find_decoder_layers
from sar_fast.method.weighting.split import module_of

HOOKS = (flow.before_forward, flow.after_forward, flow.before_layer, keep_patch_norms)


def put_on(handle: Any) -> str | None:
    """Put SAR on the model of a handle; the name of the attention function before."""
    layout = handle.layout
    swap_rules(layout, None, module_of(handle.config.weighting))
    watch_class(handle)
    before = layout.attention_config._attn_implementation
    _set_implementation(layout, attention.ATTENTION_NAME)
    mark_layers(layout, handle.sar_layers)
    layout.base_model.__dict__[HANDLE_MARK] = handle
    announce_drafts(layout.model)
    layout.base_model.register_forward_pre_hook(flow.before_forward, with_kwargs=True)
    layout.base_model.register_forward_hook(flow.after_forward, with_kwargs=True, always_call=True)
    watch_block(layout.prior_block_of(layout.base_model))
    for layer in find_decoder_layers(layout.model):
        layer.register_forward_pre_hook(flow.before_layer, with_kwargs=True)
    return before


def take_off(handle: Any, before: str | None) -> None:
    """Undo :func:`put_on`, which returned ``before``; what others patched or set meanwhile stays."""
    layout = handle.layout
    del layout.base_model.__dict__[HANDLE_MARK]
    for module in layout.base_model.modules():
        _unhook(module)
    unwatch_features(handle)
    forget_drafts(layout.model)
    mark_layers(layout, [])
    swap_rules(layout, module_of(handle.config.weighting), None)
    if layout.attention_config._attn_implementation == attention.ATTENTION_NAME:  # not what the user set meanwhile
        _set_implementation(layout, before)


def watch_class(handle: Any) -> None:
    """What the model's class and the process need while it has SAR, also where a copy of it is made or unpickled."""
    attention.register()
    for modality in handle.layout.placeholder_ids:
        watch_features(type(handle.layout.base_model), modality, handle)


def mark_layers(layout: Layout, layers: list[int]) -> None:
    """Let these attention layers alone re-weight heads."""
    modules = layout.attention_modules
    for attending in modules:
        for module in attending.modules():
            module.__dict__.pop(attention.LAYER_MARK, None)
    for index in layers:
        for module in modules[index].modules():  # what attends may be inside a wrapper, or be several copies
            module.__dict__[attention.LAYER_MARK] = index


def swap_rules(layout: Layout, before: nn.Module | None, after: nn.Module | None) -> None:
    """Let a rule that is a module take the place of another as a part of the model; None = none."""
    if before is after:
        return
    if before is not None:
        rule_module.take_off(layout.model, before)
    if after is not None:
        rule_module.put_on(layout.model, after, like=layout.attention_modules[-1])


def _set_implementation(layout: Layout, name: str | None) -> None:
    model = layout.model
    text_config = model.config.get_text_config()
    if text_config is model.config:
        model.set_attn_implementation(name)
    else:
        key = next(k for k in model.config.sub_configs if getattr(model.config, k, None) is text_config)
        model.set_attn_implementation({key: name})
    for config in configs_inside(layout.attention_modules):
        config._attn_implementation = name


def _unhook(module: nn.Module) -> None:
    """Take SAR's hooks off a module, whoever put them there: copies that PEFT made have them too."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in HOOKS]:
            del hooks[key]
            for kind in ("forward_pre_hooks_with_kwargs", "forward_hooks_with_kwargs", "forward_hooks_always_called"):
                getattr(module, f"_{kind}").pop(key, None)
