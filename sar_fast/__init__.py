"""sar_fast: Semantic Attention Re-weighting for multimodal LLMs."""
