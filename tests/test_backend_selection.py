"""Which backend runs a call: by name, by ``SAR_BACKEND``, by what the call needs; never a silent fall-back."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from sar_fast import Visibility, sar_attn_func
from sar_fast.backends.protocol import Request
from sar_fast.backends.select import choose_backend
from tests.helpers import make_case

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _without_the_interpreter(monkeypatch):
    """As users run it: on a CPU the Triton kernels are not an option."""
    import sar_kernels.attention  # noqa: F401  (for the tests that come after, in the interpreter that they run in)

    monkeypatch.setenv("TRITON_INTERPRET", "0")


NEEDS_TORCH = {
    "softcap": {"softcap": 3.0},
    "attn_mask": {"attn_mask": torch.ones(1, 1, 12, 12, dtype=torch.bool)},
}


def backend_of(case, **changes) -> str:
    return case.run("auto", **changes)[1].backend


@pytest.mark.parametrize("options", [{}, {"window_size": (4, -1)}, {"visibility": Visibility(chunk=5)}], ids=str)
def test_auto_takes_the_fastest_that_supports_the_call(options):
    assert backend_of(make_case(12), **options) == "composed"


@pytest.mark.parametrize("name", NEEDS_TORCH)
def test_auto_takes_torch_for_options_that_the_fused_kernels_lack(name):
    assert backend_of(make_case(12, **NEEDS_TORCH[name])) == "torch"


@pytest.mark.parametrize("name", NEEDS_TORCH)
def test_a_named_backend_that_lacks_an_option_says_which_one_has_it(name):
    case = make_case(12, **NEEDS_TORCH[name])
    with pytest.raises(ValueError, match=rf"must be 'torch' here; got 'composed', which does not support {name}"):
        case.run("composed")


def test_triton_on_a_cpu_is_an_error_that_names_the_others():
    with pytest.raises(
        ValueError, match=r"backend must be 'composed' or 'torch' here; got 'triton', which does not support "
    ):
        make_case(12).run("triton")


@pytest.mark.parametrize("name", ["torch", "composed"])
def test_the_environment_replaces_auto(monkeypatch, name):
    monkeypatch.setenv("SAR_BACKEND", name)
    assert backend_of(make_case(12)) == name


def test_an_argument_outranks_the_environment(monkeypatch):
    monkeypatch.setenv("SAR_BACKEND", "torch")
    assert make_case(12).run("composed")[1].backend == "composed"


def test_the_environment_never_falls_back(monkeypatch):
    monkeypatch.setenv("SAR_BACKEND", "composed")
    with pytest.raises(
        ValueError, match=r"SAR_BACKEND must be 'torch' here; got 'composed', which does not support softcap"
    ):
        make_case(12, softcap=3.0).run("auto")


@pytest.mark.parametrize("value", ["", "auto"])
def test_an_empty_environment_means_auto(monkeypatch, value):
    monkeypatch.setenv("SAR_BACKEND", value)
    assert backend_of(make_case(12)) == "composed"


def test_unknown_names_list_the_known_ones(monkeypatch):
    case = make_case(12)
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'triton', 'composed', 'torch'; got 'cuda'"):
        case.run("cuda")
    monkeypatch.setenv("SAR_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"SAR_BACKEND must be one of .*; got 'cuda'"):
        case.run("auto")


def test_the_debug_log_says_what_ran(caplog):
    case = make_case(12)
    with caplog.at_level(logging.DEBUG, logger="sar_fast"):
        sar_attn_func(*case.tensors, backend="torch")
    assert "backend=torch" in caplog.text


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_head_dims_beyond_the_fused_kernels_run_on_torch(device):
    """Gemma 4's full layers have 512 dimensions; the public functions refuse them, models need them."""
    request = Request(torch.device(device), torch.bfloat16)
    choose = lambda name, head_dim: choose_backend(name, dataclasses.replace(request, head_dim=head_dim)).name
    assert choose("auto", 256) != "torch"
    assert choose("auto", 257) == "torch"
    with pytest.raises(ValueError, match=r"backend must be 'torch' here; got .*, which does not support head_dim=512"):
        choose("composed", 512)
