"""The original checkpoints of Grounding DINO and SAM, as transformers' models and as its folders."""

from __future__ import annotations

from pathlib import Path

SUFFIXES = (".pth", ".pt")
SAM_WIDTHS = {"vit_b": 768, "vit_l": 1024, "vit_h": 1280}  # of the types of SAM


def is_original(name: str | Path) -> bool:
    """Whether a model's name is that of an original checkpoint's file, not of a folder or on the hub."""
    return Path(name).suffix in SUFFIXES
