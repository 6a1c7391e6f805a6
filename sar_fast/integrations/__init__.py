"""Integrations of SAR with model libraries."""
