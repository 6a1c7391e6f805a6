"""Rules by whatever names them: a registered name, a Python file, JSON, or a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from sar_fast.method.weighting.files import folder_of, load_weighting
from sar_fast.method.weighting.protocol import Weighting
from sar_fast.method.weighting.registry import make_weighting


def find_weighting(spec: str | os.PathLike[str] | Mapping[str, Any], **sizes: int) -> Weighting:
    """The rule that a text or a mapping names.

    Args:
        spec: ``NAME`` of a registered rule, ``FILE.py:NAME`` of one in a file, or ``{"name": ..., "options": {...}}``,
            also as JSON, where ``name`` is either; or a folder that a training left, for the rule and what it learned.
        sizes: what a model says of itself (``layers``, ``heads``); given to rules that ask for it and were not told.

    Raises:
        ValueError, TypeError: unknown names, files that cannot be read, options that the rule does not take.
    """
    folder = folder_of(spec)
    return make_weighting(spec, sizes) if folder is None else load_weighting(folder, **sizes)
