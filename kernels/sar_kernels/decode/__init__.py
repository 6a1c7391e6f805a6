"""Attention of new queries over a cache."""
