"""Attention of whole sequences, batched or packed: forward, statistics, backward."""
