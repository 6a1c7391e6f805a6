"""sar_fast: Semantic Attention Re-weighting for multimodal LLMs at FlashAttention speed.

Every public name is imported on first use, so that ``sar-fast --help`` need not wait for torch. The functions and the
configuration then import torch only, the Hugging Face integration transformers too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from sar_fast import moved as moved  # old names of modules

if TYPE_CHECKING:
    from sar_fast.attention.flash import (
        flash_attn_func,
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_kvpacked_func,
        flash_attn_varlen_qkvpacked_func,
        flash_attn_with_kvcache,
    )
    from sar_fast.attention.functional import sar_attn_func, sar_attn_varlen_func, sar_attn_with_kvcache
    from sar_fast.backends.select import register_backend
    from sar_fast.base.errors import ArgumentError
    from sar_fast.config import SARConfig
    from sar_fast.hf import SARHandle, apply_sar, patch_model_for_sar, register_family, remove_sar
    from sar_fast.hf.module import SARAttention
    from sar_fast.method.prior import semantic_prior
    from sar_fast.method.roles import TokenRoles, token_roles
    from sar_fast.method.state import SARState, SARStats
    from sar_fast.method.visibility import Visibility
    from sar_fast.weighting import register_weighting

__version__ = "0.1.0"

_MODULE_OF = {
    "ArgumentError": "sar_fast.base.errors",
    "SARAttention": "sar_fast.hf.module",
    "SARConfig": "sar_fast.config",
    "SARHandle": "sar_fast.hf",
    "SARState": "sar_fast.method.state",
    "SARStats": "sar_fast.method.state",
    "TokenRoles": "sar_fast.method.roles",
    "Visibility": "sar_fast.method.visibility",
    "apply_sar": "sar_fast.hf",
    "flash_attn_func": "sar_fast.attention.flash",
    "flash_attn_kvpacked_func": "sar_fast.attention.flash",
    "flash_attn_qkvpacked_func": "sar_fast.attention.flash",
    "flash_attn_varlen_func": "sar_fast.attention.flash",
    "flash_attn_varlen_kvpacked_func": "sar_fast.attention.flash",
    "flash_attn_varlen_qkvpacked_func": "sar_fast.attention.flash",
    "flash_attn_with_kvcache": "sar_fast.attention.flash",
    "patch_model_for_sar": "sar_fast.hf",
    "register_backend": "sar_fast.backends.select",
    "register_family": "sar_fast.hf",
    "register_weighting": "sar_fast.weighting",
    "remove_sar": "sar_fast.hf",
    "sar_attn_func": "sar_fast.attention.functional",
    "sar_attn_varlen_func": "sar_fast.attention.functional",
    "sar_attn_with_kvcache": "sar_fast.attention.functional",
    "semantic_prior": "sar_fast.method.prior",
    "token_roles": "sar_fast.method.roles",
}

__all__ = [
    "ArgumentError",
    "SARAttention",
    "SARConfig",
    "SARHandle",
    "SARState",
    "SARStats",
    "TokenRoles",
    "Visibility",
    "apply_sar",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "patch_model_for_sar",
    "register_backend",
    "register_family",
    "register_weighting",
    "remove_sar",
    "sar_attn_func",
    "sar_attn_varlen_func",
    "sar_attn_with_kvcache",
    "semantic_prior",
    "token_roles",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sar_fast' has no attribute {name!r}")
    found = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = found  # looked up once
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
