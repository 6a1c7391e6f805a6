"""Families and backends of installed packages, and those that are registered by hand."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from importlib.metadata import EntryPoint, EntryPoints
from types import SimpleNamespace

import pytest
import torch

from sar_fast import SARConfig, sar_attn_func
from sar_fast.backends import select
from sar_fast.backends.host_loop import HostLoop
from sar_fast.backends.select import register_backend
from sar_fast.base.errors import ArgumentError
from sar_fast.hf.families import UnsupportedModelError, find_family, registry, supported_model_types

THEIRS = dataclasses.replace(registry._REGISTRY["llava"], name="theirs", model_types=("theirs_vl",))
OTHER = dataclasses.replace(THEIRS, model_types=("other_vl",))


class Counting(HostLoop):
    """The PyTorch backend under another name, which counts its forward passes."""

    calls = 0

    def forward(self, *args, **options):
        Counting.calls += 1
        return super().forward(*args, **options)


COUNTING = Counting("counting", select.BACKENDS["torch"].kernel)


@pytest.fixture
def unregistered():
    known = (registry._REGISTRY, select.BACKENDS, select.BY_NAME)
    before = [dict(names) for names in known]
    yield
    for names, old in zip(known, before):
        names.clear()
        names.update(old)


@pytest.fixture
def installed(monkeypatch, unregistered):
    """Entry points as packages declare them; what they bring is unknown after the test."""

    def declare(**points: str) -> None:
        groups = {"families": "sar_fast.families", "backends": "sar_fast.backends"}
        every = EntryPoints(
            EntryPoint(name, f"{__name__}:{value}", groups[kind])
            for kind, text in points.items()
            for name, value in (text.split("="),)
        )
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda **chosen: every.select(**chosen))

    declare()
    return declare


def inputs():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 9, 2, 8).unbind()
    visual = torch.arange(9)[None] < 5
    return q, k, v, visual, ~visual, torch.rand(1, 9)


def attend(backend: str) -> torch.Tensor:
    q, k, v, visual, text, prior = inputs()
    return sar_attn_func(q, k, v, visual_mask=visual, text_mask=text, prior=prior, causal=True, backend=backend)


def test_a_family_of_an_installed_package(installed):
    config = SimpleNamespace(model_type="theirs_vl")
    with pytest.raises(UnsupportedModelError, match="theirs_vl"):
        find_family(config)
    installed(families="theirs_vl=THEIRS")
    assert "theirs_vl" in supported_model_types()
    assert find_family(config) is THEIRS


def test_a_family_under_a_type_that_it_does_not_cover(installed):
    installed(families="theirs_vl=OTHER")
    with pytest.raises(ArgumentError, match=r"model_type must be in the model_types of its package's .*other_vl"):
        find_family(SimpleNamespace(model_type="theirs_vl"))


@pytest.mark.parametrize("way", ["by hand", "by an installed package"])
def test_a_backend_by_name(installed, way):
    with pytest.raises(ArgumentError, match=r"backend must be one of .*; got 'counting'"):
        attend("counting")
    register_backend(COUNTING) if way == "by hand" else installed(backends="counting=COUNTING")
    before = Counting.calls
    assert torch.equal(attend("counting"), attend("torch"))
    assert Counting.calls == before + 1
    assert SARConfig(backend="counting").backend == "counting"
    attend("auto")
    assert Counting.calls == before + 1  # auto has others


def test_what_is_no_backend_and_taken_names(installed):
    with pytest.raises(ArgumentError, match=r"backend must be a Backend .*; no name; got 3"):
        register_backend(3)
    for name in ("torch", "auto", "composed:mine", ""):
        with pytest.raises(ArgumentError, match=f"backend must be called otherwise .*; got the name '{name}'"):
            register_backend(Counting(name, COUNTING.kernel))
    register_backend(Counting("torch", COUNTING.kernel), replace=True)
    before = Counting.calls
    attend("torch")
    assert Counting.calls == before + 1
