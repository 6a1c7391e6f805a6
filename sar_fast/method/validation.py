"""Argument checks of the public functions: every error names the argument, what came and what is needed.

They look at shapes, dtypes, devices and Python values only, so that they trace under ``torch.compile``; at a prior's
values looks :mod:`sar_fast.method.value_checks`.
"""

from __future__ import annotations

import itertools
import sys

import torch
from torch import Tensor

from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.base.scalars import is_integer, kind, number, plain
from sar_fast.method.values import Scores

MAX_HEAD_DIM = 256
UNKNOWN_LENGTH = -1  # a longest sequence whose value a traced graph cannot read: the operator looks at the sequences


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def check_tensor(name: str, x: object) -> None:
    """Raise ``TypeError`` unless ``x`` is a tensor."""
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(name, type(x).__name__, "be a torch.Tensor")
    if x.layout != torch.strided:
        raise ArgumentTypeError(name, f"layout {x.layout}", "be a dense tensor")


def check_rank(name: str, x: object, layout: str) -> None:
    """Raise unless ``x`` is a tensor with as many dimensions as ``layout``, a tuple of names, says."""
    check_tensor(name, x)
    if x.dim() != layout.count(",") + 1:
        raise ArgumentError(name, f"shape {_shape(x)}", f"be {layout}")


def check_qkv(
    q: Tensor, k: Tensor, v: Tensor, *, packed: bool = False, cache: bool = False, paged: bool = False
) -> None:
    """Check layout, dtype, device and head counts of q, k, v; of a cache, whose pages are no batch, if ``paged``."""
    key, value = ("k_cache", "v_cache") if cache else ("k", "v")
    layout = "(total, heads, head_dim)" if packed else "(batch, seqlen, heads, head_dim)"
    pages = "(blocks, page, heads, head_dim)" if paged else layout
    for name, x, expected in (("q", q, layout), (key, k, pages), (value, v, pages)):
        check_rank(name, x, expected)
        if x.dtype != q.dtype:
            raise ArgumentTypeError(name, x.dtype, f"have q's dtype {q.dtype}")
        if x.device != q.device:
            raise ArgumentError(name, x.device, f"be on q's device {q.device}")
    if not q.is_floating_point():
        raise ArgumentTypeError("q", q.dtype, "be a floating point tensor")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ArgumentTypeError("q", q.dtype, "be float16, bfloat16, float32 or float64")
    if paged and k.shape[1] == 0:
        raise ArgumentError(key, f"shape {_shape(k)}", "have pages of one key or more")
    if not packed and not paged and k.shape[0] != q.shape[0]:
        raise ArgumentError(key, f"shape {_shape(k)}", f"have q's batch size {q.shape[0]}")
    if k.shape[-1] != q.shape[-1]:
        raise ArgumentError(key, f"shape {_shape(k)}", f"have q's head dim {q.shape[-1]}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ArgumentError(value, f"shape {_shape(v)}", f"have {key}'s batch, length and heads {_shape(k)[:-1]}")
    H, Hkv = q.shape[-2], k.shape[-2]
    if H == 0 or Hkv == 0 or H % Hkv != 0:
        raise ArgumentError("q's number of heads", f"{H} query and {Hkv} key/value heads", f"be a multiple of {key}'s")
    for name, x in (("q", q), (value, v)):
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise ArgumentError(f"{name}'s head dim", x.shape[-1], f"be between 1 and {MAX_HEAD_DIM}")


def check_mask(name: str, mask: object, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless ``mask`` is a bool tensor of ``shape`` on ``device``."""
    check_tensor(name, mask)
    if mask.dtype != torch.bool:
        raise ArgumentTypeError(name, mask.dtype, "be a bool tensor")
    if _shape(mask) != tuple(shape):
        raise ArgumentError(name, _shape(mask), f"have shape {tuple(shape)}")
    if mask.device != device:
        raise ArgumentError(name, mask.device, f"be on q's device {device}")


def check_prior(prior: object, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless ``prior`` is a floating point tensor of ``shape``; its values are checked where they are data."""
    check_tensor("prior", prior)
    if not prior.is_floating_point():
        raise ArgumentTypeError("prior", prior.dtype, "be a floating point tensor")
    if _shape(prior) != tuple(shape):
        raise ArgumentError("prior", _shape(prior), f"have shape {tuple(shape)}")
    if prior.device != device:
        raise ArgumentError("prior", prior.device, f"be on q's device {device}")


def check_attn_mask(attn_mask: object, q: Tensor, k: Tensor) -> None:
    """Raise unless ``attn_mask`` is bool, (B or 1, 1, Sq, Sk)."""
    check_tensor("attn_mask", attn_mask)
    batch = attn_mask.shape[0] if attn_mask.dim() == 4 and attn_mask.shape[0] == 1 else q.shape[0]
    check_mask("attn_mask", attn_mask, (batch, 1, q.shape[1], k.shape[1]), q.device)


def check_cu_seqlens(name: str, cu: object, total: int, device: torch.device) -> None:
    """Raise unless ``cu`` is (num_sequences + 1,) int32 on ``device``."""
    check_tensor(name, cu)
    if cu.dtype != torch.int32:
        raise ArgumentTypeError(name, cu.dtype, "be int32")
    if cu.dim() != 1 or cu.shape[0] < 1:
        raise ArgumentError(name, _shape(cu), "have shape (num_sequences + 1,)")
    if cu.device != device:
        raise ArgumentError(name, cu.device, f"be on q's device {device}")


def check_roles(
    visual_mask: object,
    text_mask: object,
    prior: object,
    q: Tensor,
    k: Tensor,
    *,
    key_padding_mask: object = None,
    attn_mask: object = None,
) -> None:
    """Check what a dense SAR call brings beside q, k and v; the two masks may be None."""
    keys, queries = (q.shape[0], k.shape[1]), (q.shape[0], q.shape[1])
    check_mask("visual_mask", visual_mask, keys, q.device)
    check_mask("text_mask", text_mask, queries, q.device)
    check_prior(prior, keys, q.device)
    if key_padding_mask is not None:
        check_mask("key_padding_mask", key_padding_mask, keys, q.device)
    if attn_mask is not None:
        check_attn_mask(attn_mask, q, k)


def check_ends(side: str, ends: list[int], total: int, max_seqlen: int) -> None:
    """Raise unless a packed call's cumulative lengths (of "q" or "k", on the host) cover all its tokens."""
    if ends[0] != 0 or ends[-1] != total or any(b < a for a, b in itertools.pairwise(ends)):
        raise ArgumentError(f"cu_seqlens_{side}", ends, f"rise from 0 to the packed length {total}")
    longest = max((b - a for a, b in itertools.pairwise(ends)), default=0)
    if max_seqlen < longest:
        raise ArgumentError(f"max_seqlen_{side}", max_seqlen, f"be at least the longest sequence, {longest}")


def make_scores(
    q: Tensor,
    *,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Scores:
    """Check how scores are to be made, in Python's types or NumPy's; the default scale is 1 / sqrt(head_dim)."""
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    softmax_scale = number("softmax_scale", softmax_scale, "a number or None")
    if not 0 < softmax_scale <= sys.float_info.max:  # comparisons trace with symbolic floats, math.isfinite does not
        raise ArgumentError("softmax_scale", f"{softmax_scale!r:.50}", "be a finite number > 0")
    softcap = number("softcap", softcap)
    if not 0 <= softcap <= sys.float_info.max:
        raise ArgumentError("softcap", f"{softcap!r:.50}", "be a finite number >= 0 (0 = off)")
    causal = check_flag("causal", causal)
    left, right = check_window(window_size)
    if causal and right >= 0:
        right = -1  # the causal mask is at least as strict
    return Scores(float(softmax_scale), causal, (left, right), float(softcap))


def check_window(window_size: object) -> tuple[int, int]:
    """(left, right) of anything that holds two ints >= -1, a tensor or an array for one."""
    if hasattr(window_size, "tolist"):
        window_size = window_size.tolist()
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ArgumentError("window_size", repr(window_size), "be (left, right), -1 for unbounded")
    left, right = (plain(w) for w in window_size)
    if not (is_integer(left) and is_integer(right) and left >= -1 and right >= -1):
        raise ArgumentError("window_size", repr(tuple(window_size)), "hold two ints >= -1 (-1 = unbounded)")
    return left, right


def check_longest(name: str, value: object) -> int:
    """A longest sequence as an int, or ``UNKNOWN_LENGTH`` for a tensor or array while a graph is traced."""
    if torch.compiler.is_compiling() and not isinstance(value, int) and getattr(value, "shape", None) in ((), (1,)):
        return UNKNOWN_LENGTH
    found = plain(value)
    if not is_integer(found) or found < 0:
        raise ArgumentError(name, repr(found), "be an int >= 0")
    return found


def check_flag(name: str, value: object) -> bool:
    """A bool, Python's or NumPy's, as Python's; else a ``TypeError``."""
    value = plain(value)
    if not isinstance(value, bool):
        raise ArgumentTypeError(name, kind(value), "be a bool")
    return value


def check_dropout(dropout_p: float) -> None:
    """Raise on dropout: no backend has it."""
    if plain(dropout_p) != 0:
        raise ArgumentError("dropout_p", dropout_p, "be 0.0: these kernels have no dropout")
