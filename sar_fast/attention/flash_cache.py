"""What FlashAttention-2's functions do with a KV cache beside attention: rows, rotary positions, padding, pages."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from sar_fast.attention.decode_op import decode
from sar_fast.backends.protocol import Request
from sar_fast.backends.select import choose_backend
from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.method import validation
from sar_fast.method.kvcache import Cache, Step, check_block_table
from sar_fast.method.values import Scores
from sar_fast.method.visibility import packed_positions


def refuse_with_pages(**arguments: object) -> None:
    """Raise on the first argument that is given: FlashAttention takes none of them beside ``block_table``."""
    for name, value in arguments.items():
        if value is not None:
            raise ArgumentError(name, type(value).__name__, "be None where block_table is given")


def sample_rows(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_batch_idx: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(k_cache, v_cache, block_table) of a cache (rows, Smax, Hkv, D) with a row for every sample, and perhaps more.

    Rows that are picked are pages as long as the cache, so that nothing is copied.
    """
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        validation.check_rank(name, x, "(batch, seqlen, heads, head_dim)")
    if cache_batch_idx is None:
        if k_cache.shape[0] == v_cache.shape[0] > q.shape[0]:
            k_cache, v_cache = k_cache[: q.shape[0]], v_cache[: q.shape[0]]
        return k_cache, v_cache, None
    _check_numbers("cache_batch_idx", cache_batch_idx, q, k_cache.shape[0] - 1)
    return k_cache, v_cache, cache_batch_idx[:, None]


def _check_numbers(name: str, x: object, q: Tensor, largest: int) -> None:
    """Raise unless ``x`` is (B,) int32 on q's device; on a CPU, of numbers between 0 and ``largest``."""
    validation.check_tensor(name, x)
    if x.dtype != torch.int32:
        raise ArgumentTypeError(name, x.dtype, "be int32")
    if tuple(x.shape) != (q.shape[0],):
        raise ArgumentError(name, tuple(x.shape), f"have shape ({q.shape[0]},)")
    if x.device != q.device:
        raise ArgumentError(name, x.device, f"be on q's device {q.device}")
    if _is_read(x) and not all(0 <= number <= largest for number in x.tolist()):
        raise ArgumentError(name, x.tolist(), f"hold numbers between 0 and {largest}")


def _is_read(x: Tensor) -> bool:
    """Whether values are looked at: on a GPU that would wait, and a traced graph has none."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def left_padded(step: Step, cache_leftpad: Tensor) -> Step:
    """A step whose samples' first ``cache_leftpad`` (B,) int32 keys are padding."""
    capacity = step.cache.capacity
    _check_numbers("cache_leftpad", cache_leftpad, step.q, capacity)
    real = torch.arange(capacity, device=step.q.device) >= cache_leftpad[:, None]  # [B, Smax]
    return dataclasses.replace(step, key_padding_mask=real)


def rotated(step: Step, rotary_cos: Tensor | None, rotary_sin: Tensor | None, interleaved: bool) -> Step:
    """A step with the rotary embedding on its queries and new keys; cos and sin are (positions, R / 2), R <= D.

    New keys are where the cache ends. So are queries, if they are causal or have a window; else all are at its end.
    """
    q, cache = step.q, step.cache
    _check_rotary(step, rotary_cos, rotary_sin)
    start = cache.positions(1, q.device) + 1 - cache.new  # [B or 1, 1]
    places = lambda count: start + torch.arange(count, device=q.device)
    turn = lambda x, at: rotate(x, rotary_cos[at], rotary_sin[at], interleaved=interleaved)
    q, new_k = turn(q, places(_query_places(step))), turn(cache.new_k, places(cache.new))
    return dataclasses.replace(step, q=q, cache=dataclasses.replace(cache, new_k=new_k))


def _query_places(step: Step) -> int:
    """At how many positions the queries are rotated."""
    return step.q.shape[1] if step.scores.causal or step.scores.windowed else 1


def _check_rotary(step: Step, cos: Tensor | None, sin: Tensor | None) -> None:
    q, cache = step.q, step.cache
    if (cos is None) != (sin is None):
        raise ArgumentError(
            "rotary_cos and rotary_sin", f"only rotary_{'sin' if cos is None else 'cos'}", "be given together"
        )
    if cache.new_k is None:
        raise ArgumentError("k and v", "None", "be given with rotary_cos: FlashAttention rotates new keys")
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        validation.check_tensor(name, x)
        if x.dim() != 2 or not 2 <= 2 * x.shape[1] <= q.shape[-1]:
            raise ArgumentError(name, tuple(x.shape), f"be (positions, R / 2), R at most the head dim {q.shape[-1]}")
        if x.dtype != q.dtype:
            raise ArgumentTypeError(name, x.dtype, f"have q's dtype {q.dtype}")
        if x.device != q.device:
            raise ArgumentError(name, x.device, f"be on q's device {q.device}")
    if cos.shape != sin.shape:
        raise ArgumentError("rotary_sin", tuple(sin.shape), f"have rotary_cos's shape {tuple(cos.shape)}")
    needed = cache.capacity
    if not isinstance(cache.seqlens, Tensor) or _is_read(cache.seqlens):
        needed = max(needed, _query_places(step) + max(cache.host_lengths(), default=0))
    if cos.shape[0] < needed:
        raise ArgumentError("rotary_cos", cos.shape[0], f"have {needed} positions or more for this cache and q")


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotary embedding of the first R of D channels, computed in fp32 or more.

    Args:
        x: (B, S, heads, D). cos, sin: (B or 1, S or 1, R / 2).
        interleaved: a pair is two neighbours; else channels R / 2 apart.
    """
    accurate = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = (t.to(accurate)[:, :, None] for t in (cos, sin))
    turned, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    pairs = turned.to(accurate).unflatten(-1, (-1, 2) if interleaved else (2, -1))
    a, b = pairs.unbind(-1 if interleaved else -2)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1 if interleaved else -2).flatten(-2)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlens: tuple[int, int],
    block_table: Tensor,
) -> Cache:
    """The pages (blocks, page, Hkv, D) of packed sequences as a cache; on a CPU their lengths are looked at."""
    batch = cu_seqlens_k.shape[0] - 1
    check_block_table(block_table, batch, q.device)
    cache = Cache(k, v, None, None, cu_seqlens_k.diff(), block_table, batch)
    if _is_read(cu_seqlens_k):
        ends = cu_seqlens_k.tolist()
        validation.check_ends("q", cu_seqlens_q.tolist(), q.shape[0], max_seqlens[0])
        validation.check_ends("k", ends, ends[-1], max_seqlens[1])
        lengths = [b - a for a, b in itertools.pairwise(ends)]
        if max(lengths, default=0) > cache.capacity:
            raise ArgumentError(
                "block_table", cache.capacity, f"hold pages for the longest sequence, {max(lengths)} keys"
            )
        cache.check_pages(lengths)
    return cache


def is_step(q: Tensor, cache: Cache, max_seqlen_q: int) -> bool:
    """Whether packed queries (total_q, H, D) can run as a step over their cache: as many in every sequence, in the
    dtype that they have, without gradients."""
    differentiates = torch.is_grad_enabled() and any(x.requires_grad for x in (q, cache.k, cache.v))
    as_many = 0 < q.shape[0] == cache.batch * max_seqlen_q
    return as_many and not differentiates and not torch.is_autocast_enabled(q.device.type)


def packed_step(q: Tensor, cache: Cache, scores: Scores, *, backend: str, need_lse: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) of packed queries for which :func:`is_step` holds: no page is copied, and no GPU is waited for."""
    chosen = choose_backend(backend, Request(q.device, q.dtype, scores, decode=True))
    result = decode(chosen, Step(q.unflatten(0, (cache.batch, -1)), cache, scores), need_lse=need_lse)
    lse = result.lse.transpose(0, 1).flatten(1) if need_lse else result.lse  # [H, total_q]
    return result.out.flatten(0, 1), lse


def gathered(cache: Cache, cu_seqlens_k: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of paged sequences, (total_k, Hkv, D): differentiable; waits for a GPU to know the total."""
    total, page = int(cu_seqlens_k[-1]), cache.k.shape[1]
    sequence, position = packed_positions(cu_seqlens_k, cu_seqlens_k, total)
    block = cache.block_table[sequence, position // page].long()
    return cache.k[block, position % page], cache.v[block, position % page]
