"""SAR attention over a KV cache: decode steps whose weights continue the prompt's (docs/method.md, section 3)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sar_fast import ops, prior_check, validation
from sar_fast.backends import triton_backend
from sar_fast.backends.select import choose_backend
from sar_fast.config import check_choice
from sar_fast.functional import _stats, plain_attention
from sar_fast.scalars import is_integer, kind, plain
from sar_fast.types import SARState, SARStats


def check_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: int | Tensor | None,
    block_table: Tensor | None,
) -> tuple[int, int | Tensor | None]:
    """Check shapes and dtypes; returns the cache's capacity in keys and ``cache_seqlens`` as an int or (B,) tensor.

    Nothing is written, and no value on a GPU is read.
    """
    paged = block_table is not None
    validation.check_qkv(q, k_cache, v_cache, cache=True, paged=paged)
    batch, page = q.shape[0], k_cache.shape[1]
    if paged:
        validation.check_tensor("block_table", block_table)
        if block_table.dtype != torch.int32:
            raise TypeError(f"block_table must be int32; got {block_table.dtype}")
        if block_table.dim() != 2 or block_table.shape[0] != batch:
            raise ValueError(f"block_table must have shape ({batch}, pages); got {tuple(block_table.shape)}")
    capacity = page * block_table.shape[1] if paged else page
    cache_seqlens = _check_lengths(cache_seqlens, batch)
    if (k is None) != (v is None):
        raise ValueError(f"k and v must be given together; got only {'v' if k is None else 'k'}")
    for name, x in (("k", k), ("v", v)):
        if x is not None:
            validation.check_tensor(name, x)
    new = 0 if k is None else k.shape[1]
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        expected = (batch, new, *cache.shape[2:])
        if x is not None and tuple(x.shape) != expected:
            raise ValueError(f"{name} must have shape {expected}; got {tuple(x.shape)}")
        if x is not None and x.dtype != cache.dtype:
            raise TypeError(f"{name} must have {name}_cache's dtype {cache.dtype}; got {x.dtype}")
    for name, x in (("k", k), ("v", v), ("cache_seqlens", cache_seqlens), ("block_table", block_table)):
        if isinstance(x, Tensor) and x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}; got {x.device}")
    return capacity, cache_seqlens


def _check_lengths(cache_seqlens: object, batch: int) -> int | Tensor | None:
    """``cache_seqlens`` as None, an int or a (batch,) tensor."""
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = plain(cache_seqlens)
        if cache_seqlens is None or is_integer(cache_seqlens):
            return cache_seqlens
        raise TypeError(f"cache_seqlens must be an int or int32; got {kind(cache_seqlens)}")
    validation.check_tensor("cache_seqlens", cache_seqlens)
    if cache_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cache_seqlens must be an int or int32; got {cache_seqlens.dtype}")
    if cache_seqlens.dim() == 0:  # one number for all
        return cache_seqlens.expand(batch)
    if tuple(cache_seqlens.shape) != (batch,):
        raise ValueError(f"cache_seqlens must be an int or ({batch},) int32; got {tuple(cache_seqlens.shape)}")
    return cache_seqlens


def check_state(state: SARState, batch: int, heads: int, device: torch.device, *, written: bool) -> None:
    """Raise unless all of ``state`` is fp32, of that many rows and heads, and can be written if it will be."""
    shapes = {"av_sum": (batch, heads), "sa_sum": (batch, heads), "count": (batch,), "head_weights": (batch, heads)}
    for name, shape in shapes.items():
        tensor = getattr(state, name)
        validation.check_tensor(f"state.{name}", tensor)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"state must be for batch {batch} and {heads} heads; got {tuple(tensor.shape)} in {name}")
        if tensor.dtype != torch.float32:
            raise TypeError(f"state.{name} must be float32; got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"state must be on q's device {device}; got {tensor.device}")
        shared = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape))
        if written and shared and name != "head_weights":
            raise ValueError(
                f"state.{name} is written: its entries must not share memory; got strides {tensor.stride()}"
            )


def host_lengths(cache_seqlens: int | Tensor | None, batch: int, capacity: int, new: int) -> list[int]:
    """Every sample's length before the call, read on the host, with room for ``new`` keys."""
    if cache_seqlens is None:
        lengths = [capacity] * batch
    elif isinstance(cache_seqlens, int):
        lengths = [cache_seqlens] * batch
    else:
        lengths = cache_seqlens.tolist()
    for b, length in enumerate(lengths):
        if not 0 <= length <= capacity - new:
            raise ValueError(
                f"cache_seqlens[{b}] must leave room for {new} new key(s) in a cache of {capacity}; got {length}"
            )
    return lengths


def check_pages(block_table: Tensor | None, lengths: list[int], new: int, k_cache: Tensor) -> None:
    """Raise if a page that the call reads or writes is not in the cache; entries beyond are free."""
    if block_table is None:
        return
    blocks, page = k_cache.shape[:2]
    for b, (row, length) in enumerate(zip(block_table.tolist(), lengths)):
        used = row[: -(-(length + new) // page)]
        if any(not 0 <= block < blocks for block in used):
            raise ValueError(f"block_table[{b}] must hold pages between 0 and {blocks - 1}; got {used}")


def device_lengths(
    cache_seqlens: int | Tensor | None, block_table: Tensor | None, q: Tensor, k_cache: Tensor, capacity: int, new: int
) -> Tensor:
    """(B,) int32 lengths after the call, without waiting for a GPU: the kernels stop at the capacity."""
    on_cpu = q.device.type == "cpu"
    if isinstance(cache_seqlens, Tensor) and not on_cpu:
        return (cache_seqlens + new).to(torch.int32)
    lengths = host_lengths(cache_seqlens, q.shape[0], capacity, new)
    if on_cpu:
        check_pages(block_table, lengths, new, k_cache)
        return torch.tensor(lengths, dtype=torch.int32) + new
    length = lengths[0] + new if lengths else 0  # one number for all; a list would be copied, and that waits
    return torch.full((len(lengths),), length, dtype=torch.int32, device=q.device)


def write_cache(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    lengths: list[int],
    block_table: Tensor | None,
) -> list[int]:
    """Write k and v after each sample's ``lengths`` keys, in place; returns the lengths after that."""
    if k is None:
        return lengths
    page, new = k_cache.shape[1], k.shape[1]
    for x, cache in ((k, k_cache), (v, v_cache)):
        for b, length in enumerate(lengths):
            if block_table is None:
                cache[b, length : length + new] = x[b]
            else:
                at = torch.arange(length, length + new, device=cache.device)
                cache[block_table[b].long()[at // page], at % page] = x[b]
    return [length + new for length in lengths]


def cached_sequences(
    k_cache: Tensor, v_cache: Tensor, lengths: list[int], block_table: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(k, v) of every sample, each (length, Hkv, D): views, or gathered pages."""
    for b, length in enumerate(lengths):
        if block_table is None:
            yield k_cache[b, :length], v_cache[b, :length]
        else:
            pages = block_table[b, : -(-length // k_cache.shape[1])].long()
            yield k_cache[pages].flatten(0, 1)[:length], v_cache[pages].flatten(0, 1)[:length]


def sar_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: int | Tensor,
    visual_mask: Tensor,
    prior: Tensor,
    state: SARState | None,
    text_mask: Tensor | None = None,
    decode: str = "running",
    block_table: Tensor | None = None,
    beta: float = 0.5,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    protect_first_head: bool = True,
    normalize: str = "none",
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, SARStats]:
    """SAR attention of new queries over a KV cache, which k and v, if given, extend in place.

    Args:
        q: (B, Sq, H, D), the newest Sq positions. k, v: (B, Snew, Hkv, D) or None.
        k_cache, v_cache: (B, Smax, Hkv, D), or (blocks, page, Hkv, D) with ``block_table`` (B, pages) int32.
        cache_seqlens: int or (B,) int32, keys in the cache before this call. It is not changed.
        visual_mask, prior: (B, Smax) bool and floating point, over cache positions; Smax = pages * page when paged.
        state: sums and weights of this layer so far; updated in place. ``SARState.empty`` before the first tokens,
            ``SARState.from_stats`` after a prompt; None starts afresh and keeps nothing.
        text_mask: (B, Sq) bool, which new queries count as text; default all.
        decode: ``"running"`` (means over all text queries so far, these included), ``"step"`` (these alone),
            ``"prompt"`` (``state.head_weights``, unchanged).
        Others: as :func:`sar_fast.sar_attn_func`. On a GPU the kernels read no value on the host: there a negative
            prior, lengths beyond the cache and pages that it has not are the caller's to avoid.

    Returns:
        out (B, Sq, H, Dv), or (out, stats of the weights that were used). Inference only: nothing is differentiable,
        and nothing that is written keeps a graph.
    """
    if cache_seqlens is None:
        raise TypeError("cache_seqlens must be an int or (batch,) int32; got None")
    return_stats = validation.check_flag("return_stats", return_stats)
    check_choice("decode", decode, ("running", "step", "prompt"))
    capacity, cache_seqlens = check_cache(q, k_cache, v_cache, k, v, cache_seqlens, block_table)
    if state is None:
        if decode == "prompt":
            raise ValueError('state must hold the prompt\'s weights for decode="prompt"; got None')
        state = SARState.empty(q.shape[0], q.shape[2], q.device)
    if not isinstance(state, SARState):
        raise TypeError(f"state must be a SARState or None; got {type(state).__name__}")
    B, Sq, H, _ = q.shape
    new = 0 if k is None else k.shape[1]
    validation.check_mask("visual_mask", visual_mask, (B, capacity), q.device)
    validation.check_prior(prior, (B, capacity), q.device)
    if text_mask is None:
        text_mask = torch.ones(B, Sq, dtype=torch.bool, device=q.device)
    validation.check_mask("text_mask", text_mask, (B, Sq), q.device)
    check_state(state, B, H, q.device, written=decode == "running")
    options = validation.make_options(
        q,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        beta=beta,
        protect_first_head=protect_first_head,
        normalize=normalize,
    )
    chosen = choose_backend(backend, q.device, q.dtype, options, padded=False, masked=False)
    prior_check.raise_arrived()
    if chosen != triton_backend.name or q.device.type == "cpu":
        prior_check.check_prior_values(prior)  # before the cache is written
    with torch.no_grad():
        if chosen == triton_backend.name:
            lengths = device_lengths(cache_seqlens, block_table, q, k_cache, capacity, new)
            triton_backend.append(k_cache, v_cache, k, v, lengths, block_table)
            roles = (visual_mask, text_mask, prior)
            out, *stats = triton_backend.decode(
                q, k_cache, v_cache, lengths, *roles, state, decode, options, block_table
            )
            return (out, _stats(*stats, chosen)) if return_stats else out
        lengths = host_lengths(cache_seqlens, B, capacity, new)
        check_pages(block_table, lengths, new, k_cache)
        lengths = write_cache(k_cache, v_cache, k, v, lengths, block_table)
        results = []
        for b, (k_b, v_b) in enumerate(cached_sequences(k_cache, v_cache, lengths, block_table)):
            row, length = slice(b, b + 1), lengths[b]
            if decode == "prompt":
                out, lse = plain_attention(q[row], k_b[None], v_b[None], options=options, backend=chosen, need_lse=True)
                c = state.head_weights[row]
                out = (out * c[:, None, :, None]).to(q.dtype)
                av, sa, count = state.av_sum[row], state.sa_sum[row], state.count[row]
                total = count.clamp_min(1)[:, None]
                results.append((out, lse, av / total, sa / total, c, count.clone()))
                continue
            carried = (state.av_sum[row], state.sa_sum[row], state.count[row]) if decode == "running" else None
            roles = visual_mask[row, :length], text_mask[row], prior[row, :length]
            out, lse, av, sa, c, count = ops.attention(
                q[row],
                k_b[None],
                v_b[None],
                *roles,
                carried=carried,
                options=options,
                backend=chosen,
                need_lse=return_stats,
                check_prior=torch.compiler.is_compiling(),  # looked at above, but in a graph
            )
            if decode == "running":
                state.av_sum[row] = (av * count[:, None]).to(torch.float32)
                state.sa_sum[row] = (sa * count[:, None]).to(torch.float32)
                state.count[row] = count.to(torch.float32)
            results.append((out, lse, av, sa, c, count))
    if not results:  # an empty batch
        none = q.new_empty(0, H, dtype=torch.float32)
        results.append(
            (q.new_empty(*q.shape[:-1], v_cache.shape[-1]), q.new_empty(0, H, Sq), none, none, none, none[:, 0])
        )
    out, lse, av, sa, c, count = (torch.cat(parts) for parts in zip(*results))
    return (out, _stats(lse, av, sa, c, count, chosen)) if return_stats else out
