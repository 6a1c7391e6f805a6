"""One attention call: its options, its checked arguments, and what all its kernels are told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sar_kernels.configs import KernelConfig, choose, device_arch, has_closed_form, length_class, padded_head_dim
from sar_kernels.masks import NO_MASKS, Masks

MAX_HEAD_DIM = 256
MAX_TOKEN_STRIDE = 2**24  # offsets inside a tile of up to 128 tokens are 32-bit
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # float64 only in the interpreter
NORMALIZE = ("none", "standardize")


@dataclass(frozen=True)
class AttentionOptions:
    """What plain attention needs to know.

    window_size (left, right) counts keys beside the diagonal, -1 = no limit; causal sets right to 0. softcap 0 = off.
    """

    causal: bool
    softmax_scale: float
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.softmax_scale) and self.softmax_scale > 0):
            raise ValueError(f"softmax_scale: got {self.softmax_scale}, need a positive number")
        if not (math.isfinite(self.softcap) and self.softcap >= 0):
            raise ValueError(f"softcap: got {self.softcap}, need 0 (off) or a positive number")

    @property
    def window(self) -> tuple[int, int]:
        """(left, right) with negative = no limit, and the causal mask as right = 0."""
        left, right = self.window_size
        return left, 0 if self.causal else right


@dataclass(frozen=True)
class WeightOptions:
    """How the statistics of the heads become their weights: c = H * softmax(SAV / beta), SAV perhaps standardised."""

    beta: float
    protect_first_head: bool = True
    normalize: str = "none"

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta: got {self.beta}, need a positive number")
        if self.normalize not in NORMALIZE:
            raise ValueError(f"normalize: got {self.normalize!r}, need one of {NORMALIZE}")


class Call:
    """One call's tensors seen as 4-dimensional, its sizes, and the arguments that all its kernels share."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        options: AttentionOptions,
        masks: Masks = NO_MASKS,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        *,
        arch: str | None = None,
        configs: Mapping[str, KernelConfig] | None = None,
        closed_form: bool | None = None,
    ):
        """arch: other than the device's, to compile for it; configs, closed_form: instead of the chosen ones."""
        self.varlen = cu_seqlens_q is not None
        self._check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        self.q, self.k, self.v = (dense_last(t) for t in (q, k, v))
        self.options = options
        self.heads, self.head_dim = q.shape[-2:]
        self.kv_heads, self.head_dim_v = v.shape[-2:]
        if self.varlen:
            self.batch = cu_seqlens_q.shape[0] - 1
            self.max_q, self.max_k = int(max_seqlen_q), int(max_seqlen_k)
        else:
            self.batch, self.max_q, self.max_k = q.shape[0], q.shape[1], k.shape[1]
        self.cu_q, self.cu_k = cu_seqlens_q, cu_seqlens_k
        rank = 1 if self.varlen else 2
        self.masks = masks.checked(tuple(q.shape[:rank]), tuple(k.shape[:rank]), q.device, options.window)
        self.padding = self.masks.padding
        self.arch = arch or device_arch(q.device)
        self.configs = configs or {}
        self.closed_form = closed_form
        if closed_form is None:
            self.closed_form = has_closed_form(self.max_k, options.softcap)
        self.acc = torch.float64 if q.dtype == torch.float64 else torch.float32

    def _check(self, q, k, v, cu_q, cu_k, max_q, max_k) -> None:
        rank = 3 if self.varlen else 4
        layout = "(tokens, heads, head_dim)" if self.varlen else "(batch, seqlen, heads, head_dim)"
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if tensor.ndim != rank:
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, need {layout}")
            if tensor.dtype != q.dtype or tensor.device != q.device:
                raise ValueError(f"{name}: got {tensor.dtype} on {tensor.device}, need q's {q.dtype} on {q.device}")
        if q.dtype not in DTYPES:
            raise ValueError(f"q: got dtype {q.dtype}, need one of {DTYPES}")
        if k.shape[:-1] != v.shape[:-1] or (not self.varlen and k.shape[0] != q.shape[0]):
            raise ValueError(
                f"k, v: got shapes {tuple(k.shape)} and {tuple(v.shape)} for q {tuple(q.shape)}, need them equal "
                "but for the head dim, with q's batch size"
            )
        if k.shape[-1] != q.shape[-1] or not 1 <= q.shape[-1] <= MAX_HEAD_DIM or not 1 <= v.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"head dim: got {q.shape[-1]} (q), {k.shape[-1]} (k), {v.shape[-1]} (v), need q's and k's equal "
                f"and all at most {MAX_HEAD_DIM}"
            )
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            self._check_token_stride(name, tensor)
        if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
            raise ValueError(f"heads: got {q.shape[-2]} query heads, need a multiple of the {k.shape[-2]} kv heads")
        if not self.varlen:
            return
        if cu_k is None or max_q is None or max_k is None:
            raise ValueError("cu_seqlens_k, max_seqlen_q, max_seqlen_k: got None, need all of them with cu_seqlens_q")
        for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
            if cu.dtype != torch.int32 or cu.shape != cu_q.shape or not cu.is_contiguous():
                raise ValueError(f"{name}: got {cu.dtype} {tuple(cu.shape)}, need contiguous int32 (num_seqs + 1,)")

    @staticmethod
    def _check_token_stride(name: str, tensor: torch.Tensor) -> None:
        if tensor.shape[-3] > 1 and tensor.stride(-3) >= MAX_TOKEN_STRIDE:
            raise ValueError(f"{name}: got token stride {tensor.stride(-3)}, need less than {MAX_TOKEN_STRIDE}")

    def token_mask(self, name: str, mask: torch.Tensor, *, keys: bool) -> torch.Tensor:
        """A boolean per-token mask, checked and contiguous."""
        expected = (self.k if keys else self.q).shape[: 1 if self.varlen else 2]
        if mask.dtype != torch.bool or mask.shape != expected or mask.device != self.q.device:
            raise ValueError(
                f"{name}: got {mask.dtype} {tuple(mask.shape)} on {mask.device}, "
                f"need torch.bool {tuple(expected)} on {self.q.device}"
            )
        return mask.contiguous()

    def token_prior(self, prior: torch.Tensor) -> torch.Tensor:
        """The prior over keys in the statistics' dtype, checked and contiguous."""
        expected = self.k.shape[: 1 if self.varlen else 2]
        if not prior.is_floating_point() or prior.shape != expected or prior.device != self.q.device:
            raise ValueError(
                f"prior: got {prior.dtype} {tuple(prior.shape)} on {prior.device}, "
                f"need floating point {tuple(expected)} on {self.q.device}"
            )
        return prior.to(self.acc).contiguous()

    def row_array(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A caller's array with one entry per head and query (see `per_row`), checked and contiguous."""
        return self._given(name, tensor, self._row_shape(), self.acc).contiguous()

    def head_array(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The same for a per-head array (B, H)."""
        return self._given(name, tensor, (self.batch, self.heads), self.acc).contiguous()

    def sample_array(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The same for a per-sample array (B,)."""
        return self._given(name, tensor, (self.batch,), self.acc).contiguous()

    def output_array(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """An array of the output's shape and dtype that a caller gave, checked and with a dense last dimension."""
        tensor = dense_last(self._given(name, tensor, (*self.q.shape[:-1], self.head_dim_v), self.q.dtype))
        self._check_token_stride(name, tensor)
        return tensor

    def _given(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != self.q.device:
            raise ValueError(
                f"{name}: got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                f"need {dtype} {tuple(shape)} on {self.q.device}"
            )
        return tensor

    def _row_shape(self) -> tuple[int, ...]:
        return (self.heads, self.q.shape[0]) if self.varlen else (self.batch, self.heads, self.max_q)

    @property
    def triton_acc(self) -> tl.dtype:
        """Triton's name of the accumulators' dtype."""
        return tl.float64 if self.acc == torch.float64 else tl.float32

    def per_row(self) -> torch.Tensor:
        """A new fp32 array with one entry per head and query: (B, H, Sq) or (H, T)."""
        return torch.empty(self._row_shape(), dtype=self.acc, device=self.q.device)

    def per_head(self) -> torch.Tensor:
        """A new fp32 array (B, H)."""
        return torch.empty((self.batch, self.heads), dtype=self.acc, device=self.q.device)

    def strides(self, name: str, tensor: torch.Tensor) -> dict[str, int]:
        """Strides over batch, token and head as the kernels name them."""
        b, s, h = (0, *tensor.stride()[:2]) if self.varlen else tensor.stride()[:3]
        return {f"stride_{name}b": b, f"stride_{name}s": s, f"stride_{name}h": h}

    def row_strides(self) -> dict[str, int]:
        """Strides of `per_row` arrays over batch and head."""
        if self.varlen:
            return {"stride_lse_b": 0, "stride_lse_h": self.q.shape[0]}
        return {"stride_lse_b": self.heads * self.max_q, "stride_lse_h": self.max_q}

    def config(self, kernel: str, *, sav: bool) -> KernelConfig:
        """The configuration of one of this call's kernels; sav as in `configs.choose`."""
        if kernel in self.configs:
            return self.configs[kernel]
        head_dim = padded_head_dim(max(self.head_dim, self.head_dim_v))
        causal = self.options.window[1] >= 0 or self.masks.end is not None
        return choose(
            kernel,
            self.arch,
            head_dim,
            self.q.dtype,
            causal=causal,
            sav=sav,
            length=length_class(self.max_q),
            padded_and_capped=self.padding is not None and self.options.softcap > 0,
            bits=self.masks.packed is not None,
        )

    def grid(self, block_m: int) -> tuple[int, int, int]:
        """One program per row block, query head and sample."""
        return triton.cdiv(self.max_q, block_m), self.heads, self.batch

    def common(self) -> dict[str, Any]:
        """Arguments of every kernel that computes scores, but for its tile sizes."""
        return {
            "q_ptr": self.q,
            "k_ptr": self.k,
            "cu_seqlens_q_ptr": self.cu_q,
            "cu_seqlens_k_ptr": self.cu_k,
            "padding_ptr": self.padding,
            **self.strides("q", self.q),
            **self.strides("k", self.k),
            **self.row_strides(),
            "max_seqlen_q": self.max_q,
            "max_seqlen_k": self.max_k,
            "group": self.heads // self.kv_heads,
            **self.masks.edge_arguments(self.options.window),
            **self.masks.bit_arguments(),
            "softmax_scale": self.options.softmax_scale,
            "softcap": self.options.softcap,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": padded_head_dim(self.head_dim),
            "VARLEN": self.varlen,
            "HAS_PADDING": self.padding is not None,
            "HAS_SOFTCAP": self.options.softcap > 0,
            # TF32 keeps 10 bits of mantissa, which the tolerances for fp32 inputs do not allow.
            "PRECISION": "ieee",
            "ACC": self.triton_acc,
        }

    def values(self) -> dict[str, Any]:
        """Arguments of every kernel that reads v."""
        return {
            "v_ptr": self.v,
            **self.strides("v", self.v),
            "HEAD_DIM_V": self.head_dim_v,
            "BLOCK_DV": padded_head_dim(self.head_dim_v),
        }


def dense_last(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last dimension is dense, else a copy (an expanded gradient has stride 0)."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
