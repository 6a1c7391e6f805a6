"""A rule in a folder: ``sar_weighting.json`` says which, ``sar_weighting.safetensors`` holds what it has learned."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sar_fast.base import json_text
from sar_fast.base.errors import ArgumentError
from sar_fast.base.weight_files import give_usual_mode
from sar_fast.base.wording import reason
from sar_fast.method.weighting.protocol import Weighting, name_of
from sar_fast.method.weighting.registry import make_weighting, read_spec, registered, weighting_to_dict
from sar_fast.method.weighting.split import Split, module_of

RULE = "sar_weighting.json"
PARAMETERS = "sar_weighting.safetensors"


def has_parameters(weighting: Weighting | None) -> bool:
    """Whether a rule holds tensors that its options do not say."""
    module = module_of(weighting)
    return module is not None and bool(module.state_dict())


def save_weighting(weighting: Weighting, folder: str | Path) -> None:
    """Write a registered rule into a folder that exists; ``find_weighting(folder)`` reads it.

    Of a :class:`Split` the rule inside. A rule of ``FILE.py:NAME`` is written with the file's absolute path.

    Raises:
        ValueError: the rule has no name; register it.
    """
    folder, rule = Path(folder), weighting.inner if isinstance(weighting, Split) else weighting
    spec = weighting_to_dict(rule)
    path, colon, attribute = spec["name"].rpartition(":")
    if colon:
        spec["name"] = f"{Path(path).resolve()}:{attribute}"
    (folder / RULE).write_text(json_text.dumps(spec, indent=2) + "\n", encoding="utf-8")
    (folder / PARAMETERS).unlink(missing_ok=True)  # of another rule that was here
    if has_parameters(rule):
        # copies: safetensors refuses tensors that share memory
        save_file({name: x.detach().cpu().clone() for name, x in rule.state_dict().items()}, folder / PARAMETERS)
        give_usual_mode(folder / PARAMETERS)


def load_weighting(folder: str | Path, **sizes: int) -> Weighting:
    """The rule that :func:`save_weighting` wrote, with its parameters, in the dtypes that they were saved in.

    The Python file of ``FILE.py:NAME`` is looked for where it was, then in the folder itself.

    Args:
        sizes: what a model says of itself (``layers``, ``heads``), as in ``find_weighting``.

    Raises:
        ValueError: files that are missing or cannot be read, parameters that are missing or left over, a rule for
            another number of layers or heads.
    """
    folder = Path(folder)
    spec = _read_rule(folder)
    options = spec["options"]
    for name, size in sizes.items():
        if options.get(name, size) != size:
            raise ArgumentError(
                "weighting", f"the rule in {folder}, for {options[name]}", f"be for the model's {size} {name}"
            )
    weighting = make_weighting(spec, sizes)
    if has_parameters(weighting):
        module_of(weighting).load_state_dict(_fitting(weighting, folder), assign=True)
    elif (folder / PARAMETERS).is_file():
        raise ValueError(f"weighting: {name_of(weighting)} has no parameters, and {folder} holds some ({PARAMETERS})")
    return weighting


def read_parameters(weighting: Weighting, folder: str | Path) -> None:
    """Read the parameters that a folder holds into a rule, in place; ``ValueError`` where they do not fit."""
    module_of(weighting).load_state_dict(_fitting(weighting, Path(folder)))


def folder_of(spec: Any) -> Path | None:
    """The folder that a spec of ``find_weighting`` names, or None; a registered name is no folder.

    ``ValueError`` for what can only be a folder and is none.
    """
    if not isinstance(spec, (str, os.PathLike)):
        return None
    text = os.fspath(spec)
    if os.path.isdir(text):
        return None if text in registered() else Path(text)
    other = text.lstrip().startswith("{") or ":" in text or text.endswith(".py")
    if os.sep in text and not other and text not in registered():
        raise ArgumentError("weighting", repr(text), "be a name, FILE.py:NAME or a folder on this machine")
    return None


def files_of(spec: str | Mapping[str, Any]) -> list[Path]:
    """The files whose content decides what a spec means: a rule's folder's, or its Python file; none for a name."""
    folder, own = folder_of(spec), []
    if folder is not None:
        spec = _read_rule(folder)
        own = [file for file in (folder / RULE, folder / PARAMETERS) if file.is_file()]
    path, colon, _ = read_spec(spec)[0].rpartition(":")
    return [*own, Path(path)] if colon else own


def _read_rule(folder: Path) -> dict[str, Any]:
    """``{"name": ..., "options": ...}`` of a folder, with the path of a Python file as it is found now."""
    file = folder / RULE
    if not file.is_file():
        raise ValueError(f"weighting: {folder} holds no rule; it has no {RULE}")
    try:
        name, options = read_spec(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"weighting: {file} cannot be read; {reason(error)}") from error
    path, colon, attribute = name.rpartition(":")
    if colon and not Path(path).is_file():
        name = f"{folder / Path(path).name}:{attribute}"
    return {"name": name, "options": options}


def _fitting(weighting: Weighting, folder: Path) -> dict[str, Tensor]:
    """A folder's parameters, each of which has its place in the rule."""
    file, rule = folder / PARAMETERS, name_of(module_of(weighting))
    if not file.is_file():
        raise ValueError(f"weighting: {rule} has parameters, and {folder} holds none; it has no {PARAMETERS}")
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"weighting: {file} cannot be read; {reason(error)}") from error
    wanted = module_of(weighting).state_dict()
    if missing := sorted(wanted.keys() - found.keys()):
        raise ValueError(f"weighting: {file} has no {', '.join(missing)}, which {rule} needs")
    if left := sorted(found.keys() - wanted.keys()):
        raise ValueError(f"weighting: {file} holds {', '.join(left)}, for which {rule} has no place")
    for name, x in found.items():
        if x.shape != wanted[name].shape:
            raise ValueError(
                f"weighting: {name} of {file} has shape {tuple(x.shape)}; {rule} needs {tuple(wanted[name].shape)}"
            )
    return found
