"""Attention modules with SAR inside."""

from sar_fast.hf.module.attention import SARAttention

__all__ = ["SARAttention"]
