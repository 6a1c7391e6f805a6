"""sar_fast: Semantic Attention Re-weighting for multimodal LLMs at FlashAttention speed.

The functions and the configuration import torch only; the Hugging Face integration is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from sar_fast.config import SARConfig
from sar_fast.flash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from sar_fast.functional import sar_attn_func, sar_attn_varlen_func
from sar_fast.kvcache import sar_attn_with_kvcache
from sar_fast.prior import semantic_prior
from sar_fast.roles import TokenRoles, token_roles
from sar_fast.types import SARState, SARStats

if TYPE_CHECKING:
    from sar_fast.integrations.hf import SARHandle, apply_sar, patch_model_for_sar, remove_sar
    from sar_fast.modules import SARAttention

__version__ = "0.1.0"

_LAZY = {
    "SARHandle": "sar_fast.integrations.hf",
    "apply_sar": "sar_fast.integrations.hf",
    "remove_sar": "sar_fast.integrations.hf",
    "patch_model_for_sar": "sar_fast.integrations.hf",
    "SARAttention": "sar_fast.modules",
}

__all__ = [
    "SARAttention",
    "SARConfig",
    "SARHandle",
    "SARState",
    "SARStats",
    "TokenRoles",
    "apply_sar",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "patch_model_for_sar",
    "remove_sar",
    "sar_attn_func",
    "sar_attn_varlen_func",
    "sar_attn_with_kvcache",
    "semantic_prior",
    "token_roles",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'sar_fast' has no attribute {name!r}")
