"""Training steps side by side: SAR off, on, and in the research code's eager formulation."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError
from sar_fast.config import SARConfig
from sar_fast.hf import apply_sar
from sar_fast.lab.measure.eager import EagerSAR, eager_attention
from sar_fast.lab.measure.timing import seconds_now
from sar_fast.lab.training.throughput import TrainingFlops, peak_memory

MODES = ("sar off", "sar on", "eager")
TELLING = 512  # tokens, from which on the miniature's layers take twice as long in the eager formulation as with SAR


def training_steps(
    model: nn.Module, inputs: Mapping[str, Tensor], config: SARConfig, repeats: int, peak_flops: float | None = None
) -> list[dict[str, Any]]:
    """Time and memory of forward, backward and an AdamW step in each mode.

    Rounds visit all modes in turn, so that a slow spell of the machine hits all alike; a round that is not counted
    comes first. The weights are the same for every step: the learning rate is 0.

    Args:
        model: an image-text-to-text model on its device, in training mode, with trainable parameters.
        inputs: one sample with labels, as the eager formulation takes no batch.
        config: SAR's options in the modes that have it.
        repeats: rounds, at least 1.
        peak_flops: of the device, per second; gives the model FLOP utilisation.

    Returns:
        One record per mode: ``mode``, ``step_seconds`` (median), ``tokens_per_second``, ``mfu`` or None, and
        ``memory_bytes``, the peak on a GPU, None on the CPU, where one process cannot tell modes apart.
    """
    if repeats < 1:
        raise ArgumentError("repeats", repeats, "be at least 1")
    if inputs["input_ids"].shape[0] != 1:
        raise ArgumentError("inputs", inputs["input_ids"].shape[0], "hold one sample")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    device, tokens = inputs["input_ids"].device, inputs["input_ids"].shape[1]
    flops = TrainingFlops(model, 1, tokens)
    with apply_sar(model, config) as handle:
        model(**inputs)
        roles, first = handle.roles, min(handle.sar_layers, default=0)
        eager = EagerSAR(roles.visual_mask, roles.text_mask, handle.prior, first_layer=first, beta=config.beta)
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    memory: dict[str, int] = {}
    for turn in range(repeats + 1):
        for mode in MODES:
            with _mode(model, mode, config, eager) as extra:
                seconds = _step(model, {**inputs, **extra}, optimizer, device)
            if turn:
                times[mode].append(seconds)
                memory[mode] = max(memory.get(mode, 0), peak_memory(device))
    records = []
    for mode in MODES:
        median = statistics.median(times[mode])
        records.append(
            {
                "mode": mode,
                "step_seconds": median,
                "tokens_per_second": tokens / median,
                "mfu": flops.total / median / peak_flops if peak_flops else None,
                "memory_bytes": memory[mode] if device.type == "cuda" else None,
            }
        )
    return records


def remark(tokens: int, limit: int | None = None) -> str | None:
    """What to know of times at so many tokens, and what to run instead; ``limit`` is the model's. None if nothing."""
    if tokens >= TELLING:
        return None
    longer = "a model that takes more" if limit is not None and limit < TELLING else f"a length of {TELLING} or more"
    return (
        f"{tokens} tokens are too few to tell SAR from the eager formulation: fixed costs of each layer decide, and "
        f"eager's matrices grow with the square of the length. Give {longer}, for example 2048 "
        "of llava-hf/llava-1.5-7b-hf in bfloat16 on a GPU; `make bench` of a checkout times attention on a CPU"
    )


@contextlib.contextmanager
def _mode(model: nn.Module, mode: str, config: SARConfig, eager: EagerSAR) -> Iterator[dict[str, Any]]:
    """The model in one mode, and what its forward pass takes besides the inputs."""
    if mode == "sar on":
        with apply_sar(model, config):
            yield {}
    elif mode == "eager":
        with eager_attention(model):
            yield {"eager_sar": eager if config.activation_layer_k else None}
    else:
        yield {}


def _step(model: nn.Module, inputs: Mapping[str, Any], optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = seconds_now(device)
    model(**inputs, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return seconds_now(device) - start


def sample_inputs(model: nn.Module, processor: Any, length: int) -> dict[str, Tensor]:
    """One picture, a question and an answer of about ``length`` tokens in all, on the model's device.

    ``ValueError`` if the picture alone takes more.
    """
    from sar_fast.lab.training.data import Collator
    from sar_fast.lab.training.encoding import Encoder

    encoder = Encoder(processor)
    record = lambda words: {
        "messages": [
            {"role": "user", "content": "<image>What colour is the circle?"},
            {"role": "assistant", "content": " ".join(["red"] * words)},
        ],
        "images": [{"path": None, "bytes": _picture()}],
    }
    short = len(encoder(record(1))["input_ids"])
    if short > length:
        raise ArgumentError("length", length, f"be at least {short}, the picture's tokens and a question")
    encoded = encoder(record(1 + length - short))
    batch = Collator(encoder.tokenizer.pad_token_id or 0)([encoded])
    number = next(model.parameters()).dtype
    return {n: t.to(model.device, number if t.is_floating_point() else None) for n, t in batch.items()}


def _picture() -> bytes:
    import io

    import numpy as np
    from PIL import Image

    from sar_fast.lab.miniature.drawing import draw_scene

    buffer = io.BytesIO()
    Image.fromarray(draw_scene(np.random.default_rng(0), size=336).image).save(buffer, format="PNG")
    return buffer.getvalue()
