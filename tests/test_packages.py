"""Imports go one way, and the picture of the packages is that of the imports."""

from __future__ import annotations

import importlib
import runpy
import sys
import warnings
from pathlib import Path

import pytest

from sar_fast import moved
from tests.test_bare_install import imports as third_parties

REPOSITORY = Path(__file__).parents[1]
PACKAGES = runpy.run_path(str(REPOSITORY / "docs" / "packages.py"))
GRAPH = PACKAGES["imports"](PACKAGES["modules"]())


def test_no_import_goes_up():
    assert PACKAGES["wrong_way"](GRAPH) == []


def test_no_module_imports_itself_through_others():
    assert PACKAGES["circles"](GRAPH) == []


def test_an_import_that_goes_up_and_a_circle_are_found(tmp_path):
    for name, text in {
        "sar_fast/method/a.py": "def f():\n    from sar_fast.hf import b\n",
        "sar_fast/hf/b.py": "import sar_fast.method.a\nfrom sar_fast.weighting import Equal\n",
        "sar_fast/weighting.py": "",
        "sar_fast/hf/__init__.py": "",
        "kernels/sar_kernels/__init__.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    graph = PACKAGES["imports"](PACKAGES["modules"](tmp_path))
    assert PACKAGES["wrong_way"](graph) == [
        "sar_fast.hf.b imports sar_fast.weighting",
        "sar_fast.method.a imports sar_fast.hf.b",
    ]
    assert PACKAGES["circles"](graph) == [["sar_fast.hf.b", "sar_fast.method.a"]]


def test_the_picture_is_current_and_small():
    pairs = PACKAGES["arrows"](GRAPH)
    text = PACKAGES["PAGE"].read_text(encoding="utf-8")
    assert PACKAGES["page"](text, PACKAGES["picture"](pairs)) == text, "python docs/packages.py redraws it"
    assert len(PACKAGES["ROOMS"]) <= 20
    assert {room for pair in pairs for room in pair} == set(PACKAGES["ROOMS"])


def test_the_root_holds_what_users_import():
    names = {path.name for path in (REPOSITORY / "sar_fast").iterdir()} - {"__pycache__"}
    files = {"__init__.py", "__main__.py", "config.py", "moved.py", "reference.py", "weighting.py"}
    assert names == files | {"assets", "attention", "backends", "base", "cli", "hf", "integrations", "lab", "method"}


@pytest.mark.parametrize(
    ("package", "unknown"),
    [
        ("method", {"transformers", "triton", "accelerate"}),
        ("backends", {"transformers", "triton", "accelerate"}),
        ("attention", {"transformers", "triton", "accelerate"}),
        ("hf", {"triton", "accelerate", "datasets"}),
        ("integrations", {"triton"}),
        ("lab", {"triton"}),
    ],
)
def test_what_a_package_knows_nothing_of(package, unknown):
    found = {module for module, *_ in third_parties(REPOSITORY / "sar_fast" / package)}
    assert found
    assert not found & unknown


def test_backends_alone_call_the_kernels():
    users = {module for module, others in GRAPH.items() if any(other.startswith("sar_kernels") for other in others)}
    assert {PACKAGES["room_of"](module) for module in users} == {"sar_kernels", "backends"}


@pytest.mark.parametrize(
    "old",
    [
        "sar_fast.analysis.head_divergence",
        "sar_fast.distributed",
        "sar_fast.evaluation.focus",
        "sar_fast.evaluation.probe",
        "sar_fast.flash",
        "sar_fast.functional",
        "sar_fast.integrations.hf",
        "sar_fast.integrations.hf.sequence_parallel",
        "sar_fast.miniature.checkpoint",
        "sar_fast.miniature.questions",
        "sar_fast.modules",
        "sar_fast.ops",
        "sar_fast.pictures",
        "sar_fast.prior",
        "sar_fast.roles",
        "sar_fast.training.gradients",
        "sar_fast.types",
        "sar_fast.visibility",
        "sar_fast.weighting.files",
    ],
)
def test_old_names_are_the_same_modules_with_a_warning(old):
    saved = sys.modules.pop(old, None)
    try:
        importlib.import_module(moved.new_name(old))  # whose own imports may warn of other things
        with pytest.warns(FutureWarning, match=f"{old} is now {moved.new_name(old)}"):
            module = importlib.import_module(old)
        assert module is importlib.import_module(moved.new_name(old))
    finally:
        sys.modules.pop(old, None)
        if saved is not None:
            sys.modules[old] = saved


def test_names_that_stay_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("sar_fast.weighting", "sar_fast.reference"):
            importlib.reload(importlib.import_module(name))


def test_a_name_that_never_was_is_no_module():
    with pytest.raises(ModuleNotFoundError, match=r"sar_fast\.nowhere"):
        importlib.import_module("sar_fast.nowhere")
    assert moved.new_name("sar_fast.nowhere") is None
