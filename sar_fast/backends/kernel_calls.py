"""A call as the Triton kernels take it, and what they do beside an attention: for the backends that launch them.

The kernels are imported only when they run or are asked about, so that the package works where Triton is not installed.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sar_fast.backends.protocol import Gradients
from sar_fast.backends.sequence import dense_last
from sar_fast.method.tracing import capturing
from sar_fast.method.values import Bounds, Call, Result, Scores, Statistics, Sums
from sar_fast.method.weighting.constant import Equal
from sar_fast.method.weighting.softmax import Lowered, flatten


def interpreting() -> bool:
    """Whether Triton's CPU interpreter is on (``TRITON_INTERPRET=1``): for tests, thousands of times slower."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str | None:
    """Why the kernels cannot be imported here, or None."""
    try:
        import sar_kernels.attention  # noqa: F401
    except ImportError as error:
        return f"the Triton kernels, which do not import here ({error})"
    return None


def attention_options(scores: Scores) -> Any:
    from sar_kernels.attention import AttentionOptions

    return AttentionOptions(scores.causal, scores.scale, scores.window, scores.softcap)


def weight_options(rule: Lowered) -> Any:
    from sar_kernels.attention import WeightOptions

    return WeightOptions(*flatten(rule))


def masks_of(padding: Tensor | None, attn_mask: Tensor | None, bounds: Bounds) -> Any:
    """The kernels' value of what hides keys beyond the window."""
    from sar_kernels.masks import Masks

    return Masks(padding, *bounds, None if attn_mask is None else _packed(attn_mask))


_packed_masks = WeakTensorKeyDictionary()  # dense mask -> (its version then, its packed form)


def _packed(mask: Tensor) -> Any:
    """A dense mask, read once however many layers get it; in a CUDA graph by each, as a replay may see another."""
    from sar_kernels.masks import pack_mask

    if capturing():
        return pack_mask(mask)
    version = None if mask.is_inference() else mask._version
    known = _packed_masks.get(mask)
    if known is None or version is None or known[0] != version:
        known = _packed_masks[mask] = version, pack_mask(mask)
    return known[1]


def dense_qkv(call: Call) -> list[Tensor]:
    """q, k and v as kernels read them."""
    return [dense_last(x) for x in (call.q, call.k, call.v)]


def described(call: Call) -> dict[str, Any]:
    """Options, masks and packing of a call, as keyword arguments of the kernels' functions."""
    given = {
        "options": attention_options(call.scores),
        "masks": masks_of(call.key_padding_mask, call.attn_mask, call.bounds),
    }
    if not call.packed:
        return given
    return {
        **given,
        "cu_seqlens_q": call.cu_seqlens_q.contiguous(),
        "cu_seqlens_k": call.cu_seqlens_k.contiguous(),
        "max_seqlen_q": call.max_seqlens[0],
        "max_seqlen_k": call.max_seqlens[1],
    }


def reweighted(call: Call, rule: Lowered, out: Tensor, lse: Tensor) -> Result:
    """Plain attention's output, contiguous, re-weighted in place by statistics from its log-sum-exp."""
    from sar_kernels import attention as kernels

    q, k, _ = dense_qkv(call)
    weights = weight_options(rule)
    av, sa, c, count = kernels.attention_statistics(q, k, lse, *call.roles, weights=weights, **described(call))
    statistics = Statistics(av, sa, count)
    if call.carried is not None:
        sums = Sums(*(a + b for a, b in zip(statistics.sums()[:3], call.carried)))
        statistics = sums.means()
        c = rule(statistics, None)
        return Result(out if isinstance(rule, Equal) else out.mul_(c[:, None, :, None]), lse, statistics, c, sums)
    if isinstance(rule, Equal):
        return Result(out, lse, statistics, rule(statistics, None))
    kernels.scale_heads(out, c, count, cu_seqlens=call.cu_seqlens_q, max_seqlen=call.max_seqlens[0])
    return Result(out, lse, statistics, c)


def unscaled(
    call: Call, grad: Tensor, out: Tensor, c: Tensor, *, through: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a plain attention's backward takes in place of the scaled call's gradient and output, and what
    :func:`statistics_backward` is to be given if the gradient flows ``through`` the weights."""
    from sar_kernels import attention as kernels

    packing = {"cu_seqlens": call.cu_seqlens_q, "max_seqlen": call.max_seqlens[0]}
    return kernels.unscale_heads(grad, out, c, with_sums=through, **packing)


def statistics_backward(
    call: Call, rule: Lowered, grad_out: Tensor, result: Result, through: Gradients, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dprior) through the statistics alone, on the text queries and the keys that they see."""
    from sar_kernels import attention as kernels

    statistics, (dav, dsa, dc) = result.statistics, through
    return kernels.statistics_backward(
        *dense_qkv(call),
        *(result.lse, *call.roles, statistics.av, statistics.sa, result.c, statistics.count, kept),
        weights=weight_options(rule),
        dav=dav,
        dsa=dsa,
        dc=dc,
        **described(call),
    )
