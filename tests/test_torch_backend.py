"""Windows, soft-caps and dense masks, of which only the torch backend has all, and that no backend holds Sq x Sk."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sar_fast import Visibility
from sar_fast.attention import ops
from tests.helpers import BACKENDS, assert_forward, assert_gradients, dtype_id, make_case, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {
    "window": {"window_size": (9, -1)},
    "window both sides": {"window_size": (7, 4), "causal": False},
    "window right": {"window_size": (-1, 3), "causal": False},
    "own key only": {"window_size": (0, 0)},
    "softcap": {"softcap": 2.0},
    "softcap and window": {"softcap": 1.0, "window_size": (12, -1)},
    "softcap, full": {"softcap": 3.0, "causal": False},
}


WHERE = [
    pytest.param(options, backend, id=f"{name}-{backend}")
    for name, options in OPTIONS.items()
    for backend in BACKENDS
    if backend == "torch" or "softcap" not in options
]


@pytest.mark.parametrize("padding", ["none", "holes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize(("options", "backend"), WHERE)
def test_window_and_softcap(options, backend, dtype, padding):
    """A window makes V_i a strict part of V, and leaves text queries that no longer count."""
    case = make_case(41, H=6, dtype=dtype, padding=padding, beta=0.05, **options)
    assert_forward(case, backend)
    assert_gradients(case, backend, sav_grad=True)


@pytest.mark.everyday(Sq=[9, 300])
@pytest.mark.parametrize(("Sq", "Sk"), [(9, 37), (37, 9), (150, 300), (300, 150)])
@pytest.mark.parametrize(("options", "backend"), WHERE)
def test_window_and_softcap_with_other_lengths(options, backend, Sq, Sk):
    """Also where queries come in several blocks."""
    case = make_case(Sq, Sk, dtype=torch.float32, beta=0.05, **options)
    assert_forward(case, backend)
    assert_gradients(case, backend, sav_grad=False)


def random_mask(batch: int, Sq: int, Sk: int) -> torch.Tensor:
    """(batch, 1, Sq, Sk) bool with rows that see nothing and rows that see everything."""
    mask = torch.rand(batch, 1, Sq, Sk, generator=torch.Generator().manual_seed(9)) < 0.6
    mask[:, :, 2], mask[:, :, 5] = False, True
    return mask


@pytest.mark.parametrize("sav_grad", [False, True], ids=["constant", "sav_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("batch", [1, 3], ids=["broadcast", "per sample"])
@pytest.mark.parametrize("options", [{"causal": False}, {"causal": True, "padding": "left"}], ids=["full", "causal"])
def test_dense_mask(options, batch, dtype, sav_grad):
    case = make_case(34, dtype=dtype, attn_mask=random_mask(batch, 34, 34), beta=0.05, **options)
    out, stats = assert_forward(case, "torch")
    assert not out[:, 2].any()
    assert (stats.lse[..., 2] == -torch.inf).all()
    grads = assert_gradients(case, "torch", sav_grad=sav_grad)
    assert not grads["q"][:, 2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("options", [{"window_size": (60, -1)}, {"softcap": 400.0}], ids=["window", "softcap"])
def test_masked_statistics_survive_a_common_shift_of_the_keys(options, dtype):
    case = make_case(96, D=64, dtype=torch.float64, layouts=("image", "two_images"), **options)
    shift = torch.randn(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    case.k = case.k + 100 * case.k.std() * shift / shift.std()
    case = case.to(dtype)
    _, stats = case.run("torch")
    _, oracle = case.to(torch.float64).reference()
    assert relative_error(stats.alignment_variance, oracle.alignment_variance) <= 1e-3


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operator below the attention operators returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.names = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "sar_fast":
            name = func._opname
            self.names.add(name)
            implementation = {"attention_forward": ops._forward_impl, "attention_backward": ops._backward_impl}[name]
            with self:  # look inside the operator too
                return implementation(*args, **kwargs)
        result = func(*args, **kwargs)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                stored = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numel = max(self.numel, stored)
        return result


MEMORY = {
    "causal": {},
    "padding": {"padding": "left"},
    "window": {"window_size": (1500, -1)},
    "chunks": {"visibility": Visibility(chunk=2000)},
    "prefix": {"visibility": Visibility(prefix=torch.tensor([1000]))},
    "softcap": {"softcap": 5.0},
    "full": {"causal": False},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MEMORY)
def test_memory_stays_below_queries_times_keys(backend, name):
    """Forward and backward at 3,072 tokens: no tensor as large as one head's Sq x Sk, masks included."""
    options = MEMORY[name]
    if backend == "composed" and name == "softcap":
        pytest.skip("has no soft-cap")
    S = 3072
    case = make_case(S, H=2, Hkv=1, D=8, layouts=("image",), **options)
    case.text[:, : S - 200] = False
    case = case.leaves()
    with LargestTensor() as largest:
        out, _ = case.run(backend, sav_grad=True)
        out.sum().backward()
    assert largest.names == {"attention_forward", "attention_backward"}
    assert S * 16 <= largest.numel < S * S


def test_the_memory_test_would_see_a_full_score_matrix():
    case = make_case(256, H=2, Hkv=1, D=8, layouts=("image",))
    with LargestTensor() as largest:
        case.reference()
    assert largest.numel >= 256 * 256
