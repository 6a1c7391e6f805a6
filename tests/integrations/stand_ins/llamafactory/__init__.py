"""LLaMA-Factory's entry points as sar_fast calls them, on the miniature; ``tests/acceptance`` runs the real ones."""
