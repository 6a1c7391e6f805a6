"""Triton kernels of SAR attention (torch and triton only)."""
