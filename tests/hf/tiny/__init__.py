"""Tiny random multimodal models and batches for the integration tests, grouped as the families are."""

from tests.hf.tiny import grids, per_patch, square, tiles
from tests.hf.tiny.base import IMAGE, TAKES_ENCODED, VERSION, VIDEO, VOCAB, Case, tower
from tests.hf.tiny.grids import QWEN_GRIDS, qwen2_5_vl, qwen_batch
from tests.hf.tiny.lacks import ANY_PASS, lack_of
from tests.hf.tiny.per_patch import llava, llava_batch

MODELS = {"llava": (llava, llava_batch), "qwen2_5_vl": (qwen2_5_vl, qwen_batch)}
EVERY_CASE = [case for group in (per_patch, tiles, square, grids) for case in group.CASES]
CASES: dict[str, Case] = {
    case.name: case for case in EVERY_CASE if case.since <= VERSION and not lack_of(ANY_PASS, case.name)
}

__all__ = [
    "CASES",
    "EVERY_CASE",
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
