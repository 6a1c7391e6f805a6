"""PEFT adapters: LoRA and all others that change a model's layers. Read strictly: each weight has a place, or an error.

Those that learn a prompt or a prefix, or that wait for certain tokens, live in PEFT's wrapper around the model:
``apply_sar`` takes them, commands do not.
"""

from __future__ import annotations

import functools
import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sar_fast.base.weight_files import ADAPTER_WEIGHTS
from sar_fast.lab.io.model_errors import first_line

if TYPE_CHECKING:
    from peft import PeftModel

    from sar_fast.lab.io.model_source import ModelSource

logger = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
NAME = "default"  # PEFT's, of a model's only adapter


def find_file(place: str, *names: str) -> Path | None:
    """The first of some files that a folder or a hub repository has; None also where the hub cannot be reached."""
    if Path(place).is_dir():
        return next((Path(place) / name for name in names if (Path(place) / name).is_file()), None)
    return next((file for name in names if (file := _hub_file(place, name)) is not None), None)


@functools.lru_cache(maxsize=64)
def _hub_file(repository: str, name: str) -> Path | None:
    """A file of the hub, from its cache if it is there. One question without retries: most models have no adapter."""
    from huggingface_hub import file_exists, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repository, name)
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(hf_hub_download(repository, name)) if file_exists(repository, name) else None
    except Exception:  # no such repository, or no network, in its HTTP library's words: what loads the model says so
        return None


def read_config(place: str) -> dict[str, Any] | None:
    """``adapter_config.json`` of a folder or a hub repository as it stands there; None if there is none."""
    path = find_file(place, CONFIG)
    if path is None:
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        config = first_line(error)
    unreadable = config if isinstance(config, str) else f"holds {type(config).__name__}"
    return config if isinstance(config, dict) else {"peft_type": None, "unreadable": unreadable}


def check(adapter: ModelSource, config: dict[str, Any]) -> None:
    """``ModelError`` for an adapter that no command can use; ``config`` is what :func:`read_config` found."""
    try:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PromptLearningConfig
    except ImportError as error:
        raise adapter.error("is an adapter, which needs peft: pip install 'sar_fast[train]'") from error
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        reason = config.get("unreadable", f"peft_type is {kind!r}")
        raise adapter.error("is no adapter that PEFT knows: {config}: {reason}", config=CONFIG, reason=reason)
    if Path(adapter.weights).is_dir() and find_file(adapter.weights, *ADAPTER_WEIGHTS) is None:
        raise adapter.error("is an adapter without weights: it has no {files}", files=" or ".join(ADAPTER_WEIGHTS))
    learned = issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[kind], PromptLearningConfig)
    if learned or kind == "XLORA" or config.get("alora_invocation_tokens"):
        what = "puts learned tokens before the prompt" if learned else "depends on the prompt's words"
        raise adapter.error(
            "is a {kind} adapter that {what}; commands take adapters that change layers and nothing else, such as LoRA",
            kind=kind, what=what,
        )  # fmt: skip


def attach(model: nn.Module, source: ModelSource, trainable: bool = False) -> PeftModel:
    """The model with the adapter's layers in it, inside PEFT's wrapper.

    ``ModelError`` if the adapter does not fit: another architecture or rank, weights that are missing, not finite, or
    that nothing takes. PEFT itself warns about most of these, and goes on.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # errors below
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # PEFT asks by the old name
            wrapped = PeftModel.from_pretrained(model, source.adapter, adapter_name=NAME, is_trainable=trainable)
            _forget(wrapped)
            found = wrapped.load_adapter(source.adapter, NAME, is_trainable=trainable)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except KeyError as error:
        raise source.error("does not fit: the adapter has no weights for {key}", key=error) from error
    except Exception as error:  # a file can be broken in many ways
        raise source.error("does not fit: {reason}", reason=_reason(error)) from error
    if found.unexpected_keys:
        keys = found.unexpected_keys
        raise source.error(
            "does not fit: the model has no place for {key}; {count} of the adapter's weights are left over",
            key=keys[0], count=len(keys),
        )  # fmt: skip
    if absent := [name for name, value in _weights(wrapped).items() if not torch.isfinite(value).all()]:
        raise source.error(
            "does not fit: {key} is not in the adapter, or not finite; {count} weights in all",
            key=absent[0], count=len(absent),
        )  # fmt: skip
    wrapped.peft_config[NAME].base_model_name_or_path = source.weights  # what it is saved with: the base as found now
    logger.info("adapter %s on %s", source.adapter, source.weights)
    return wrapped


def merge(wrapped: PeftModel, source: ModelSource) -> nn.Module:
    """The plain model whose weights have the adapter added; ``ModelError`` for a kind that cannot be, or NaN."""
    kind = wrapped.peft_config[NAME].peft_type.value
    if not hasattr(wrapped, "merge_and_unload"):  # of PEFT's kinds that change inputs, not weights
        raise source.error("cannot be merged ({kind}): PEFT has no merge for this kind", kind=kind)
    try:
        return wrapped.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError) as error:  # how PEFT refuses a layer, and NaN under safe_merge
        raise source.error("cannot be merged ({kind}): {reason}", kind=kind, reason=_reason(error)) from error


def _weights(wrapped: PeftModel) -> dict[str, torch.Tensor]:
    """What a file of this adapter holds: names as in the file -> the tensors in the model."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(wrapped, adapter_name=NAME, save_embedding_layers=False)


def _forget(wrapped: PeftModel) -> None:
    """NaN in place of all of the adapter's weights: what stays NaN after reading was not in the file."""
    for value in _weights(wrapped).values():
        if value.is_floating_point():
            value.fill_(torch.nan)


def _reason(error: Exception) -> str:
    """One line of an error; of those about shapes the first that names a weight."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line.startswith("size mismatch")), first_line(error))
