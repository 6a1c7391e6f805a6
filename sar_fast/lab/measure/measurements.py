"""What the demo times: attention alone, the prefill of a LLaVA-shaped model, the prefill of the model at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sar_fast.attention.functional import sar_attn_func
from sar_fast.config import SARConfig
from sar_fast.hf import apply_sar
from sar_fast.lab.measure.eager import EagerSAR, eager_attention, eager_sar_attention
from sar_fast.lab.measure.timing import SYSTEM_TOKENS, attention_inputs, interleaved_times

PLAIN, EAGER, OURS = "no SAR (PyTorch's SDPA)", "SAR, eager formulation", "SAR, this package"
TEXT = 128  # tokens of a timed prompt that are not visual
ATTENTION_GRID = 24  # patches per side: LLaVA-1.5's 576 visual tokens
PREFILL_GRID = 48  # 2304 visual tokens, as models of finer resolution have
LAYERS, SAR_LAYERS, WIDTH, HEADS = 2, 1, 1024, 8  # the LLaVA-shaped model; a 7B one has 32 layers of width 4096
PATCH = 14
REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Timing:
    """Best seconds by name, measured side by side. ``shape`` says on what, ``short`` in two words."""

    title: str
    short: str
    shape: str
    seconds: dict[str, float]
    backend: str

    def ratio(self, slow: str, fast: str) -> float:
        """How many times longer ``slow`` takes than ``fast``."""
        return self.seconds[slow] / self.seconds[fast]


def time_attention(
    device: torch.device, dtype: torch.dtype, config: SARConfig, *, seed: int, heads: int = 32
) -> Timing:
    """One attention call at the prompt length, head count and head dimension of LLaVA-1.5-7B."""
    visual = ATTENTION_GRID**2
    length = visual + TEXT
    inputs = attention_inputs(
        length, visual, dtype, heads=heads, kv_heads=heads, head_dim=128, seed=seed, device=device
    )
    q, k, v = (x.transpose(1, 2) for x in inputs[:3])
    ours = lambda **more: sar_attn_func(*inputs, beta=config.beta, backend=config.backend, **more)
    eager = lambda: eager_sar_attention(*inputs, beta=config.beta)
    backend = ours(return_stats=True)[1].backend
    _check_agreement(ours(), eager(), dtype)
    seconds = _best_times(
        {PLAIN: lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), EAGER: eager, OURS: ours}
    )
    shape = f"1 prompt of {length} tokens, {visual} of them visual, {heads} heads of dimension 128, {_name(dtype)}"
    return Timing("Attention alone", "attention alone", shape, seconds, backend)


def time_prefill(device: torch.device, dtype: torch.dtype, config: SARConfig, *, seed: int) -> Timing:
    """The prefill of a LLaVA-1.5 with random weights. The eager formulation needs eager attention in every layer."""
    model, inputs = _llava_shaped(seed, device, dtype)
    config = SARConfig(activation_layer_k=SAR_LAYERS, beta=config.beta, backend=config.backend)
    run = lambda **more: model(**inputs, use_cache=False, logits_to_keep=1, **more).logits

    def ours() -> Tensor:
        with apply_sar(model, config):
            return run()

    with torch.no_grad():
        with apply_sar(model, config) as handle:
            run()
            backend = handle.describe()["backend"]
            roles, prior = handle.roles, handle.prior
        sar = EagerSAR(*roles, prior, first_layer=LAYERS - SAR_LAYERS, beta=config.beta)

        def eager() -> Tensor:
            with eager_attention(model):
                return run(eager_sar=sar)

        _check_agreement(ours(), eager(), dtype)
        seconds = _best_times({PLAIN: run, EAGER: eager, OURS: ours})
    shape = (
        f"LLaVA-1.5 architecture with random weights, {LAYERS} layers of width {WIDTH}, SAR in {SAR_LAYERS}; "
        f"1 prompt of {PREFILL_GRID**2 + TEXT} tokens, {PREFILL_GRID**2} of them visual, {_name(dtype)}"
    )
    return Timing("Prefill of a LLaVA-shaped model", "whole prefill", shape, seconds, backend)


def time_model(model: nn.Module, inputs: Mapping[str, Tensor], config: SARConfig) -> Timing:
    """The prefill of a loaded model without SAR and with it."""

    def run() -> None:
        model(**inputs, use_cache=False)

    def ours() -> None:
        with apply_sar(model, config):
            run()

    with torch.no_grad():
        with apply_sar(model, config) as handle:
            backend = handle.describe()["backend"]
        seconds = _best_times({PLAIN: run, OURS: ours})
    batch, length = inputs["input_ids"].shape
    shape = f"{batch} prompt{'s' * (batch > 1)} of {length} tokens, SAR in {config.activation_layer_k} layers"
    return Timing("Prefill of the model that was asked", "own prefill", shape, seconds, backend)


def _llava_shaped(seed: int, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    words, image_token = 1000, 999
    side, visual = PREFILL_GRID * PATCH, PREFILL_GRID**2
    text = LlamaConfig(
        vocab_size=words,
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 11 // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=visual + TEXT,
    )
    vision = CLIPVisionConfig(
        image_size=side,
        patch_size=PATCH,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    settings = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration._from_config(settings, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, image_token, (1, visual + TEXT), generator=generator)
    ids[:, SYSTEM_TOKENS : SYSTEM_TOKENS + visual] = image_token
    pixels = torch.randn(1, 3, side, side, generator=generator)
    return model, {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": pixels.to(device, dtype),
    }


def _best_times(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The least of the rounds: other work on the machine only ever adds time."""
    return {name: min(seconds) for name, seconds in interleaved_times(calls, REPEATS).items()}


def _check_agreement(ours: Tensor, eager: Tensor, dtype: torch.dtype) -> None:
    """Refuse to time a wrong answer."""
    allowed = {torch.float32: 1e-3}.get(dtype, 5e-2)
    error = float((ours.float() - eager.float()).norm() / eager.float().norm())
    if not error <= allowed:
        raise RuntimeError(f"this package and the eager formulation differ by {error:.1e} (allowed {allowed:.0e})")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
