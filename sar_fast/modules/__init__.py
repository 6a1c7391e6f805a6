"""Attention modules with SAR inside."""

from sar_fast.modules.attention import SARAttention

__all__ = ["SARAttention"]
