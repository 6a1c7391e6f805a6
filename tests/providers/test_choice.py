"""Which library's attention a call gets on a GPU: by what it can do, what is there, and what was measured."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sar_fast import SARConfig
from sar_fast.backends import protocol
from sar_fast.backends.protocol import Request
from sar_fast.backends.providers import aten, choice, packages
from sar_fast.backends.select import choose_backend
from sar_fast.method.values import Scores

GPU = torch.device("cuda")
CALL = Request(GPU, torch.bfloat16, Scores(0.1), head_dim=128, length=8192)
BUILT_IN = {"torch-fa2", "cudnn"}


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A Hopper GPU whose PyTorch has its own libraries and no packages."""
    import sar_kernels.attention  # noqa: F401  (for the tests that come after, in the interpreter that they run in)

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(protocol, "device_arch", lambda device: "sm_90" if device.type == "cuda" else device.type)
    for kind in (aten.TorchFlash, aten.CuDNN, packages.Package):
        monkeypatch.setattr(kind, "missing", lambda self: None if self.name in BUILT_IN else "not there")


@pytest.fixture
def everything(monkeypatch):
    for kind in (aten.TorchFlash, aten.CuDNN, packages.Package):
        monkeypatch.setattr(kind, "missing", lambda self: None)


@pytest.fixture
def measured(monkeypatch):
    def rows(*given):
        keys = ("arch", "direction", "head_dim", "length", "order")
        monkeypatch.setattr(choice, "SPEED_TABLE", [dict(zip(keys, row)) for row in given])

    return rows


def chosen(name="auto", **changes) -> str:
    return choose_backend(name, dataclasses.replace(CALL, **changes)).name


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, "cudnn"),
        ({"square": False}, "torch-fa2"),  # cuDNN aligns causal masks top-left
        ({"packed": True}, "torch-fa2"),
        ({"padded": True}, "torch-fa2"),
        ({"head_dim": 256}, "torch-fa2"),
        ({"scores": Scores(0.1, window=(100, -1))}, "torch-fa2"),
    ],
    ids=str,
)
def test_composed_takes_the_first_that_can(changes, taken):
    assert chosen("composed", **changes) == f"composed:{taken}"
    assert chosen(**changes) == "triton"  # nothing was measured


def test_what_is_installed_counts(everything):
    assert chosen("composed") == "composed:fa3"
    assert chosen("composed", scores=Scores(0.1, softcap=20.0)) == "composed:fa3"
    assert chosen("composed", head_dim=200) == "composed:fa3"


@pytest.mark.parametrize(
    ("arch", "taken"), [("sm_80", "fa2"), ("sm_100", "fa4"), ("sm_120", "cudnn"), ("gfx942", "torch-fa2")]
)
def test_each_generation_has_its_own(arch, taken, everything, monkeypatch):
    monkeypatch.setattr(protocol, "device_arch", lambda device: arch)
    order = [n for n in choice.unmeasured_order(arch) if choice.refusal(choice.PROVIDERS[n], CALL) is None]
    assert order[0] == taken
    assert sorted(choice.unmeasured_order(arch)) == sorted(choice.PROVIDERS)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "needs float16 or bfloat16"),
        ({"masked": True}, "attn_mask and visibility"),
        ({"bounded": True}, "attn_mask and visibility"),
        ({"scores": Scores(0.1, window=(9, 0)), "padded": True}, "a window together with padding"),
        ({"scores": Scores(0.1, softcap=3.0)}, r"softcap=3\.0"),
        ({"backward": True, "deterministic": True}, "deterministic gradients"),
    ],
    ids=str,
)
def test_what_no_library_does_is_an_error_that_names_who_does(changes, reason):
    with pytest.raises(
        ValueError,
        match=rf"must be 'triton' or 'torch' here; got 'composed', which does not support .*{reason}",
    ):
        chosen("composed", **changes)
    assert chosen(**changes) == "triton"


def test_a_named_provider_is_taken_or_an_error():
    assert chosen("composed:torch-fa2") == "composed:torch-fa2"
    with pytest.raises(ValueError, match="got 'composed:cudnn', which does not support packed sequences"):
        chosen("composed:cudnn", packed=True)
    with pytest.raises(ValueError, match="got 'composed:fa3', which does not support being called here: not there"):
        chosen("composed:fa3")
    with pytest.raises(ValueError, match="needs float16 or bfloat16"):  # installing it would not help
        chosen("composed:fa3", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"backend must be one of 'composed:fa3', .*got 'composed:fa9'"):
        chosen("composed:fa9")


def test_configurations_name_providers():
    assert SARConfig(backend="composed:cudnn").backend == "composed:cudnn"
    assert SARConfig.from_dict(SARConfig(backend="composed:cudnn").to_dict()).backend == "composed:cudnn"
    with pytest.raises(ValueError, match=r"backend must be one of 'composed:fa3', .*got 'composed:'"):
        SARConfig(backend="composed:")


def test_decode_steps_stay_with_the_kernels(measured):
    measured(("sm_90", "forward", 128, 1, ["composed:cudnn", "triton"]))
    assert chosen(decode=True) == "composed:cudnn"  # whose steps are the kernels': whole_batch.py


def test_auto_takes_what_was_measured(measured):
    measured(
        ("sm_90", "forward", 128, 2048, ["triton", "composed:cudnn"]),
        ("sm_90", "forward", 128, 8192, ["composed:fa3", "composed:cudnn", "triton"]),
        ("sm_90", "forward", 64, 2048, ["composed:cudnn", "triton"]),
        ("sm_90", "training", 128, 2048, ["composed:torch-fa2"]),
        ("sm_80", "forward", 128, 1, ["composed:fa2"]),
    )
    assert chosen() == "composed:cudnn"  # fa3 is not there
    assert chosen(length=8191) == "triton"
    assert chosen("composed", length=8191) == "composed:cudnn"
    assert chosen(length=100) == "triton"  # shorter than what was measured
    assert chosen(head_dim=80) == "composed:cudnn"  # rounded up
    assert chosen(head_dim=192) == "triton"  # nothing so wide was measured
    assert chosen(head_dim=48, length=2048) == "composed:cudnn"  # to the next, not to the widest
    assert chosen(backward=True) == "composed:torch-fa2"
    assert chosen(packed=True) == "triton"  # what is measured to be fast there, cuDNN, takes none


def test_the_table_that_ships_can_be_read():
    for row in choice.SPEED_TABLE:
        assert row["direction"] in ("forward", "training")
        for name in row["order"]:
            assert name == "triton" or name.removeprefix("composed:") in choice.PROVIDERS


def test_the_active_implementation_is_named(monkeypatch):
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3", raising=False)
    assert aten.active_flash_implementation() == "FA3"
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: None, raising=False)
    assert aten.active_flash_implementation() == "FA2"
    monkeypatch.delattr(torch.nn.attention, "current_flash_attention_impl")  # PyTorch before 2.12
    assert aten.active_flash_implementation() == "FA2"
