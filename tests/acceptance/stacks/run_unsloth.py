"""Unsloth without a GPU: the classes that its compiler writes, and its Gemma 3 attention, under SAR.

Its loader of multimodal models refuses a CPU, so the compiler, which that loader calls, is called here. ``FOLDER`` must
be the working directory: the compiler writes there.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch
import unsloth  # noqa: F401  before transformers, as it asks
from torch import nn
from unsloth_zoo.compiler import unsloth_compile_transformers
from unsloth_zoo.temporary_patches import TEMPORARY_PATCHES

from sar_fast import SARConfig, apply_sar
from tests.acceptance.stacks.common import report
from tests.hf.tiny import CASES

TYPES = {"llava": ("llava", "llama", "clip"), "qwen3_vl": ("qwen3_vl",), "qwen2_5_vl": ("qwen2_5_vl",)}


def outputs(model: nn.Module, batch: dict[str, torch.Tensor], beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits without SAR and with it."""
    with torch.no_grad():
        plain = model(**batch).logits
        with apply_sar(model, SARConfig(activation_layer_k=3, beta=beta)):
            return plain, model(**batch).logits


def compare_rewritten(name: str) -> None:
    """Whether SAR moves a model of classes that Unsloth's compiler wrote as it moves the original."""
    case = CASES[name]
    before, wanted = outputs(case.make(), case.batch([1, 2]), case.beta)
    for kind in TYPES[name]:
        unsloth_compile_transformers(kind, supports_sdpa=[True])
    model = case.make()
    _, got = outputs(model, case.batch([1, 2]), case.beta)
    error, effect = ((x - y).abs().max().item() for x, y in ((got, wanted), (wanted, before)))
    attention = type(model.get_decoder().layers[-1].self_attn).__module__
    report(f"compiler, {name}", error <= 1e-4 * effect, max_difference=error, effect=effect, attention=attention)


def refuse_gemma3() -> None:
    """Whether SAR on its Gemma 3, whose attention calls PyTorch's by itself, ends with an error that names it."""
    for patch in TEMPORARY_PATCHES:
        patch()
    case = CASES["gemma3"]
    try:
        outputs(case.make(), case.batch([1, 2]), case.beta)
    except RuntimeError as error:
        said = "".join(traceback.format_exception(error))
        words = "this attention's forward is unsloth_zoo.temporary_patches.gemma"
        report("Gemma 3 attention of its own", words in said, error=words)
    else:
        report("Gemma 3 attention of its own", False, error="none")


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(exist_ok=True)
    for model in TYPES:
        compare_rewritten(model)
    refuse_gemma3()
