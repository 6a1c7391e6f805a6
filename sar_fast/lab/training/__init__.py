"""Supervised fine-tuning of multimodal models on the Hugging Face Trainer, with the paper's gradient analysis.

``experiments/train.py`` is the command; ``docs/training.md`` the guide. Needs the extra ``sar_fast[train]``.
"""
