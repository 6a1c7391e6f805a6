"""A prior's values are checked, on a GPU without waiting for it: what arrives late raises late, not never."""

from __future__ import annotations

import math

import pytest
import torch

from sar_fast import sar_attn_func, sar_attn_varlen_func
from sar_fast.lab.measure.timing import attention_inputs
from sar_fast.method import value_checks
from sar_fast.method.value_checks import LaterChecks, check_prior_values


class Travelling:
    """A range on its way from a GPU."""

    def __init__(self, low: float, high: float) -> None:
        self.range, self.here = (low, high), False

    def arrived(self) -> bool:
        return self.here

    def values(self) -> tuple[float, float]:
        assert self.here, "looked at before it arrived: a GPU would have been waited for"
        return self.range


@pytest.mark.parametrize("values", [(-0.1, 0.5), (0.0, math.inf), (math.nan, math.nan), (-math.inf, 0.2)])
def test_a_bad_prior_raises_once_it_has_arrived(values):
    checks, bad, good = LaterChecks(), Travelling(*values), Travelling(0.0, 1.0)
    checks.add(bad)
    checks.add(good)
    checks.raise_arrived()  # nothing has arrived, nothing is known
    good.here = True
    checks.raise_arrived()  # in the order of the calls
    bad.here = True
    with pytest.raises(ValueError, match=r"prior must be finite and non-negative; got values .* in an earlier call"):
        checks.raise_arrived()
    checks.raise_arrived()  # told once
    assert not checks._pending


def test_good_priors_are_forgotten():
    checks = LaterChecks()
    for _ in range(100):
        checks.raise_arrived()
        checks.add(found := Travelling(0.0, 1.0))
        found.here = True
    assert len(checks._pending) == 1


@pytest.mark.parametrize("value", [-1e-6, math.nan, math.inf, -math.inf])
def test_on_a_cpu_at_once(value):
    prior = torch.tensor([[0.5, 0.5, value]])
    with pytest.raises(ValueError, match="prior must be finite and non-negative; got values from"):
        check_prior_values(prior, wait=False)
    check_prior_values(prior[:, :2])
    check_prior_values(prior[:, :0])


def test_a_call_and_a_backward_pass_tell_of_an_earlier_prior(monkeypatch):
    """The public functions look at what has arrived."""
    inputs = attention_inputs(64, 16, torch.float64, heads=2, kv_heads=1, head_dim=8)
    q = inputs[0].requires_grad_()
    out = sar_attn_func(q, *inputs[1:])
    later = LaterChecks()
    monkeypatch.setattr(value_checks, "_later", later)

    def bad_arrives() -> None:
        later.add(found := Travelling(-1.0, 1.0))
        found.here = True

    bad_arrives()
    with pytest.raises(ValueError, match="in an earlier call"):
        out.sum().backward()
    bad_arrives()
    packed = [x.detach()[0] for x in inputs[:3]]
    cu = torch.tensor([0, 64], dtype=torch.int32)
    with pytest.raises(ValueError, match="in an earlier call"):
        sar_attn_varlen_func(*packed, cu, cu, 64, 64, *(x[0] for x in inputs[3:]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: there is nothing to wait for on a CPU")
def test_a_gpu_is_not_waited_for():
    inputs = attention_inputs(1024, 576, torch.bfloat16, heads=8, kv_heads=2, head_dim=64, device="cuda")
    sar_attn_func(*inputs, backend="triton")  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sar_attn_func(*inputs, backend="triton")
        negative = (*inputs[:5], inputs[5] - 0.1)
        out = sar_attn_func(*negative, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isnan().any()
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="in an earlier call"):
        sar_attn_func(*inputs, backend="triton")
