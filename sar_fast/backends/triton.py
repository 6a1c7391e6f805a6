"""Backend ``"triton"``: this project's fused kernels (``sar_kernels``), whole batches in a few launches.

The kernels are imported only when they run or are asked about, so that the package works where Triton is not installed.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sar_fast.backends.protocol import Gradients, Request, nothing_computed
from sar_fast.backends.sequence import dense_last
from sar_fast.kvcache import Cache, Step
from sar_fast.validation import MAX_HEAD_DIM, check_ends
from sar_fast.values import Bounds, Call, Result, Scores, Statistics, Sums
from sar_fast.weighting.constant import Equal
from sar_fast.weighting.softmax import Lowered, flatten

DECODE_QUERIES = 16  # up to this many queries per sample run through the decode kernels
_GPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INTERPRETER_DTYPES = (torch.float16, torch.float32, torch.float64)  # its bfloat16 arithmetic is wrong


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


class Triton:
    """The fused kernels as a backend."""

    name = "triton"
    waits = False
    on_cpu = False  # the interpreter runs the kernels for tests only: nobody gets it without asking

    def unsupported(self, request: Request) -> str | None:
        if request.head_dim > MAX_HEAD_DIM:
            return f"head_dim={request.head_dim}: fused kernels go to {MAX_HEAD_DIM}"
        device = request.device.type
        if device != "cuda" and not (device == "cpu" and interpreting()):
            return f"{device} tensors: the kernels need a CUDA or ROCm device (or TRITON_INTERPRET=1 for tests)"
        reason = missing()
        if reason is not None:
            return reason
        dtypes = _INTERPRETER_DTYPES if interpreting() else _GPU_DTYPES
        if request.dtype not in dtypes:
            return f"{request.dtype}: the kernels take {', '.join(map(str, dtypes))} here"
        return None

    def forward(self, call: Call, rule: Lowered, *, need_lse: bool) -> Result:
        found = _forward(call, rule)
        return found if need_lse else found._replace(lse=found.lse.new_empty(0))

    def backward(
        self, call: Call, rule: Lowered, grad_out: Tensor, result: Result, through: Gradients | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from sar_kernels import attention as kernels

        q, k, v = _dense_qkv(call)
        out, lse, statistics, c, _ = result
        layout = {"options": _attention_options(call.scores), **_layout(call)}
        if _hides_rows(call):  # queries that see nothing need not be finite: dK takes 0 times them
            q = q.masked_fill(lse.isneginf().all(-2)[..., None, None], 0)
        empty = q.new_empty(0, dtype=lse.dtype)
        if call.roles is None:
            return *kernels.attention_backward(grad_out, q, k, v, out, lse, **layout), empty
        dav, dsa, dc = through or (None, None, None)
        *grads, dprior = kernels.sar_backward(
            grad_out,
            q,
            k,
            v,
            out,
            lse,
            *call.roles,
            statistics.av,
            statistics.sa,
            c,
            statistics.count,
            weights=_weight_options(rule),
            sav_grad=through is not None,
            dav=dav,
            dsa=dsa,
            dc=dc,
            **layout,
        )
        return *grads, empty if dprior is None else dprior

    def mass(self, call: Call, lse: Tensor, chosen: Tensor) -> Tensor | None:
        """With the chosen keys' indicator for a prior, semantic alignment is the mean mass."""
        from sar_kernels import attention as kernels

        q, k, _ = _dense_qkv(call)
        roles = call.roles._replace(prior=chosen.to(lse.dtype))
        layout = {"options": _attention_options(call.scores), **_layout(call)}
        _, means, _, count = kernels.attention_statistics(q, k, lse, *roles, weights=_weight_options(Equal()), **layout)
        return means * count[:, None]

    def decode(self, step: Step, *, need_lse: bool) -> Result:
        """As the protocol's; on a GPU no value is read on the host."""
        return _decode(step, _append(step.q, step.cache))


def _attention_options(scores: Scores) -> Any:
    from sar_kernels.attention import AttentionOptions

    return AttentionOptions(scores.causal, scores.scale, scores.window, scores.softcap)


def _weight_options(rule: Lowered) -> Any:
    from sar_kernels.attention import WeightOptions

    return WeightOptions(*flatten(rule))


def _hides_rows(call: Call) -> bool:
    """Whether some query may see nothing, beside those older than all keys."""
    return call.key_padding_mask is not None or call.attn_mask is not None or call.bounds.given


def _masks(padding: Tensor | None, attn_mask: Tensor | None, bounds: Bounds) -> Any:
    """The kernels' value of what hides keys beyond the window."""
    from sar_kernels.masks import Masks

    return Masks(padding, *bounds, None if attn_mask is None else _packed(attn_mask))


_packed_masks = WeakTensorKeyDictionary()  # dense mask -> (its version then, its packed form)


def _packed(mask: Tensor) -> Any:
    """A dense mask, read once however many layers get it."""
    from sar_kernels.masks import pack_mask

    version = None if mask.is_inference() else mask._version
    known = _packed_masks.get(mask)
    if known is None or version is None or known[0] != version:
        known = _packed_masks[mask] = version, pack_mask(mask)
    return known[1]


def _dense_qkv(call: Call) -> list[Tensor]:
    return [dense_last(x) for x in (call.q, call.k, call.v)]


def _layout(call: Call) -> dict[str, Any]:
    layout = {"masks": _masks(call.key_padding_mask, call.attn_mask, call.bounds)}
    if call.packed:
        layout |= {
            "cu_seqlens_q": call.cu_seqlens_q.contiguous(),
            "cu_seqlens_k": call.cu_seqlens_k.contiguous(),
            "max_seqlen_q": call.max_seqlens[0],
            "max_seqlen_k": call.max_seqlens[1],
        }
    return layout


def _forward(call: Call, rule: Lowered) -> Result:
    from sar_kernels import attention as kernels

    q, k, v = _dense_qkv(call)
    if call.packed and q.device.type == "cpu":  # a GPU would have to be waited for
        for side, cu, tokens, longest in zip("qk", (call.cu_seqlens_q, call.cu_seqlens_k), (q, k), call.max_seqlens):
            check_ends(side, cu.tolist(), tokens.shape[0], longest)
    if _decodes(call):
        return _decode_call(call, rule)
    layout = {"options": _attention_options(call.scores), **_layout(call)}
    if call.roles is None:
        out, lse = kernels.attention_forward(q, k, v, **layout)
        return Result(out, lse, *nothing_computed(q, lse.dtype))
    if call.carried is not None or isinstance(rule, Equal):
        return _beside_attention(call, rule, q, k, v, layout)
    out, lse, av, sa, c, count = kernels.sar_forward(q, k, v, *call.roles, weights=_weight_options(rule), **layout)
    return Result(out, lse, Statistics(av, sa, count), c)


def _beside_attention(call: Call, rule: Lowered, q: Tensor, k: Tensor, v: Tensor, layout: dict[str, Any]) -> Result:
    """Plain attention and its statistics: for means that go on from earlier queries, and where no head is scaled."""
    from sar_kernels import attention as kernels

    out, lse = kernels.attention_forward(q, k, v, **layout)
    av, sa, _, count = kernels.attention_statistics(q, k, lse, *call.roles, weights=_weight_options(rule), **layout)
    statistics, sums = Statistics(av, sa, count), None
    if call.carried is not None:
        sums = Sums(*(a + b for a, b in zip(statistics.sums()[:3], call.carried)))
        statistics = sums.means()
    c = rule(statistics, None)
    if not isinstance(rule, Equal):
        out = out.mul_(c[:, None, :, None])
    return Result(out, lse, statistics, c, sums)


def _decodes(call: Call) -> bool:
    """A few queries against a longer past: the split-KV kernels keep all multiprocessors busy."""
    return not call.packed and 0 < call.q.shape[1] <= DECODE_QUERIES < call.k.shape[1]


def _decode_call(call: Call, rule: Lowered) -> Result:
    q, k, v = _dense_qkv(call)
    sums = sums_out = None
    if call.carried is not None:
        sums = Sums(*(t.to(torch.float32) for t in call.carried[:3]))
        sums_out = Sums(*(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in sums[:3]))
    cache = Cache(k, v, None, None, None, None, call.batch_size)
    step = Step(q, cache, call.scores, call.roles, sums, rule, None, call.bounds, call.key_padding_mask)
    return _decode(step, None, call.attn_mask, sums_out)


def _append(q: Tensor, cache: Cache) -> Tensor:
    """Write a cache's new keys and values; (B,) int32 lengths after that."""
    from sar_kernels.decode_call import append_kv

    lengths = cache.device_lengths(q)
    if cache.new_k is not None:
        table = None if cache.block_table is None else dense_last(cache.block_table)
        append_kv(cache.k, cache.v, dense_last(cache.new_k), dense_last(cache.new_v), lengths, table)
    return lengths


def _decode(
    step: Step,
    lengths: Tensor | None,
    attn_mask: Tensor | None = None,
    sums_out: Sums | None = None,
) -> Result:
    """A step over a cache whose samples have ``lengths`` (B,) int32 keys, the new ones written; None = it is full.

    New sums go to ``sums_out`` (contiguous), or into the step's.
    """
    from sar_kernels.decode_call import decode_forward, sar_decode_forward

    q, cache, roles, sums, c = dense_last(step.q), step.cache, step.roles, step.sums, step.c
    table = None if cache.block_table is None else dense_last(cache.block_table)
    masks = _masks(step.key_padding_mask, attn_mask, step.bounds)
    given = {"options": _attention_options(step.scores), "block_table": table, "masks": masks}
    if roles is None and c is None:
        out, lse = decode_forward(q, cache.k, cache.v, lengths, **given)
        return Result(out, lse, *nothing_computed(q, lse.dtype))
    written = (None, None, None) if sums is None else tuple(t.contiguous() for t in sums[:3])
    out, lse, av, sa, used, count = sar_decode_forward(
        q,
        cache.k,
        cache.v,
        lengths,
        *([None] * 3 if roles is None else [dense_last(x) for x in roles]),
        *written,
        None if c is None else c.float().contiguous(),
        weights=_weight_options(step.rule or Equal()),
        mode="prompt" if roles is None else "step" if sums is None else "running",
        sums_out=None if sums_out is None else sums_out[:3],
        **given,
    )
    if sums_out is None:
        for kept, new in zip((sums or ())[:3], written):
            if new is not kept:
                kept.copy_(new)
    if roles is None:
        return Result(out, lse, *nothing_computed(q, lse.dtype))
    return Result(out, lse, Statistics(av, sa, count), used, sums_out or sums)
