"""Which kernels a decode call launches, with every argument, and the memory that they need."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sar_kernels.call import DTYPES, MAX_HEAD_DIM, AttentionOptions, WeightOptions
from sar_kernels.configs import KernelConfig, device_arch, padded_head_dim
from sar_kernels.decode.cache import check_cache, strides
from sar_kernels.decode.configs import MAX_SPLITS, cache_layout, choose_decode, combine_config, num_splits_for
from sar_kernels.decode.kernels import decode_combine_kernel, decode_split_kernel
from sar_kernels.launch import Launch
from sar_kernels.masks import NO_MASKS, Masks


@dataclass(frozen=True)
class DecodeWorkspace:
    """Where one decode call computes and returns: results are valid until the next call with the same workspace.

    out (B, Sq, H, DV) in q's dtype; all else fp32: lse (B, H, Sq), av, sa, c (B, H), count (B,);
    partial_out (B, H, Sq, splits, DV), partials (5, B, H, Sq, splits), carried (B, 2 H + 1).
    """

    out: torch.Tensor
    lse: torch.Tensor
    av: torch.Tensor
    sa: torch.Tensor
    c: torch.Tensor
    count: torch.Tensor
    partial_out: torch.Tensor
    partials: torch.Tensor
    carried: torch.Tensor

    @property
    def num_splits(self) -> int:
        return self.partials.shape[-1]


def _shapes(batch: int, seqlen_q: int, heads: int, head_dim_v: int, num_splits: int) -> dict[str, tuple[int, ...]]:
    rows = batch, heads, seqlen_q
    return {
        "out": (batch, seqlen_q, heads, head_dim_v),
        "lse": rows,
        **dict.fromkeys(("av", "sa", "c"), (batch, heads)),
        "count": (batch,),
        "partial_out": (*rows, num_splits, head_dim_v),
        "partials": (5, *rows, num_splits),
        "carried": (batch, 2 * heads + 1),
    }


@functools.cache
def _sm_count(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small number for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def decode_workspace(
    batch_size: int,
    seqlen_q: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_length: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    head_dim_v: int | None = None,
    num_splits: int | None = None,
    arch: str | None = None,
    sm_count: int | None = None,
) -> DecodeWorkspace:
    """All memory that decode calls of these sizes need beside their inputs.

    Args:
        max_length: the cache's capacity in keys. head_dim_v: v's head dim if it is not q's.
        num_splits: pieces to cut the keys into; by default from the number of multiprocessors and the sizes.
        arch, sm_count: plan for another device than `device`, as the ahead-of-time check does.

    Raises:
        ValueError: num_heads is no multiple of num_kv_heads, or num_splits is less than 1.
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads: got {num_heads}, need a multiple of num_kv_heads = {num_kv_heads}")
    device = torch.device(device)
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    if num_splits is None:
        rows = seqlen_q * num_heads // num_kv_heads
        block_m = _config(arch or device_arch(device), head_dim, head_dim_v, dtype, rows).block_m
        tiles = triton.cdiv(rows, block_m)
        num_splits = num_splits_for(sm_count or _sm_count(device), batch_size, num_kv_heads, max_length, tiles)
    if num_splits < 1:
        raise ValueError(f"num_splits: got {num_splits}, need 1 or more")
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = _shapes(batch_size, seqlen_q, num_heads, head_dim_v, num_splits)
    return DecodeWorkspace(
        **{name: torch.empty(s, dtype=dtype if name == "out" else acc, device=device) for name, s in shapes.items()}
    )


def _config(
    arch: str, head_dim: int, head_dim_v: int, dtype: torch.dtype, rows: int, page_size: int = 0
) -> KernelConfig:
    return choose_decode(arch, padded_head_dim(max(head_dim, head_dim_v)), dtype, rows, cache_layout(page_size))


class DecodeCall:
    """One decode call's checked tensors and sizes.

    `masks` say what the options' window does not. `arch` and `sm_count` plan for another device than q's, `config`
    takes another tile than the chosen one.
    """

    def __init__(
        self,
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        options: AttentionOptions,
        block_table=None,
        num_splits: int | None = None,
        workspace: DecodeWorkspace | None = None,
        masks: Masks = NO_MASKS,
        arch: str | None = None,
        sm_count: int | None = None,
        config: KernelConfig | None = None,
    ):
        self.capacity = check_cache("q", q, k_cache, v_cache, cache_seqlens, block_table)
        self.q, self.k, self.v, self.lengths, self.table = q, k_cache, v_cache, cache_seqlens, block_table
        self.options = options
        self.batch, self.seqlen_q, self.heads, self.head_dim = q.shape
        self.kv_heads, self.head_dim_v = v_cache.shape[2:]
        if q.dtype not in DTYPES:
            raise ValueError(f"q: got dtype {q.dtype}, need one of {DTYPES}")
        if self.kv_heads == 0 or self.heads % self.kv_heads:
            raise ValueError(f"q: got {self.heads} heads, need a multiple of the cache's {self.kv_heads}")
        largest = max(self.head_dim, self.head_dim_v)
        if k_cache.shape[-1] != self.head_dim or largest > MAX_HEAD_DIM or min(self.head_dim, self.head_dim_v) < 1:
            raise ValueError(
                f"head dim: got {self.head_dim} (q), {k_cache.shape[-1]} (k_cache), {self.head_dim_v} (v_cache), "
                f"need q's and k_cache's equal and all in 1..{MAX_HEAD_DIM}"
            )
        self.group = self.heads // self.kv_heads
        self.arch = arch or device_arch(q.device)
        page_size = 0 if block_table is None else k_cache.shape[1]
        self.config = config or _config(
            self.arch, self.head_dim, self.head_dim_v, q.dtype, self.group * self.seqlen_q, page_size
        )
        self.workspace = self._workspace(workspace, num_splits, sm_count)
        self.masks = masks.checked((self.batch, self.seqlen_q), (self.batch, self.capacity), q.device, options.window)
        self.state: dict[str, Any] = {}
        self.sums_out: dict[str, Any] = {}
        self.visual = self.text = self.prior = None

    def _workspace(self, workspace, num_splits, sm_count) -> DecodeWorkspace:
        if workspace is None:
            return decode_workspace(
                *self.q.shape[:3],
                self.kv_heads,
                self.head_dim,
                self.capacity,
                dtype=self.q.dtype,
                device=self.q.device,
                head_dim_v=self.head_dim_v,
                num_splits=num_splits,
                arch=self.arch,
                sm_count=sm_count,
            )
        if num_splits not in (None, workspace.num_splits):
            raise ValueError(f"num_splits: got {num_splits}, need the workspace's {workspace.num_splits} or None")
        shapes = _shapes(self.batch, self.seqlen_q, self.heads, self.head_dim_v, workspace.num_splits)
        for name, shape in shapes.items():
            tensor, dtype = getattr(workspace, name), self.q.dtype if name == "out" else self.acc
            if tensor.shape != shape or tensor.dtype != dtype or tensor.device != self.q.device:
                raise ValueError(
                    f"workspace.{name}: got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                    f"need {dtype} {shape} on {self.q.device}"
                )
        return workspace

    @property
    def acc(self) -> torch.dtype:
        """The accumulators' dtype: fp32, but for fp64 in the interpreter."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def set_state(self, av_sum, sa_sum, count, head_weights) -> None:
        """Checks the state tensors."""
        self.state = self._checked_state(av_sum=av_sum, sa_sum=sa_sum, count=count, head_weights=head_weights)

    def set_sums_out(self, av_sum, sa_sum, count) -> None:
        """Checks where "running" puts the new sums; without, over the old ones."""
        self.sums_out = self._checked_state(av_sum=av_sum, sa_sum=sa_sum, count=count)

    def _checked_state(self, **tensors) -> dict[str, Any]:
        for name, tensor in tensors.items():
            if tensor is None:  # the mode reads none
                continue
            shape = (self.batch,) if name == "count" else (self.batch, self.heads)
            if (
                tensor.dtype != torch.float32
                or tensor.shape != shape
                or tensor.device != self.q.device
                or not tensor.is_contiguous()
            ):
                raise ValueError(
                    f"{name}: got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                    f"need contiguous torch.float32 {shape} on {self.q.device}"
                )
        return {f"{name}_ptr": tensor for name, tensor in tensors.items()}

    def set_roles(self, visual_mask, text_mask, prior) -> None:
        """Checks the masks and the prior."""
        keys, queries = (self.batch, self.capacity), (self.batch, self.seqlen_q)
        for name, tensor, shape in (
            ("visual_mask", visual_mask, keys),
            ("text_mask", text_mask, queries),
            ("prior", prior, keys),
        ):
            if tensor is None:
                raise ValueError(f'{name}: got None, need a tensor {shape} unless mode is "prompt"')
            fits = tensor.is_floating_point() if name == "prior" else tensor.dtype == torch.bool
            if not fits or tensor.shape != shape or tensor.device != self.q.device or tensor.stride(-1) != 1:
                raise ValueError(
                    f"{name}: got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, need "
                    f"{'floating point' if name == 'prior' else 'torch.bool'} {shape} on {self.q.device} with a dense "
                    f"last dimension"
                )
        self.visual, self.text, self.prior = visual_mask, text_mask, prior

    def plan(self, mode: str, weights: WeightOptions | None = None) -> list[Launch]:
        """The two launches of a step; mode "plain" leaves the heads as they are."""
        return [self._plan_split(mode), self._plan_combine(mode, weights)]

    def _read(self, name: str, mode: str, *modes: str) -> Any:
        """A part of the state if the mode is one that reads it; to tell of it otherwise would be another kernel."""
        return self.state.get(name) if mode in modes else None

    def _shared(self, mode: str) -> dict[str, Any]:
        """Arguments of both kernels."""
        sums = ("av_sum_ptr", "sa_sum_ptr", "count_ptr")
        return {
            **self._edges(),
            "lengths_ptr": self.lengths,
            "partial_out_ptr": self.workspace.partial_out,
            "partials_ptr": self.workspace.partials,
            "carried_ptr": self.workspace.carried,
            **{name: self._read(name, mode, "running", "prompt") for name in sums},
            "plane": self.workspace.partials[0].numel(),
            "capacity": self.capacity,
            "seqlen_q": self.seqlen_q,
            "num_heads": self.heads,
            "HEAD_DIM_V": self.head_dim_v,
            "BLOCK_DV": padded_head_dim(self.head_dim_v),
            "BLOCK_N": self.config.block_n,
            "BLOCK_H": triton.next_power_of_2(self.heads),
            "ACC": tl.float64 if self.acc == torch.float64 else tl.float32,
        }

    def _edges(self) -> dict[str, Any]:
        """The queries' edges, and a tile for all queries where they are read."""
        edges = self.masks.edge_arguments(self.options.window)
        read = edges["first_ptr"] is not None or edges["end_ptr"] is not None
        return {**edges, "BLOCK_Q": triton.next_power_of_2(max(1, self.seqlen_q)) if read else 1}

    def _plan_split(self, mode: str) -> Launch:
        stride_b = lambda tensor: 0 if tensor is None else tensor.stride(0)
        arguments = {
            **self._shared(mode),
            "q_ptr": self.q,
            "k_ptr": self.k,
            "v_ptr": self.v,
            "table_ptr": self.table,
            "visual_ptr": self.visual,
            "prior_ptr": self.prior,
            **strides("q", self.q),
            **strides("k", self.k),
            **strides("v", self.v),
            "stride_table_b": stride_b(self.table),
            "stride_visual_b": stride_b(self.visual),
            "stride_prior_b": stride_b(self.prior),
            **self.masks.bit_arguments(),
            "padding_ptr": self.masks.padding,
            "stride_padding_b": stride_b(self.masks.padding),
            "HAS_PADDING": self.masks.padding is not None,
            "group": self.group,
            "softmax_scale": self.options.softmax_scale,
            "softcap": self.options.softcap,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": padded_head_dim(self.head_dim),
            "BLOCK_M": self.config.block_m,
            "PAGE": 0 if self.table is None else self.k.shape[1],
            "HAS_SOFTCAP": self.options.softcap > 0,
            "STATISTICS": mode in ("step", "running"),
            "RUNNING": mode == "running",
            "PRECISION": "ieee",  # TF32 would not hold the tolerances for fp32 inputs
        }
        # One row tile even without a query: the first program also copies the state.
        tiles = max(1, triton.cdiv(self.group * self.seqlen_q, self.config.block_m))
        grid = (self.batch * self.kv_heads, self.workspace.num_splits, tiles)
        return Launch(decode_split_kernel, grid, arguments, self.config)

    def _plan_combine(self, mode: str, weights: WeightOptions | None) -> Launch:
        splits, shared = self.workspace.num_splits, self._shared(mode)
        outputs = ("out", "lse", "av", "sa", "c")
        arguments = {
            **shared,
            **self.sums_out,
            "text_ptr": self.text,
            "stride_text_b": 0 if self.text is None else self.text.stride(0),
            "head_weights_ptr": self._read("head_weights_ptr", mode, "prompt"),
            **{f"{name}_ptr": getattr(self.workspace, name) for name in outputs},
            "count_out_ptr": self.workspace.count,
            "num_splits": splits,
            "beta": 1.0 if weights is None else weights.beta,
            # Not by the number of splits: that follows the cache's length, which must not compile another kernel.
            "BLOCK_S": max(1, min(MAX_SPLITS, 512 // shared["BLOCK_H"])),
            "BLOCK_O": max(1, min(MAX_SPLITS, 2048 // shared["BLOCK_DV"])),
            "PROTECT_FIRST": weights is not None and weights.protect_first_head,
            "STANDARDIZE": weights is not None and weights.normalize == "standardize",
            "MODE": mode,
        }
        return Launch(decode_combine_kernel, (self.batch, self.heads), arguments, combine_config(self.arch))
