"""Backend ``"composed"`` on a GPU: the output of another library, statistics and weights of this project's kernels.

Whole batches, and nothing waits. SAR needs of the library its log-sum-exp alone (docs/method.md, section 7). A padded
batch becomes a packed one by sorting, since lengths stay on the device; a causal one's padding queries, which the
packed batch has no room for, are left to the Triton kernels, which pass by all other rows. So are decode steps: their
combine kernel has what statistics need, which after a library's step would take another pass over the cache. Where
Triton is not installed, dense batches get their statistics from PyTorch, which waits for the number of text queries.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from sar_fast.backends import batched, kernel_calls
from sar_fast.backends.protocol import Gradients, Request, nothing_computed
from sar_fast.backends.providers.choice import refusal
from sar_fast.backends.providers.protocol import Provider
from sar_fast.backends.triton import Triton, is_step
from sar_fast.method.kvcache import Step
from sar_fast.method.values import Bounds, Call, Result
from sar_fast.method.weighting.constant import Equal
from sar_fast.method.weighting.softmax import Lowered


class WholeBatch:
    """A provider's attention and the kernels beside it, as a backend."""

    waits = False
    on_cpu = False

    def __init__(self, provider: Provider, kernels: Triton) -> None:
        self.provider, self.kernels = provider, kernels
        self.name = f"composed:{provider.name}"

    def unsupported(self, request: Request) -> str | None:
        absent = kernel_calls.missing()
        if absent is None or request.decode or request.packed or request.padded:
            reason = self.kernels.unsupported(request)
            if reason is not None or request.decode:
                return reason
        if request.masked or request.bounded:
            return "attn_mask and visibility: providers take neither"
        if request.padded and request.scores.windowed:
            return "a window together with padding: packing changes distances where padding has holes"
        packed = dataclasses.replace(request, packed=True) if request.padded else request
        return refusal(self.provider, packed)

    def forward(self, call: Call, rule: Lowered, *, need_lse: bool) -> Result:
        if is_step(call) and kernel_calls.missing() is None:
            return self.kernels.forward(call, rule, need_lse=need_lse)
        plain = call.plain()
        if call.key_padding_mask is None:
            out, lse = self._attend(plain)
        else:
            out, lse = _Packed(plain).forward(self._attend, self.kernels)
        if call.roles is None:
            result = Result(out, lse, *nothing_computed(out, lse.dtype))
        else:
            result = _beside().reweighted(call, rule, out, lse)
        return result if need_lse else result._replace(lse=lse.new_empty(0))

    def backward(
        self, call: Call, rule: Lowered, grad_out: Tensor, result: Result, through: Gradients | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        plain, (out, lse, _, c, _) = call.plain(), result
        grad, kept, beside = grad_out, None, _beside()
        if call.roles is not None:
            grad, out, kept = beside.unscaled(call, grad, out, c, through=through is not None)
        if call.key_padding_mask is None:
            dq, dk, dv = self._attend_backward(plain, grad, out, lse)
        else:
            dq, dk, dv = _Packed(plain).backward(self._attend_backward, self.kernels, grad, out, lse)
        dprior = out.new_empty(0, dtype=lse.dtype)
        if call.roles is not None and through is not None:
            more_dq, more_dk, dprior = beside.statistics_backward(call, rule, grad_out, result, through, kept)
            dq, dk = (dq + more_dq).to(dq.dtype), (dk + more_dk).to(dk.dtype)
        return dq.contiguous(), dk.contiguous(), dv.contiguous(), dprior

    def mass(self, call: Call, lse: Tensor, chosen: Tensor) -> Tensor | None:
        return self.kernels.mass(call, lse, chosen)

    def decode(self, step: Step, *, need_lse: bool) -> Result:
        return self.kernels.decode(step, need_lse=need_lse)

    def _attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """out, contiguous, and lse, -inf where a query sees no key, as this project has it."""
        if call.q.shape[-3] == 0 or call.k.shape[-3] == 0:
            return _sees_nothing(call)
        out, lse = self.provider.forward(_dense(call))
        if _hides_rows(call):
            lse = torch.where(lse.isinf(), -torch.inf, lse)
        return out.contiguous(), lse

    def _attend_backward(self, call: Call, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if call.q.shape[-3] == 0 or call.k.shape[-3] == 0:
            return tuple(torch.zeros_like(x) for x in (call.q, call.k, call.v))
        if _hides_rows(call):
            lse = torch.where(lse.isinf(), torch.inf, lse)
        return self.provider.backward(_dense(call), grad, out, lse)


def _beside() -> ModuleType:
    """What computes statistics and weights, and their gradients: the kernels, or PyTorch where Triton is missing."""
    return kernel_calls if kernel_calls.missing() is None else batched


def _dense(call: Call) -> Call:
    q, k, v = kernel_calls.dense_qkv(call)
    return dataclasses.replace(call, q=q, k=k, v=v)


def _hides_rows(call: Call) -> bool:
    """Whether some query may see no key: windows too have each query's own, if there are keys enough."""
    return call.packed or call.q.shape[1] > call.k.shape[1]


def _sees_nothing(call: Call) -> tuple[Tensor, Tensor]:
    out = call.q.new_zeros((*call.q.shape[:-1], call.v.shape[-1]))
    return out, call.q.new_full(call.lse_shape, -torch.inf, dtype=call.accumulate_dtype)


class _Packed:
    """A padded batch as packed sequences of its real tokens, by indices that never leave the device.

    Packed tensors keep room for every token, real ones first; what lies beyond the last sequence is never read.
    """

    def __init__(self, call: Call) -> None:
        self.padded = call
        keys, (queries, B, Sq, Sk) = call.key_padding_mask, self._sizes(call)
        self.keys, self.queries = keys, queries
        self.k_order, self.k_rank, cu_k = _sorted(keys)
        if queries is None:
            cu_q = torch.arange(0, (B + 1) * Sq, Sq, dtype=torch.int32, device=keys.device)
        else:
            self.q_order, self.q_rank, cu_q = _sorted(queries)
        k, v = (x.flatten(0, 1).index_select(0, self.k_order) for x in (call.k, call.v))
        self.call = Call(
            *(self._pack(call.q), k, v, call.scores), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlens=(Sq, Sk)
        )

    @staticmethod
    def _sizes(call: Call) -> tuple[Tensor | None, int, int, int]:
        """(real queries (B, Sq) bool, or None where all have a place, B, Sq, Sk)."""
        B, Sq, Sk = *call.q.shape[:2], call.k.shape[1]
        if not call.scores.causal:
            return None, B, Sq, Sk
        # query i stands where key i + Sk - Sq does; older queries than all keys see nothing
        return F.pad(call.key_padding_mask, (Sq - Sk, 0)), B, Sq, Sk

    def _pack(self, x: Tensor) -> Tensor:
        """(B, Sq, ...) to (B * Sq, ...), real queries first."""
        rows = x.flatten(0, 1)
        return rows if self.queries is None else rows.index_select(0, self.q_order)

    def _unpack(self, x: Tensor) -> Tensor:
        """Back, with anything for queries that are not real."""
        rows = x if self.queries is None else x.index_select(0, self.q_rank)
        return rows.unflatten(0, self.padded.q.shape[:2])

    def _rest(self) -> Call:
        """The padded batch in which only queries that are not real see their keys."""
        call, Sq, Sk = self.padded, self.padded.q.shape[1], self.padded.k.shape[1]
        end = torch.arange(1 + Sk - Sq, 1 + Sk, dtype=torch.int32, device=call.q.device).clamp(min=0)
        bounds = Bounds(None, torch.where(self.queries, 0, end))
        return dataclasses.replace(call, scores=dataclasses.replace(call.scores, causal=False), bounds=bounds)

    def forward(self, attend, kernels: Triton) -> tuple[Tensor, Tensor]:
        """out and lse of the padded batch; attend: as `WholeBatch._attend`, on packed sequences."""
        out, lse = attend(self.call)
        out, lse = self._unpack(out), self._unpack(lse.T).transpose(1, 2)  # [B, Sq, H, Dv], [B, H, Sq]
        if self.queries is None:
            return out, lse.contiguous()
        rest = kernels.forward(self._rest(), Equal(), need_lse=True)
        out = torch.where(self.queries[..., None, None], out, rest.out)
        return out, torch.where(self.queries[:, None], lse, rest.lse)

    def backward(self, attend_backward, kernels: Triton, grad, out, lse) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of that; attend_backward: as `WholeBatch._attend_backward`."""
        packed = (self._pack(x) for x in (grad, out))
        dq, dk, dv = attend_backward(self.call, *packed, self._pack(lse.transpose(1, 2)).T.contiguous())
        keys = self.keys[..., None, None]
        back = lambda x: x.index_select(0, self.k_rank).unflatten(0, self.keys.shape)
        dk, dv = (torch.where(keys, back(x), 0) for x in (dk, dv))
        if self.queries is None:
            return self._unpack(dq), dk, dv
        nothing = nothing_computed(grad, lse.dtype)
        rest_lse = lse.masked_fill(self.queries[:, None], -torch.inf)
        rest = kernels.backward(self._rest(), Equal(), grad, Result(out, rest_lse, *nothing), None)
        dq = torch.where(self.queries[..., None, None], self._unpack(dq), rest[0])
        return dq, dk + rest[1], dv + rest[2]


def _sorted(real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of tokens (B, S) bool: indices that bring real ones to the front, each token's place there, and cu_seqlens."""
    flat = real.flatten()
    order = torch.argsort(~flat, stable=True)
    rank = (flat.cumsum(0) - 1).clamp_(min=0)
    return order, rank, F.pad(real.sum(1).cumsum(0, dtype=torch.int32), (1, 0))
