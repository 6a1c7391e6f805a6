"""What a user could call instead, under one signature: the providers that the benchmark suites compare.

Each takes (q, k, v, visual_mask, text_mask, prior) in FlashAttention's layout and returns the causal attention output
(B, S, H, D). ``available`` says which can run here, and why others cannot.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sar_fast import flash_attn_func, sar_attn_func
from sar_fast.backends.kernel_calls import interpreting
from sar_fast.backends.protocol import Request
from sar_fast.backends.providers.choice import PROVIDERS as LIBRARIES
from sar_fast.backends.select import BY_NAME
from sar_fast.lab.measure.eager import eager_sar_attention
from sar_fast.lab.measure.timing import SYSTEM_TOKENS, attention_inputs

Provider = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def make_inputs(
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    text: float = 0.05,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, ...]:
    """q, k, v, masks and prior of prompts: system text, an image, and a question of a ``text`` share of the length."""
    visual = length - SYSTEM_TOKENS - max(1, round(length * text))
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    return attention_inputs(length, visual, dtype, batch=batch, device=device, **shape)


def _sdpa(backend: SDPBackend) -> Provider:
    def run(q, k, v, *_):
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return run


def _flex(q, k, v, *_):
    compiled, mask = _flex_for(q.shape[1], q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # eagerly, as dynamo goes on by default after 8 shapes, it would hold all N x N scores
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        return compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


@functools.cache
def _flex_for(length: int, device: torch.device) -> tuple[Callable, object]:
    """Compiled once per process and masked once per length, as a model that uses it would."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)
    return torch.compile(flex_attention, dynamic=False), mask


def _flash_attn(q, k, v, *_):
    from flash_attn import flash_attn_func as theirs

    return theirs(q, k, v, causal=True)


def _ours(backend: str) -> Provider:
    return lambda *inputs: sar_attn_func(*inputs, backend=backend)


def _ours_plain(backend: str) -> Provider:
    return lambda q, k, v, *_: flash_attn_func(q, k, v, causal=True, backend=backend)


PROVIDERS: dict[str, Provider] = {
    "sar-triton": _ours("triton"),
    "sar-composed": _ours("composed"),
    "sar-torch": _ours("torch"),
    "sar-auto": _ours("auto"),
    "plain-triton": _ours_plain("triton"),
    "plain-composed": _ours_plain("composed"),
    "sdpa-flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "flex": _flex,
    "flash-attn": _flash_attn,
    "eager-sar": lambda *inputs: eager_sar_attention(*inputs),
    **{f"sar-composed:{name}": _ours(f"composed:{name}") for name in LIBRARIES},
}


def unavailable(name: str, device: str) -> str | None:
    """Why a provider cannot run on ``device``, or None."""
    if device == "cpu" and name in ("sar-triton", "plain-triton") and not interpreting():
        return "the Triton kernels need a GPU"
    if ":" in name:
        usual = Request(torch.device(device), torch.bfloat16, head_dim=128)
        return BY_NAME[name.removeprefix("sar-")].unsupported(usual)
    if device == "cpu" and name in ("sdpa-cudnn", "flex", "flash-attn"):
        return f"{name} has no CPU kernel for this"
    if name == "flash-attn":
        try:
            import flash_attn  # noqa: F401
        except ImportError:
            return "flash-attn is not installed"
    return None


def synchronize(device: str) -> None:
    """Wait for the device, so that a timer measures work and not its submission."""
    if device == "cuda":
        torch.cuda.synchronize()
