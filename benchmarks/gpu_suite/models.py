"""Whole models in published shapes with random weights: prefill, decode and a training step, SAR off and on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
)

from gpu_suite.attention import Bench
from gpu_suite.measure import peak_extra_bytes, samples
from sar_fast import SARConfig, apply_sar
from sar_fast.analysis.eager import EagerSAR, eager_attention

QUESTION = 48  # text tokens after the picture
NEW_TOKENS = 32


def llava(tiny: bool, layers: int) -> tuple[Any, dict[str, Any]]:
    """LLaVA-1.5-7B's shape, and one prompt: 576 visual tokens (tiny: 16)."""
    vision = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 2}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 200}
    if not tiny:
        vision = {"image_size": 336, "patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096}
        vision |= {"num_hidden_layers": 24, "num_attention_heads": 16}
        text = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32064}
    visual = (vision["image_size"] // vision["patch_size"]) ** 2
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text, num_hidden_layers=layers),
        image_token_id=text["vocab_size"] - 1,
        image_seq_length=visual,
    )
    pixels = torch.randn(1, 3, vision["image_size"], vision["image_size"])
    return config, {"input_ids": _prompt(config, visual), "pixel_values": pixels}


def qwen2_5_vl(tiny: bool, layers: int) -> tuple[Any, dict[str, Any]]:
    """Qwen2.5-VL-7B's shape, and one prompt: 1,024 visual tokens (tiny: 24)."""
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
    }
    vision |= {"fullatt_block_indexes": [2], "out_hidden_size": 64}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    sections, vocabulary, grid = [2, 3, 3], 200, (1, 8, 12)
    if not tiny:
        vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14}
        vision |= {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": 3584}
        text = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
        sections, vocabulary, grid = [16, 24, 24], 152064, (1, 64, 64)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    config = Qwen2_5_VLConfig(
        vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2},
        text_config={**text, "num_hidden_layers": layers, "vocab_size": vocabulary, "rope_parameters": rope},
        image_token_id=vocabulary - 1,
        video_token_id=vocabulary - 2,
        vision_start_token_id=vocabulary - 3,
        vision_end_token_id=vocabulary - 4,
    )
    patches = grid[1] * grid[2]
    ids = _prompt(config, patches // 4)
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == config.image_token_id).int()}
    pixels = torch.randn(patches, 3 * 2 * vision["patch_size"] ** 2)
    return config, {**inputs, "pixel_values": pixels, "image_grid_thw": torch.tensor([grid])}


def _prompt(config: Any, visual: int) -> torch.Tensor:
    """(1, S) ids: system text, the picture's placeholders, a question."""
    text = torch.randint(3, 90, (1, 32 + QUESTION), generator=torch.Generator().manual_seed(0))
    picture = torch.full((1, visual), config.image_token_id)
    return torch.cat([text[:, :32], picture, text[:, 32:]], dim=1)


SHAPES = {"LLaVA-1.5-7B": llava, "Qwen2.5-VL-7B": qwen2_5_vl}


def _build(bench: Bench, name: str, layers: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config, inputs = SHAPES[name](bench.tiny, layers)
    torch.manual_seed(0)
    with torch.device(bench.device):
        model = AutoModelForImageTextToText.from_config(config, dtype=bench.dtype).eval()
    model.generation_config.eos_token_id = None  # every run makes the same number of tokens
    cast = lambda x: x.to(bench.device, bench.dtype if x.is_floating_point() else x.dtype)
    return model, {n: cast(x) for n, x in inputs.items()}


@contextlib.contextmanager
def _provider(model: nn.Module, name: str, k: int, inputs: dict[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
    """The model under a provider; yields further arguments of its forward."""
    if name == "sdpa":
        yield {}
    elif name == "eager, research":
        visual = inputs["input_ids"] == model.config.image_token_id
        text = ~visual & (visual.cumsum(-1) == visual.sum(-1, keepdim=True))
        layers = model.config.get_text_config().num_hidden_layers
        with eager_attention(model):
            yield {"eager_sar": EagerSAR(visual, text, visual / visual.sum(), layers - k)}
    else:
        with apply_sar(model, SARConfig(activation_layer_k=k, sav_grad=name.endswith("through"))):
            yield {}


def whole_model(bench: Bench) -> None:
    """Prefill and the time of a decoded token, 32 layers, K = 10; peak memory of both."""
    layers, k = (3, 2) if bench.tiny else (32, 10)
    for name in SHAPES:
        shape = {"model": name, "layers": layers, "K": k}
        providers = ["sdpa", "sar", "eager, research"]
        if not bench.records.missing("model", "prefill", shape, providers):
            continue
        model, inputs = _build(bench, name, layers)
        for mode, wanted in (("prefill", providers), ("decode", providers[:2])):
            times: dict[str, list[float]] = {p: [] for p in wanted}
            memory: dict[str, int | None] = {}
            for _ in range(3):  # providers take turns
                for provider in wanted:
                    with _provider(model, provider, k, inputs) as more, torch.inference_mode():
                        call = _prefill(model, inputs, more) if mode == "prefill" else _decode(model, inputs)
                        times[provider] += samples({provider: call}, bench.device, rounds=1, budget=1.0)[provider]
                        memory[provider] = peak_extra_bytes(call, bench.device)
            for provider, values in times.items():
                bench.records.add("model", provider, mode, "ms", shape, values, peak_extra_bytes=memory[provider])


def _prefill(model: nn.Module, inputs: dict[str, Any], more: dict[str, Any]) -> Callable[[], object]:
    return lambda: model(**inputs, **more, logits_to_keep=1)


def _decode(model: nn.Module, inputs: dict[str, Any]) -> Callable[[], object]:
    """A whole generation; its prefill is the same for all providers up to what prefill shows."""
    return lambda: model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)


def training_step(bench: Bench) -> None:
    """Forward, backward and AdamW of the same shapes with 4 layers, all of them re-weighted."""
    layers = 2 if bench.tiny else 4
    for name in SHAPES:
        shape = {"model": name, "layers": layers, "K": layers}
        providers = ["sdpa", "sar", "sar, through"]
        if not bench.records.missing("model", "training step", shape, providers):
            continue
        model, inputs = _build(bench, name, layers)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=bench.device == "cuda")
        visual = inputs["input_ids"] == model.config.image_token_id
        labels = inputs["input_ids"].masked_fill(visual, -100)

        def step() -> None:
            model(**inputs, labels=labels).loss.backward()  # noqa: B023
            optimizer.step()  # noqa: B023
            optimizer.zero_grad()  # noqa: B023

        times: dict[str, list[float]] = {p: [] for p in providers}
        for _ in range(3):
            for provider in providers:
                with _provider(model, provider, layers, inputs):
                    times[provider] += samples({provider: step}, bench.device, rounds=1, budget=0.5)[provider]
        for provider, values in times.items():
            bench.records.add("model", provider, "training step", "ms", shape, values)


PARTS = {"model": whole_model, "step": training_step}
