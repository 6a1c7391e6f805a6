"""One prefill under many SAR settings: what the settings have in common is computed once.

Settings differ only from the first re-weighted layer on. So the vision encoder and a trunk of plain layers run once per
batch, and each setting branches off the trunk at its own depth: a tree over K, a fan over beta. Where several prompts
ask about one picture, the trunk itself runs what they begin with once per picture.
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

from sar_fast.base.errors import ArgumentError
from sar_fast.config import SARConfig
from sar_fast.hf.cache_argument import cache_in, with_cache
from sar_fast.hf.features import give_features, norms_on
from sar_fast.hf.handle import SARHandle
from sar_fast.hf.shared_prefix import SharedPrefix
from sar_fast.hf.structure import attention_of, find_decoder_layers

Result = TypeVar("Result")


class _Enough(Exception):
    """Leaves the model's forward where nothing further is needed."""


@dataclasses.dataclass
class _Trunk:
    """The plain layers' results for one batch."""

    embeddings: Tensor | None = None  # [B, S, width]
    outputs: dict[int, Any] = dataclasses.field(default_factory=dict)  # layer index -> that layer's return value
    layers: Callable[[], list[Any]] = list  # the cache's layers
    features: dict[str, tuple[list[Tensor], Any]] = dataclasses.field(
        default_factory=dict
    )  # modality -> pixels, output
    padded: bool = False  # zeros where prompts are padded, instead of what the model makes of padding


def branch_points(handle: SARHandle, configs: Sequence[SARConfig]) -> list[int]:
    """Per setting, the number of decoder layers it shares with plain attention (those below its first re-weighted)."""
    layers, modules = find_decoder_layers(handle.model), handle.layout.attention_modules
    owner = {id(attention_of(layer)): i for i, layer in enumerate(layers)}
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
    prefix: SharedPrefix | None = None,
) -> Iterator[tuple[SARConfig, Result]]:
    """Results of ``call`` under each setting; the settings' common layers run once.

    Args:
        handle: SAR on the model. Its options are changed for each setting, and restored at the end.
        configs: the settings; they must agree in ``prior_source``.
        call: runs the model on one batch, as ``lambda: model(**inputs)`` or ``lambda: model.generate(**inputs)`` do.
            It is entered once more than there are settings: the first time for the shared layers alone. Every other
            prefill starts from those; the later steps of a generation are the model's own.
        prefix: the prompts, whose common prefixes the shared layers run once per picture; ``call`` must run the model
            on ``prefix.inputs()``, and read nothing but the last token's outputs (the others are NaN), as ``generate``
            and ``logits_to_keep=1`` do.

    Yields:
        (config, result), in the order of ``configs``. Equal to separate runs; with ``prefix`` up to rounding.

    Raises:
        ValueError: ``call`` ran on other inputs than the first time, or uses a cache that is not dynamic.
    """
    if not configs:
        raise ArgumentError("configs", "none", "hold at least one SARConfig")
    if getattr(handle.model.config.get_text_config(), "num_kv_shared_layers", 0):
        raise ArgumentError(
            "model",
            "one whose last layers read those of earlier ones (num_kv_shared_layers)",
            (
                "have keys and values of its own in every layer, or settings cannot branch between them; run them "
                "one by one"
            ),
        )
    for config in configs:
        handle.check_options(config)
    before, starts = handle.config, branch_points(handle, configs)
    try:
        handle.reconfigure(configs[0].replace(activation_layer_k=0))
        shares = prefix is not None and prefix.shares
        trunk = _prefix_trunk(handle, prefix, set(starts)) if shares else _run_trunk(handle, call, set(starts))
        for config, start in zip(configs, starts):
            handle.reconfigure(config)
            with _branch(handle, trunk, start), _last_layer_answers(handle) if shares else contextlib.nullcontext():
                result = call()
            yield config, result
    finally:
        handle.reconfigure(before)


def _prefix_trunk(handle: SARHandle, prefix: SharedPrefix, starts: set[int]) -> _Trunk:
    """As :func:`_run_trunk` on the whole prompts, from one pass over the prefixes and one over the remainders."""
    if max(starts) == 0:
        return _Trunk()
    layers = find_decoder_layers(handle.model)
    with _keys_alone(layers[-1]) if max(starts) == len(layers) else contextlib.nullcontext():
        first = _run_trunk(handle, prefix.first, starts)
    second = _run_trunk(handle, prefix.second, starts, continues=True)

    def whole(index: int) -> Any:
        one, other = first.outputs[index], second.outputs[index]
        states = prefix.whole(*(x[0] if isinstance(x, tuple) else x for x in (one, other)))
        return (states,) if isinstance(other, tuple) else states

    embeddings = prefix.whole(first.embeddings, second.embeddings)
    return _Trunk(embeddings, {i: whole(i) for i in first.outputs}, functools.cache(prefix.whole_cache), padded=True)


def _run_trunk(handle: SARHandle, call: Callable[[], Any], starts: set[int], *, continues: bool = False) -> _Trunk:
    """Enter ``call`` up to the last layer that settings share: positions, masks and cache are the call's own."""
    layers = find_decoder_layers(handle.model)
    trunk, end = _Trunk(), max(starts)

    def keep_embeddings(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        cache = cache_in(kwargs)
        trunk.embeddings, trunk.layers = _hidden_states(args, kwargs), lambda: cache.layers
        if cache is not None and cache.get_seq_length() > 0 and not continues:
            raise ArgumentError(
                "call", "cached positions", "start on an empty cache: settings share a prompt, not a conversation"
            )
        if end == 0:
            raise _Enough

    def keep_output(index: int, module: nn.Module, args: tuple, output: Any) -> None:
        trunk.outputs[index] = output
        if index == end - 1:
            raise _Enough

    hooks = [layers[0].register_forward_pre_hook(keep_embeddings, with_kwargs=True)]
    hooks += [layers[i - 1].register_forward_hook(functools.partial(keep_output, i - 1)) for i in starts if i]
    try:
        with _shared_features(handle, trunk.features), contextlib.suppress(_Enough):
            call()
    finally:
        for hook in hooks:
            hook.remove()
    if trunk.embeddings is None:
        raise ArgumentError("call", "a run of none of its decoder layers", "run the model that the handle belongs to")
    return trunk


@contextlib.contextmanager
def _shared_features(handle: SARHandle, features: dict[str, tuple[list[Tensor], Any]]) -> Iterator[None]:
    """Vision encoders run at most once in here; later calls get the same output, norms included."""
    base = handle.layout.base_model

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
                raise ArgumentError("call", f"another {modality}", "run the model on the same inputs every time")
            give_features(modality, norms_on(output, modality, handle.config.prior_source))
            return copy.copy(output)

        return get_features

    names = {m: f"get_{m}_features" for m in handle.layout.placeholder_ids if hasattr(base, f"get_{m}_features")}
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
            _check_same_batch(hidden, trunk)
            state["cache"] = cache_in(kwargs)
        if index == start - 1:
            return trunk.outputs[index]
        return (hidden,) if isinstance(trunk.outputs[start - 1], tuple) else hidden

    def prefill_done(module: nn.Module, args: tuple, output: Any) -> None:
        if state["prefill"]:
            state["prefill"] = False
            _graft(state["cache"], trunk, start)

    patched = [(layer, layer.__dict__.get("forward")) for layer in layers[:start]]
    for index, (layer, _) in enumerate(patched):
        layer.__dict__["forward"] = functools.partial(skip, index, layer.forward)
    hook = handle.layout.base_model.register_forward_hook(prefill_done)
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


def _check_same_batch(hidden: Tensor, trunk: _Trunk) -> None:
    expected = trunk.embeddings
    same = hidden.shape == expected.shape
    if same and not torch.equal(hidden, expected):
        # the trunk of a shared prefix has zeros where prompts are padded
        same = trunk.padded and bool(((hidden == expected) | (expected == 0)).all())
    if not same:
        raise ArgumentError(
            "call",
            f"{tuple(hidden.shape)} in its first layer, {tuple(expected.shape)} in the shared ones"
            + (", with other values" if hidden.shape == expected.shape else ""),
            "run the model on the same inputs every time",
        )


def _graft(cache: Cache | None, trunk: _Trunk, start: int) -> None:
    """Give a branch's cache the keys and values of the layers that it skipped."""
    if cache is None:
        return
    if cache.is_compileable:
        raise ArgumentError("call", type(cache).__name__, "use a dynamic cache, which grows")
    for index, shared in enumerate(trunk.layers()[:start] if start else ()):
        if trunk.padded:  # every layer keeps what its kind keeps: some a window
            cache.update(shared.keys, shared.values, index)
            continue
        # plain dynamic layers grow by concatenation and never write into shared tensors; others may
        concatenates = type(shared) in (DynamicLayer, DynamicSlidingWindowLayer)
        cache.layers[index : index + 1] = [copy.copy(shared) if concatenates else copy.deepcopy(shared)]


class _KeptKeys:
    """Stands for a layer's cache in two calls: the first computes keys and values of all positions and ends there, the
    second attends to them."""

    def __init__(self, cache: Cache | None) -> None:
        self._cache, self._kept = cache, None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._kept is None:
            cache = self._cache
            self._kept = (keys, values) if cache is None else cache.update(keys, values, *args, **kwargs)
            raise _Enough
        return self._kept

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


@contextlib.contextmanager
def _keys_alone(layer: nn.Module) -> Iterator[None]:
    """In here a decoder layer computes its input's keys and values, for those who continue it; its output is NaN."""
    if "forward" in layer.__dict__:  # an offloading wrapper brings the weights and takes them away: one whole call
        yield
        return
    original = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        with contextlib.suppress(_Enough):
            original(*args, **with_cache(kwargs, _KeptKeys(cache_in(kwargs))))
        return torch.full_like(_hidden_states(args, kwargs), torch.nan)

    layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        del layer.__dict__["forward"]


@contextlib.contextmanager
def _last_layer_answers(handle: SARHandle) -> Iterator[None]:
    """In here the last layer of a prefill computes keys and values of whole prompts, but only their text queries.

    Nothing else is read of its other positions, whose output is NaN. Decode steps run as they are.
    """
    layer = find_decoder_layers(handle.model)[-1]
    patched = layer.__dict__.get("forward")
    original = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, running = _hidden_states(args, kwargs), kwargs["sar_context"]
        asked = running.roles.text_mask.any(0).nonzero()  # columns that some row's T has
        needed = hidden.shape[1] - int(asked[0]) if len(asked) else 1
        wrapped = patched is not None  # an offloading wrapper brings the weights and takes them away: one whole call
        if wrapped or not running.brings_pictures or needed == hidden.shape[1]:
            return original(*args, **kwargs)
        kwargs = with_cache(kwargs, _KeptKeys(cache_in(kwargs)))
        kwargs.pop("hidden_states", None)
        with contextlib.suppress(_Enough):
            original(hidden, *args[1:], **kwargs)
        kwargs["sar_context"] = running.but(queries=needed)
        output = original(hidden[:, -needed:], *args[1:], **_last_positions(kwargs, needed))
        answered = output[0] if isinstance(output, tuple) else output
        whole = torch.full_like(hidden, torch.nan)
        whole[:, -needed:] = answered
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        del layer.__dict__["forward"]
        if patched is not None:
            layer.__dict__["forward"] = patched


def _last_positions(kwargs: dict[str, Any], count: int) -> dict[str, Any]:
    """A decoder layer's keyword arguments for its last ``count`` positions alone."""
    cut = dict(kwargs)
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.dim() == 4:  # (B, 1, S, keys); a (B, keys) mask is aligned to the last query
        cut["attention_mask"] = mask[:, :, -count:]
    for name in ("position_ids", "cache_position"):
        if kwargs.get(name) is not None:
            cut[name] = kwargs[name][..., -count:]
    rotary = kwargs.get("position_embeddings")  # [..., S, D], together or as (cos, sin)
    if rotary is not None:
        parts = [x[..., -count:, :] for x in (rotary if isinstance(rotary, tuple) else (rotary,))]
        cut["position_embeddings"] = tuple(parts) if isinstance(rotary, tuple) else parts[0]
    return cut
