"""Attention with SAR as functions and operators, whatever the backend."""
