"""The oracle: SAR attention written out densely, for tests and comparisons (docs/method.md)."""

from sar_fast.method.reference import sar_attention_reference

__all__ = ["sar_attention_reference"]
