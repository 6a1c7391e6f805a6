"""Models by name: a folder, a hub id, the shipped miniature, or an adapter on one of these, for all commands.

A folder with ``adapter_config.json`` is an adapter (:mod:`.adapters`). Its base is the model that the file
names, or the one that is given.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sar_fast.base.weight_files import adapter_weights, whole_weights
from sar_fast.lab.io import adapters
from sar_fast.lab.io.model_errors import ModelError, first_line
from sar_fast.lab.io.model_source import MINIATURE, MINIATURE_PATH, ModelSource

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def find_model(name: str, base_model: str | None = None) -> ModelSource:
    """Where the model ``name`` lies, and its base if it is an adapter. Reads configurations, no weights.

    :class:`ModelError` if there is none, for an adapter that cannot be used, and for ``base_model`` without an adapter.
    """
    place = _place(name, "model")
    config = adapters.read_config(place)
    whole = ModelSource(name, place)
    if config is None:
        if base_model is not None:
            raise ModelError(
                "{base_model} {base!r} has no effect on {model} {name!r}, which is no adapter; leave it out",
                base=base_model, name=name,
            )  # fmt: skip
        if weights := adapter_weights(Path(place)):
            raise whole.error("has {weights} but no {config}", weights=weights[0].name, config=adapters.CONFIG)
        return whole
    if weights := whole_weights(Path(place)):
        raise whole.error(
            "holds a whole model ({weights}) and an adapter ({config}), and either could be meant: give each a folder "
            "of its own",
            weights=weights[0].name, config=adapters.CONFIG,
        )  # fmt: skip
    adapters.check(whole, config)
    if base_model is not None:
        source = ModelSource(name, _place(base_model, "base_model"), place)
    else:
        source = ModelSource(name, _recorded_base(whole, config), place, config.get("revision"))
    if adapters.read_config(source.weights) is not None:
        raise ModelError(
            "{base_model} {base!r} of {model} {name!r} is an adapter itself, needed a whole model: `sar-fast merge` "
            "makes one of it",
            base=source.weights, name=name,
        )  # fmt: skip
    return source


def _place(name: str, argument: str) -> str:
    """Absolute path of a folder, or a hub id."""
    if name == MINIATURE:
        return str(MINIATURE_PATH)
    if is_missing_folder(name):
        raise ModelError("{" + argument + "} {name!r} is no folder on this machine", name=name)
    path = Path(name).expanduser()
    return os.path.abspath(path) if path.is_dir() else name


def _recorded_base(adapter: ModelSource, config: dict[str, Any]) -> str:
    """The base that an adapter's configuration names: a path from here or from the adapter's folder, or a hub id."""
    recorded = config.get("base_model_name_or_path")
    if not isinstance(recorded, str) or not recorded:
        raise adapter.error(
            "is an adapter that does not say on which model (base_model_name_or_path is {recorded!r}): name it with "
            "{base_model}",
            recorded=recorded,
        )
    path = Path(recorded).expanduser()
    for folder in (path, Path(adapter.weights) / path):
        if folder.is_dir():
            return os.path.abspath(folder)
    if recorded == MINIATURE or path.parts[-3:] == MINIATURE_PATH.parts[-3:]:  # of another installation
        return str(MINIATURE_PATH)
    if is_missing_folder(recorded):
        raise adapter.error(
            "is an adapter on {recorded!r}, which is no folder on this machine: say where it is with {base_model}",
            recorded=recorded,
        )
    return recorded


def is_missing_folder(name: str) -> bool:
    """Whether a model's name can only be a folder, and is none: the hub would answer something about repository ids."""
    path = Path(name).expanduser()
    return not path.is_dir() and (path.exists() or name.startswith((".", "~", os.sep)) or name.count("/") > 1)


@contextlib.contextmanager
def _reading(source: ModelSource) -> Iterator[None]:
    """Errors while files of a model are read, in one line."""
    try:
        yield
    except ImportError as error:
        needed = next((p for p in ("torchvision", "sentencepiece", "tiktoken", "timm") if p in str(error)), None)
        reason = f"needs {needed}: pip install {needed}" if needed else f"needs a package: {first_line(error)}"
        build = " (the build that matches your torch)" if needed == "torchvision" else ""
        raise source.error("{reason}", reason=reason + build) from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a folder can be broken in as many ways as there are files in it
        moved = "; if the base is elsewhere, say where with {base_model}" if source.adapter else ""
        reason = first_line(error)
        raise source.error(
            "cannot be loaded as an image-text-to-text model: {reason}" + moved, reason=reason
        ) from error


def load_config(source: ModelSource, **options: Any) -> Any:
    """The whole model's configuration."""
    from transformers import AutoConfig

    with _reading(source):
        return AutoConfig.from_pretrained(source.weights, **source.options, **options)


def load_processor(source: ModelSource, **options: Any) -> Any:
    """The adapter's processor if it has one, else the model's; with the adapter's tokenizer if it has that alone."""
    from transformers import AutoProcessor, AutoTokenizer

    place = processor_place(source)
    with _reading(source):
        if place == source.weights:
            options |= source.options
            if source.adapter is not None and adapters.find_file(source.adapter, "tokenizer_config.json"):
                options["tokenizer"] = AutoTokenizer.from_pretrained(source.adapter)
        if source.is_miniature:
            processor = load_miniature_processor(place, **options)
        else:
            processor = AutoProcessor.from_pretrained(place, **options)
        if "tokenizer" in options:
            processor.chat_template = options["tokenizer"].chat_template or processor.chat_template
        return processor


def load_miniature_processor(path: str | Path = MINIATURE_PATH, **options: Any) -> Any:
    """The miniature's processor in a folder, a ``LlavaProcessor``; ``options`` of ``from_pretrained``."""
    from transformers import AutoTokenizer, LlavaProcessor

    # By its own module: the short name warns, or takes torchvision's version, depending on what is installed.
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    parts = {
        "image_processor": CLIPImageProcessorPil.from_pretrained(path, local_files_only=True),
        "tokenizer": AutoTokenizer.from_pretrained(path, local_files_only=True),
    }
    return LlavaProcessor.from_pretrained(path, **{**parts, **options})


def processor_place(source: ModelSource) -> str:
    """Folder or hub id of the processor: the adapter's if it has one."""
    own = source.adapter is not None and adapters.find_file(source.adapter, *PROCESSOR_FILES)
    return source.adapter if own else source.weights


def load_whole(source: ModelSource, dtype: torch.dtype | str, **options: Any) -> nn.Module:
    """The whole model, an adapter's base without it; ``options`` are those of ``from_pretrained``."""
    from transformers import AutoModelForImageTextToText

    with _reading(source):
        model = AutoModelForImageTextToText.from_pretrained(source.weights, dtype=dtype, **source.options, **options)
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers reads adapters too, however they fit
        raise source.error("is an adapter, which the hub did not say when it was asked; start again")
    return model


def load_model(source: ModelSource, device: str = "auto", dtype: str = "auto") -> tuple[nn.Module, Any]:
    """(model in eval mode, processor). With an adapter the model is the base, whose layers have the adapter in them.

    Args:
        device: ``auto`` (the GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``.
        dtype: ``auto`` (bfloat16 on a GPU, else float32), ``float32``, ``bfloat16`` or ``float16``. An adapter's own
            weights stay in float32 under the latter two, as PEFT keeps them.
    """
    from transformers.utils.logging import disable_progress_bar

    place = choose_device(device)
    number = choose_dtype(dtype, place)
    disable_progress_bar()
    load_config(source)  # the processor asks for five files; without network each waits in turn
    processor = load_processor(source)
    model = load_whole(source, number)
    if source.adapter is not None:
        model = adapters.attach(model, source).get_base_model()
    return model.to(place).eval(), processor


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" can be named, and holds nothing
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without such devices
        raise ModelError("{device} {name!r} cannot be used here: {why}", name=name, why=first_line(error)) from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 on the CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ModelError("{dtype} must be auto, {known}; got {name!r}", known=", ".join(DTYPES), name=name)
    return DTYPES[name]
