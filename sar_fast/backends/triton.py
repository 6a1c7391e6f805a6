"""Backend ``"triton"``: this project's fused kernels (``sar_kernels``), whole batches in a few launches."""

from __future__ import annotations

import torch
from torch import Tensor

from sar_fast.backends.kernel_calls import (
    attention_options,
    dense_qkv,
    described,
    interpreting,
    masks_of,
    missing,
    reweighted,
    weight_options,
)
from sar_fast.backends.protocol import Gradients, Request, nothing_computed
from sar_fast.backends.sequence import dense_last
from sar_fast.method.kvcache import Cache, Step
from sar_fast.method.validation import MAX_HEAD_DIM, check_ends
from sar_fast.method.values import Call, Result, Statistics, Sums
from sar_fast.method.weighting.constant import Equal
from sar_fast.method.weighting.softmax import Lowered

DECODE_QUERIES = 16  # up to this many queries per sample run through the decode kernels
_GPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INTERPRETER_DTYPES = (torch.float16, torch.float32, torch.float64)  # its bfloat16 arithmetic is wrong


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

        q, k, v = dense_qkv(call)
        out, lse, statistics, c, _ = result
        layout = described(call)
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
            weights=weight_options(rule),
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

        q, k, _ = dense_qkv(call)
        roles = call.roles._replace(prior=chosen.to(lse.dtype))
        layout = described(call)
        _, means, _, count = kernels.attention_statistics(q, k, lse, *roles, weights=weight_options(Equal()), **layout)
        return means * count[:, None]

    def decode(self, step: Step, *, need_lse: bool) -> Result:
        """As the protocol's; on a GPU no value is read on the host."""
        return _decode(step, _append(step.q, step.cache))


def _hides_rows(call: Call) -> bool:
    """Whether some query may see nothing, beside those older than all keys."""
    return call.key_padding_mask is not None or call.attn_mask is not None or call.bounds.given


def _forward(call: Call, rule: Lowered) -> Result:
    from sar_kernels import attention as kernels

    q, k, v = dense_qkv(call)
    if call.packed and q.device.type == "cpu":  # a GPU would have to be waited for
        for side, cu, tokens, longest in zip("qk", (call.cu_seqlens_q, call.cu_seqlens_k), (q, k), call.max_seqlens):
            check_ends(side, cu.tolist(), tokens.shape[0], longest)
    if is_step(call):
        return _decode_call(call, rule)
    layout = described(call)
    if call.roles is None:
        out, lse = kernels.attention_forward(q, k, v, **layout)
        return Result(out, lse, *nothing_computed(q, lse.dtype))
    if call.carried is not None or isinstance(rule, Equal):
        return reweighted(call, rule, *kernels.attention_forward(q, k, v, **layout))
    out, lse, av, sa, c, count = kernels.sar_forward(q, k, v, *call.roles, weights=weight_options(rule), **layout)
    return Result(out, lse, Statistics(av, sa, count), c)


def is_step(call: Call) -> bool:
    """A few queries against a longer past: the split-KV kernels keep all multiprocessors busy."""
    return not call.packed and 0 < call.q.shape[1] <= DECODE_QUERIES < call.k.shape[1]


def _decode_call(call: Call, rule: Lowered) -> Result:
    q, k, v = dense_qkv(call)
    sums = sums_out = None
    if call.carried is not None:
        sums = Sums(*(t.to(torch.float32) for t in call.carried[:3]))
        sums_out = Sums(*(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in sums[:3]))
    cache = Cache(k, v, None, None, None, None, call.batch_size)
    step = Step(q, cache, call.scores, call.roles, sums, rule, None, call.bounds, call.key_padding_mask)
    return _decode(step, None, call.attn_mask, sums_out)


def _append(q: Tensor, cache: Cache) -> Tensor:
    """Write a cache's new keys and values; (B,) int32 lengths after that."""
    from sar_kernels.decode.call import append_kv

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
    from sar_kernels.decode.call import decode_forward, sar_decode_forward

    q, cache, roles, sums, c = dense_last(step.q), step.cache, step.roles, step.sums, step.c
    table = None if cache.block_table is None else dense_last(cache.block_table)
    masks = masks_of(step.key_padding_mask, attn_mask, step.bounds)
    given = {"options": attention_options(step.scores), "block_table": table, "masks": masks}
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
        weights=weight_options(step.rule or Equal()),
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
