"""What SAR must know of a model family: where its vision blocks are and which patches feed which visual token.

One declarative entry per family, found by ``config.model_type``; users add their own with :func:`register_family`. The
entries are grouped by how patches become tokens: ``per_patch``, ``square`` images, ``grids`` of any shape, ``tiles``.
"""

from sar_fast.hf.families import grids, per_patch, square, tiles  # noqa: F401  they register their entries
from sar_fast.hf.families.registry import (
    Family,
    UnsupportedModelError,
    find_family,
    known_family,
    packable_model_types,
    refuse_family,
    refused_model_types,
    register_family,
    registered_families,
    supported_model_types,
)

refuse_family(
    "mllama",
    "its cross-attention layers see visual keys only and its self-attention layers none, so no softmax weighs visual "
    "against text keys: there is no semantic alignment SA as docs/method.md defines it",
)

__all__ = [
    "Family",
    "UnsupportedModelError",
    "find_family",
    "known_family",
    "packable_model_types",
    "refuse_family",
    "refused_model_types",
    "register_family",
    "registered_families",
    "supported_model_types",
]
