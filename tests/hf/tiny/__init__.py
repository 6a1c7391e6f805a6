"""Tiny random multimodal models and batches for the integration tests, grouped as the families are."""

from tests.hf.tiny import grids, per_patch, square, tiles
from tests.hf.tiny.base import IMAGE, TAKES_ENCODED, VERSION, VIDEO, VOCAB, Case, tower
from tests.hf.tiny.grids import QWEN_GRIDS, qwen2_5_vl, qwen_batch
from tests.hf.tiny.per_patch import llava, llava_batch

MODELS = {"llava": (llava, llava_batch), "qwen2_5_vl": (qwen2_5_vl, qwen_batch)}
CASES: dict[str, Case] = {
    c.name: c for group in (per_patch, tiles, square, grids) for c in group.CASES if c.since <= VERSION
}

__all__ = [
    "CASES",
    "IMAGE",
    "MODELS",
    "QWEN_GRIDS",
    "TAKES_ENCODED",
    "VERSION",
    "VIDEO",
    "VOCAB",
    "Case",
    "llava",
    "llava_batch",
    "qwen2_5_vl",
    "qwen_batch",
    "tower",
]
