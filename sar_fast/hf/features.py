"""The prior's way into a pass: norms that ride on the output of the model's own feature methods.

``generate`` reads pictures before and outside the forward pass, so the methods are wrapped. They are wrapped on the
class, as a replica of a model (DataParallel) has the model's attributes, and must run on itself.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from sar_fast.base.errors import ArgumentError
from sar_fast.config import PriorSource
from sar_fast.hf.forward_pass import running_pass
from sar_fast.hf.running import enter, innermost, leave
from sar_fast.hf.structure import parameters_of
from sar_fast.method.value_checks import check_holds

PREFIX = "sar_"  # of the entries on vision features
HANDLE_MARK = "_sar_handle"  # attribute of base models that SAR is applied to


def handle_of(base_model: nn.Module) -> Any:
    """The handle of SAR on a base model, or None."""
    return base_model.__dict__.get(HANDLE_MARK)


@dataclasses.dataclass
class FeatureCall:
    """A call of a base model's feature method, and the norms (images, patches) that its vision block gave so far."""

    base_model: nn.Module
    patch_norms: list[Tensor] = dataclasses.field(default_factory=list)


_lock = threading.RLock()
_watchers: dict[Callable, weakref.WeakSet] = {}  # wrapped method -> the handles that need it


def watch_features(cls: type, modality: str, handle: Any) -> None:
    """Let ``cls.get_<modality>_features`` put the prior's norms on its output, for instances that SAR is applied to.

    Once per class: other instances pass straight through. A class that inherits a wrapped method shares it.
    """
    with _lock:
        method = getattr(cls, _method_name(modality), None)
        if method is None:
            return
        if method not in _watchers:
            method = _watched(method, modality)
            method._sar_watches = cls, _method_name(modality), cls.__dict__.get(_method_name(modality))
            _watchers[method] = weakref.WeakSet()
            setattr(cls, _method_name(modality), method)
        _watchers[method].add(handle)


def unwatch_features(handle: Any) -> None:
    """Undo :func:`watch_features`: the last handle on a class leaves its methods as they were."""
    with _lock:
        for method in [m for m, handles in _watchers.items() if handle in handles]:
            _watchers[method].discard(handle)
            cls, name, before = method._sar_watches
            if _watchers[method] or cls.__dict__.get(name) is not method:  # somebody else wrapped ours: it stays
                continue
            del _watchers[method]
            if before is None:
                delattr(cls, name)
            else:
                setattr(cls, name, before)


def _method_name(modality: str) -> str:
    return f"get_{modality}_features"


def _watched(original: Callable, modality: str) -> Callable:
    parameters = parameters_of(original)

    @functools.wraps(original)
    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        handle, outer = handle_of(self), innermost(FeatureCall)
        if handle is None or (outer is not None and outer.base_model is self):  # a video call runs the image method
            return original(self, *args, **kwargs)
        if not torch.compiler.is_compiling():
            watch_block(handle.layout.prior_block_of(self))
        enter(call := FeatureCall(self))
        try:
            output = original(self, *args, **kwargs)
        finally:
            leave(call)
        arguments = {**dict(zip(parameters, args)), **kwargs}
        norms = _token_norms(handle, modality, output, call.patch_norms, arguments)
        output[_norms_key(modality, handle.config.prior_source)] = norms
        running = running_pass()
        if running is None or running.handle is not handle:  # the output may come back as mm_encoder_outputs
            output[_mark_key(modality)] = _feature_norms(output, handle.layout.family.features)
        give_features(modality, norms)
        return output

    return watched


def watch_block(block: nn.Module) -> None:
    """Let a vision block tell the feature call that runs it its patches' norms; idempotent.

    Asked at every call: PEFT keeps several copies of a module, of which one runs.
    """
    with _lock:
        if all(hook is not keep_patch_norms for hook in block._forward_hooks.values()):
            block.register_forward_hook(keep_patch_norms)


def keep_patch_norms(module: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of vision blocks."""
    call = innermost(FeatureCall)
    if call is not None:
        call.patch_norms.append(norms_of(output[0] if isinstance(output, tuple) else output))


def give_features(modality: str, norms: Tensor) -> None:
    """Tell the forward pass on this thread's stack, if one runs, the norms of features that it is about to get."""
    running = running_pass()
    if running is not None and modality in running.incoming.placeholders:
        running.receive(modality, norms)


def _token_norms(
    handle: Any, modality: str, output: Any, patch_norms: list[Tensor], arguments: Mapping[str, Any]
) -> Tensor:
    """(n,) fp32 norms of a modality's visual tokens in placeholder order, from ``SARConfig.prior_source``."""
    layout, family = handle.layout, handle.layout.family
    features = getattr(output, family.features)
    features = features if isinstance(features, Tensor) else torch.cat([f.flatten(0, -2) for f in features])
    if modality == "video" and family.whole_video_features is not None:
        features = family.whole_video_features(layout.base_model, features, arguments)
    if handle.config.prior_source == "projected":
        if family.projects_later is not None:
            with torch.no_grad():
                features = layout.base_model.get_submodule(family.projects_later)(features)
        return norms_of(features.flatten(0, -2))
    if len(patch_norms) != 1:
        raise RuntimeError(
            f"SAR: vision block {layout.prior_block} ran {len(patch_norms)} times in get_{modality}_features, not "
            f"once; the prior cannot be built. Use prior_source='projected' or describe the {family.name} family's "
            "vision blocks"
        )
    tokens = features.flatten(0, -2).shape[0]
    return family.norms_of_tokens(layout.base_model, patch_norms[0], arguments, modality, tokens)


def take_off_norms(output: Any) -> None:
    """Leave SAR's entries out of the features that a pass hands out, as it does from transformers 5.24 on.

    Their class has no fields for them: who makes the output anew, as DDP does, would fail.
    """
    for name in ("image_outputs", "video_outputs"):
        features = output.get(name) if isinstance(output, ModelOutput) else None
        if isinstance(features, ModelOutput) and any(key.startswith(PREFIX) for key in features):
            own = {key: value for key, value in features.items() if not key.startswith(PREFIX)}
            output[name] = type(features)(**own)


def _norms_key(modality: str, source: str) -> str:
    return f"{PREFIX}{modality}_norms_{source}"


def _mark_key(modality: str) -> str:
    return f"{PREFIX}{modality}_marks"


def _feature_norms(output: Any, name: str) -> Tensor:
    """(n,) fp32 norms of the features themselves, by which they are known again."""
    features = getattr(output, name)
    parts = [features] if isinstance(features, Tensor) else features
    return torch.cat([norms_of(part).flatten() for part in parts])


def encoded_norms(output: Any, modality: str, handle: Any) -> Tensor:
    """The norms that a watched feature call left on its output; ``ValueError`` if they are not of its features.

    ``generate`` may have repeated the features since, not the norms.
    """
    norms = norms_on(output, modality, handle.config.prior_source)
    if torch.compiler.is_compiling():
        return norms
    if _mark_key(modality) not in output:
        raise ArgumentError(
            f"mm_encoder_outputs[{modality!r}]",
            "one that was encoded for the pass that it came from",
            "be encoded again for another pass",
        )
    marks, now = output[_mark_key(modality)], _feature_norms(output, handle.layout.family.features)
    repeats = max(1, now.numel() // max(1, marks.numel()))
    was = marks.to(now.device).repeat(repeats)
    if repeats > 1:  # in the order of the rows
        was, now = was.sort().values, now.sort().values
    error = (
        f"mm_encoder_outputs[{modality!r}] holds other features than those that its norms were taken of: put together "
        f"from several calls, reordered, or changed. Needed: the output of one get_{modality}_features"
    )
    if was.shape != now.shape:
        raise ValueError(error)
    check_holds(torch.isclose(was, now, rtol=1e-2, equal_nan=True).all(), error)
    return norms


def norms_on(output: Any, modality: str, source: str) -> Tensor:
    """The norms that a watched feature call left on its output, ``SARConfig.prior_source`` being ``source``."""
    key = _norms_key(modality, source)
    if key in output:
        return output[key]
    for other in get_args(PriorSource):
        if _norms_key(modality, other) in output:
            raise ArgumentError(
                f"mm_encoder_outputs[{modality!r}]",
                f"one encoded under prior_source={other!r}",
                f"be encoded under prior_source={source!r}, as SAR is on with; call get_{modality}_features again",
            )
    raise ArgumentError(
        f"mm_encoder_outputs[{modality!r}]",
        (
            "one without the norms that it leaves there (prefill_chunk_size cuts them off: leave it None, since SAR's "
            "weights need the whole prompt)"
        ),
        f"come whole from the model's own get_{modality}_features, called after apply_sar",
    )


def select_norms(output: Any, modality: str, source: str, choose: Callable[[Tensor], Tensor]) -> None:
    """Replace the norms on ``output`` by those that ``choose`` makes of them, as its features were."""
    norms = norms_on(output, modality, source)
    output[_norms_key(modality, source)] = choose(norms)
    output[_mark_key(modality)] = choose(output[_mark_key(modality)])


def norms_of(x: Tensor) -> Tensor:
    """fp32 L2 norms over the last dimension, constants to autograd; fp64 input is not narrowed before."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(x.detach(), dim=-1, dtype=wide).to(torch.float32)
