"""One prefill under many SAR settings: what the settings have in common is computed once.

Settings differ only from the first re-weighted layer on. So the vision encoder and a trunk of plain layers run once per
batch, and each setting branches off the trunk at its own depth: a tree over K, a fan over beta.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sar_fast.config import SARConfig
from sar_fast.integrations.hf.apply import SARHandle, find_decoder_layers, give_features

Result = TypeVar("Result")


class _TrunkEnds(Exception):
    """Leaves the model's forward where the last branch begins: no further layer and no output head is needed."""


@dataclasses.dataclass
class _Trunk:
    """The plain layers' results for one batch."""

    embeddings: Tensor | None = None  # [B, S, width]
    outputs: dict[int, Any] = dataclasses.field(default_factory=dict)  # layer index -> that layer's return value
    cache: Cache | None = None
    features: dict[str, tuple[list[Tensor], Any]] = dataclasses.field(
        default_factory=dict
    )  # modality -> pixels, output


def branch_points(handle: SARHandle, configs: Sequence[SARConfig]) -> list[int]:
    """Per setting, the number of decoder layers it shares with plain attention (those below its first re-weighted)."""
    layers, modules = find_decoder_layers(handle.model), handle.attention_modules
    owner = {id(layer.self_attn): i for i, layer in enumerate(layers) if hasattr(layer, "self_attn")}
    return [
        owner[id(modules[-config.activation_layer_k])] if config.activation_layer_k else len(layers)
        for config in configs
    ]


def layer_passes(handle: SARHandle, configs: Sequence[SARConfig]) -> tuple[int, int]:
    """Decoder layers that one batch passes: (branched, in separate runs)."""
    total, starts = len(find_decoder_layers(handle.model)), branch_points(handle, configs)
    return max(starts) + sum(total - start for start in starts), total * len(configs)


@torch.no_grad()
def run_branches(
    handle: SARHandle,
    configs: Sequence[SARConfig],
    call: Callable[[], Result],
) -> Iterator[tuple[SARConfig, Result]]:
    """Results of ``call`` under each setting; the settings' common layers run once.

    Args:
        handle: SAR on the model. Its options are changed for each setting, and restored at the end.
        configs: the settings; they must agree in ``prior_source``.
        call: runs the model on one batch, as ``lambda: model(**inputs)`` or ``lambda: model.generate(**inputs)`` do.
            It is entered once more than there are settings: the first time for the shared layers alone. Every other
            prefill starts from those; the later steps of a generation are the model's own.

    Yields:
        (config, result), in the order of ``configs``. Equal to separate runs.

    Raises:
        ValueError: ``call`` ran on other inputs than the first time, or uses a cache that is not dynamic.
    """
    if not configs:
        raise ValueError("configs must hold at least one SARConfig; got none")
    if getattr(handle.model.config.get_text_config(), "num_kv_shared_layers", 0):
        raise ValueError(
            "model: its last layers read the keys and values of earlier ones (num_kv_shared_layers), so settings "
            "cannot branch between them; run the settings one by one"
        )
    for config in configs:
        handle.check_options(config)
    before, starts = handle.config, branch_points(handle, configs)
    try:
        handle.reconfigure(configs[0].replace(activation_layer_k=0))
        trunk = _run_trunk(handle, call, set(starts))
        for config, start in zip(configs, starts):
            handle.reconfigure(config)
            with _branch(handle, trunk, start):
                result = call()
            yield config, result
    finally:
        handle.reconfigure(before)


def _run_trunk(handle: SARHandle, call: Callable[[], Any], starts: set[int]) -> _Trunk:
    """Enter ``call`` up to the last layer that settings share: positions, masks and cache are the call's own."""
    layers = find_decoder_layers(handle.model)
    trunk, end = _Trunk(), max(starts)

    def keep_embeddings(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        trunk.embeddings, trunk.cache = _hidden_states(args, kwargs), kwargs.get("past_key_values")
        if trunk.cache is not None and trunk.cache.get_seq_length() > 0:
            raise ValueError("call must start on an empty cache: settings share a prompt, not a conversation")
        if end == 0:
            raise _TrunkEnds

    def keep_output(index: int, module: nn.Module, args: tuple, output: Any) -> None:
        trunk.outputs[index] = output
        if index == end - 1:
            raise _TrunkEnds

    hooks = [layers[0].register_forward_pre_hook(keep_embeddings, with_kwargs=True)]
    hooks += [layers[i - 1].register_forward_hook(functools.partial(keep_output, i - 1)) for i in starts if i]
    try:
        with _shared_features(handle, trunk.features), contextlib.suppress(_TrunkEnds):
            call()
    finally:
        for hook in hooks:
            hook.remove()
    if trunk.embeddings is None:
        raise ValueError("call must run the model that the handle belongs to; none of its decoder layers ran")
    return trunk


@contextlib.contextmanager
def _shared_features(handle: SARHandle, features: dict[str, tuple[list[Tensor], Any]]) -> Iterator[None]:
    """Vision encoders run at most once in here; later calls get the same output, norms included."""
    base = handle.base_model

    def remembered(modality: str, original: Callable) -> Callable:
        @functools.wraps(original)  # generate() filters its arguments by the signature
        def get_features(*args: Any, **kwargs: Any) -> Any:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if modality not in features:
                output = original(*args, **kwargs)
                features[modality] = given, copy.copy(output)  # generate() repeats features on the object it gets
                return output
            first, output = features[modality]
            if len(first) != len(given) or not all(map(torch.equal, first, given)):
                raise ValueError(
                    f"call must run the model on the same inputs every time; it brought another {modality}"
                )
            give_features(modality, output)
            return copy.copy(output)

        return get_features

    names = {m: f"get_{m}_features" for m in handle.placeholder_ids if hasattr(base, f"get_{m}_features")}
    for modality, name in names.items():
        base.__dict__[name] = remembered(modality, getattr(base, name))
    try:
        yield
    finally:
        for name in names.values():
            del base.__dict__[name]


@contextlib.contextmanager
def _branch(handle: SARHandle, trunk: _Trunk, start: int) -> Iterator[None]:
    """In here the model's first pass takes the trunk's word for its layers below ``start``."""
    layers = find_decoder_layers(handle.model)
    state = {"prefill": True, "cache": None}

    def skip(index: int, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        if not state["prefill"]:
            return forward(*args, **kwargs)
        hidden = _hidden_states(args, kwargs)
        if index == 0:
            _check_same_batch(hidden, trunk.embeddings)
            state["cache"] = kwargs.get("past_key_values")
        if index == start - 1:
            return trunk.outputs[index]
        return (hidden,) if isinstance(trunk.outputs[start - 1], tuple) else hidden

    def prefill_done(module: nn.Module, args: tuple, output: Any) -> None:
        if state["prefill"]:
            state["prefill"] = False
            _graft(state["cache"], trunk.cache, start)

    patched = [(layer, layer.__dict__.get("forward")) for layer in layers[:start]]
    for index, (layer, _) in enumerate(patched):
        layer.__dict__["forward"] = functools.partial(skip, index, layer.forward)
    hook = handle.base_model.register_forward_hook(prefill_done)
    try:
        with _shared_features(handle, trunk.features):
            yield
    finally:
        hook.remove()
        for layer, forward in patched:
            del layer.__dict__["forward"]
            if forward is not None:  # an offloading wrapper's
                layer.__dict__["forward"] = forward


def _hidden_states(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _check_same_batch(hidden: Tensor, trunk: Tensor) -> None:
    if hidden.shape != trunk.shape or not torch.equal(hidden, trunk):
        raise ValueError(
            f"call must run the model on the same inputs every time; its first layer got {tuple(hidden.shape)}, the "
            f"shared layers {tuple(trunk.shape)}" + (", with other values" if hidden.shape == trunk.shape else "")
        )


def _graft(cache: Cache | None, trunk: Cache | None, start: int) -> None:
    """Give a branch's cache the keys and values of the layers that it skipped."""
    if cache is None:
        return
    if cache.is_compileable:
        raise ValueError(f"call must use a dynamic cache, which grows; got {type(cache).__name__}")
    for index, shared in enumerate(trunk.layers[:start]):
        # plain dynamic layers grow by concatenation and never write into shared tensors; others may
        concatenates = type(shared) in (DynamicLayer, DynamicSlidingWindowLayer)
        cache.layers[index : index + 1] = [copy.copy(shared) if concatenates else copy.deepcopy(shared)]
