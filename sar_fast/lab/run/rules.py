"""A rule of the command line (``--sar_weighting``): what results keep of it, and how folders and tables name it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sar_fast.config import PAPER_OPTIONS, SARConfig
from sar_fast.lab.io.stamps import file_stamp
from sar_fast.method.weighting.registry import is_registered

PLAIN = r"[a-z0-9][a-z0-9_.]{0,39}"  # names that are their own folder's; beta is the word for other settings
LONGEST = 40  # characters


def rule_settings(spec: str | Mapping[str, Any], config: SARConfig) -> dict[str, Any]:
    """``config.to_dict()`` of a config with the rule that ``spec`` names, and what tells it from others of that name.

    A file goes by its last name, as it may move; ``file`` is a hash of its bytes, ``state`` one of parameters.
    """
    values = config.to_dict()
    rule = values["weighting"]
    file = next(filter(None, map(_file_of, (_parts(spec)[0], rule["name"]))), None)
    if file is not None:
        rule |= {"name": Path(rule["name"]).name, "file": file_stamp(file)}
    if isinstance(config.weighting, nn.Module) and (state := config.weighting.state_dict()):
        rule |= {"state": state_stamp(state)}
    return values


def config_settings(config: SARConfig, lasting: bool = True) -> dict[str, Any]:
    """:func:`rule_settings` of a config whose rule goes by the name that it is registered under.

    One that is not registered is an ``ArgumentError``; for settings that no folder keeps (``lasting`` False) it goes by
    its ``repr``.
    """
    if not (lasting or config.weighting is None or is_registered(config.weighting)):
        values = config.replace(weighting=None).to_dict()
        return {**{n: v for n, v in values.items() if n not in PAPER_OPTIONS}, "weighting": repr(config.weighting)}
    values = config.to_dict()
    return values if config.weighting is None else rule_settings(values["weighting"], config)


def rule_label(spec: str | Mapping[str, Any]) -> str:
    """A rule as tables, figures and pages name it: ``fixed(c=[0.5, 2.0])``, ``rules.py:mine``."""
    name, options = _parts(spec)
    shown = ", ".join(f"{n}={json.dumps(v)}" for n, v in options.items())
    label = Path(name).name + (f"({shown})" if options else "")
    return label if len(label) <= LONGEST else f"{label[:LONGEST]}..."


def rule_slug(spec: str | Mapping[str, Any]) -> str:
    """A file name for a rule's results, another one for every spec: a plain name itself, else words and a hash."""
    name, options = _parts(spec)
    if not options and re.fullmatch(PLAIN, name) and not name.startswith("beta"):
        return name
    words = re.sub(r"[^A-Za-z0-9_.]+", "-", rule_label(spec))[:LONGEST].strip("-.")
    return f"{words}-{hashlib.sha256(canonical(spec).encode()).hexdigest()[:8]}"


def canonical(spec: str | Mapping[str, Any]) -> str:
    """The same text for the same rule, however its JSON is spaced and ordered."""
    name, options = _parts(spec)
    return json.dumps([name, options], sort_keys=True)


def _parts(spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name, options) of a spec that ``find_weighting`` takes."""
    if isinstance(spec, str):
        spec = json.loads(spec) if spec.lstrip().startswith("{") else {"name": spec}
    return spec["name"], spec.get("options") or {}


def _file_of(name: str) -> Path | None:
    """The file of a rule that is called ``FILE.py:NAME``; None for others."""
    path, colon, _ = name.rpartition(":")
    return Path(path) if colon and Path(path).is_file() else None


def state_stamp(state: Mapping[str, Tensor]) -> str:
    """A short hash of a module's ``state_dict()``: names, shapes, dtypes and every byte."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
