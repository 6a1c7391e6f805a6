"""The real libraries on a GPU, those that are there: outputs, statistics, gradients, and capture in a graph."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sar_fast import sar_attn_func
from sar_fast.backends.protocol import Request
from sar_fast.backends.providers.choice import PROVIDERS, refusal
from tests.helpers import Case, assert_forward, assert_gradients, make_case, max_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def on_gpu(**given) -> Case:
    case = make_case(300, **{"D": 64, "dtype": torch.bfloat16, **given})
    move = lambda x: x.cuda() if isinstance(x, torch.Tensor) else x
    tensors = {n: move(getattr(case, n)) for n in ("q", "k", "v", "visual", "text", "prior")}
    return dataclasses.replace(case, **tensors, options={n: move(x) for n, x in case.options.items()})


def needed(name: str, case: Case, **more) -> str:
    """The backend's name; skips where the library is not there or lacks the call."""
    padded = "key_padding_mask" in case.options
    request = Request(case.q.device, case.q.dtype, head_dim=case.q.shape[-1], packed=padded, **more)
    reason = refusal(PROVIDERS[name], request)
    if reason is not None:
        pytest.skip(reason)
    return f"composed:{name}"


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", PROVIDERS)
def test_equals_the_reference(name, padding):
    case = on_gpu(padding=padding)
    backend = needed(name, case)
    assert_forward(case, backend)
    for sav_grad in (False, True):
        assert_gradients(case, backend, sav_grad=sav_grad)


@pytest.mark.parametrize("name", PROVIDERS)
def test_more_keys_than_queries(name):
    case = on_gpu(Sk=411)
    assert_forward(case, needed(name, case, square=False))


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", PROVIDERS)
def test_can_be_captured(name, padding):
    case = on_gpu(padding=padding)
    options = {**case.options, "backend": needed(name, case)}
    run = lambda: sar_attn_func(*case.tensors, **options)
    expected = run()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert max_error(out, expected) == 0
