"""Whole models in published shapes with random weights: prefill, decode and a training step, SAR off and on.

transformers is imported when a model is built, not before: it takes longer than some slices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from gpu_suite.bench import Bench
from gpu_suite.inputs import Shape
from sar_fast import SARConfig, apply_sar
from sar_fast.lab.measure.eager import EagerSAR, eager_attention

QUESTION = 48  # text tokens after the picture
NEW_TOKENS = 16


def llava(tiny: bool, layers: int) -> tuple[Any, dict[str, Any]]:
    """LLaVA-1.5-7B's shape, and one prompt: 576 visual tokens (tiny: 16)."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

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
    from transformers import Qwen2_5_VLConfig

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
    from transformers import AutoModelForImageTextToText

    config, inputs = SHAPES[name](bench.tiny, layers)
    torch.manual_seed(0)
    with torch.device(bench.device.name):
        model = AutoModelForImageTextToText.from_config(config, dtype=bench.dtype).eval()
    model.generation_config.eos_token_id = None  # every run makes the same number of tokens
    cast = lambda x: x.to(bench.device.name, bench.dtype if x.is_floating_point() else x.dtype)
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
    """Prefill and a generation, 32 layers, K = 10; peak memory of both."""
    layers, k = (3, 2) if bench.tiny else (32, 10)
    providers = ("sdpa", "sar", "eager, research")
    for name in SHAPES:
        shape = {"model": name, "layers": layers, "K": k}
        modes = {"prefill": (_prefill, providers), "decode": (_decode, providers[:2])}
        if not any(bench.missing("model", mode, shape, wanted) for mode, (_, wanted) in modes.items()):
            continue
        bench.check_time()
        model, inputs = _build(bench, name, layers)
        for mode, (make, wanted) in modes.items():
            _measure(bench, mode, shape, model, inputs, k, wanted, make, seconds=0.5)
        del model
        bench.device.release()


def _prefill(model: nn.Module, inputs: dict[str, Any], more: dict[str, Any]) -> Callable[[], object]:
    return lambda: model(**inputs, **more, logits_to_keep=1)


def _decode(model: nn.Module, inputs: dict[str, Any], more: dict[str, Any]) -> Callable[[], object]:
    """A whole generation; its prefill is the same for all providers up to what prefill shows."""
    return lambda: model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)


def training_step(bench: Bench) -> None:
    """Forward, backward and AdamW of the same shapes with 4 layers, all of them re-weighted."""
    layers = 2 if bench.tiny else 4
    providers = ("sdpa", "sar", "sar, through")
    for name in SHAPES:
        shape = {"model": name, "layers": layers, "K": layers}
        if not bench.missing("model", "training step", shape, providers):
            continue
        bench.check_time()
        model, inputs = _build(bench, name, layers)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=bench.device.name == "cuda")
        visual = inputs["input_ids"] == model.config.image_token_id
        inputs["labels"] = inputs["input_ids"].masked_fill(visual, -100)

        def make(model: nn.Module, inputs: dict, more: dict, optimizer: Any = optimizer) -> Callable[[], object]:
            def step() -> None:
                model(**inputs).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            return step

        _measure(bench, "training step", shape, model, inputs, layers, providers, make, seconds=0.3)
        del model, optimizer, make
        bench.device.release()


def _measure(
    bench: Bench,
    mode: str,
    shape: Shape,
    model: nn.Module,
    inputs: dict[str, Any],
    k: int,
    providers: tuple[str, ...],
    make: Callable[[nn.Module, dict, dict], Callable[[], object]],
    seconds: float,
) -> None:
    """Providers in turns, each with the model put under it and taken away again."""
    wanted = bench.missing("model", mode, shape, providers)
    if not wanted:
        return
    bench.check_time()
    bench.trying("model", mode, shape, wanted)
    times: dict[str, list[float]] = {p: [] for p in wanted}
    memory: dict[str, int | None] = {}
    for provider in wanted:
        reason = bench.withheld(provider, mode, shape)
        if reason is not None:
            bench.records.fail("model", provider, mode, shape, reason, withheld=True)
            del times[provider]
    grad = torch.enable_grad() if mode == "training step" else torch.inference_mode()
    for turn in range(1 if bench.tiny else 3):
        for provider in list(times):

            def run(provider: str = provider, turn: int = turn) -> list[float]:
                with _provider(model, provider, k, inputs) as more, grad:
                    call = make(model, inputs, more)
                    if turn == 0:
                        memory[provider] = bench.device.peak_extra_bytes(call)
                    return bench.device.times(call, seconds)

            found = bench.attempt("model", provider, mode, shape, run)
            if found is None:
                del times[provider]
            else:
                times[provider] += found
    for provider, values in times.items():
        bench.records.add("model", provider, mode, "ms", shape, values, peak_extra_bytes=memory[provider])
