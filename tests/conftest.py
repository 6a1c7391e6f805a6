"""Fixtures of every test below this folder."""

from __future__ import annotations

import functools
import gc
import os
import sys

import pytest
import torch

if not torch.cuda.is_available():  # must be set before triton is first imported; GPU tests use the compiler
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_itemcollected(item):
    """``@pytest.mark.everyday(name=values, ...)``: slow with other values of these parameters; several marks add up.

    On a GPU the kernels' tests all stay: compiled, they are quick.
    """
    if torch.cuda.is_available() and item.path.parent.name == "kernels":
        return
    params = item.callspec.params if hasattr(item, "callspec") else {}
    marks = [mark.kwargs for mark in item.iter_markers("everyday")]
    if marks and not any(all(params[name] in values for name, values in mark.items()) for mark in marks):
        item.add_marker(pytest.mark.slow)


LONG = ("test_aot", "test_whole_way", "test_ops", "test_training_compile", "test_distributed", "test_oldest_version")


def pytest_collection_modifyitems(items):
    """Files with long tests first: the last ones are short, and two workers end together."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish():
    """What was imported stays: Trainers and compilers ask for collections, each of which would walk over all of it."""
    gc.collect()
    gc.freeze()
    if "triton.runtime.interpreter" in sys.modules:
        _patch_language_once(sys.modules["triton.runtime.interpreter"])


def _patch_language_once(interpreter):
    """Not again for every device function that a kernel calls, which is two fifths of the interpreter's time."""
    patch, language = interpreter._patch_lang, interpreter.tl

    @functools.cache
    def modules_of(function):
        return [
            module for module in (language, language.core) if any(x is module for x in function.__globals__.values())
        ]

    def patch_once(function):
        if any(language.core.is_builtin(module.load) for module in modules_of(function)):
            return patch(function)

    interpreter._patch_lang = patch_once


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that Python code allocates without initialising it starts as NaN (integers: a large number)."""

    def poison(allocate):
        def allocate_and_fill(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor.fill_(True if tensor.dtype == torch.bool else 111)

        return allocate_and_fill

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _no_backend_from_the_environment(monkeypatch):
    """``SAR_BACKEND`` of the shell must not choose what the tests measure."""
    monkeypatch.delenv("SAR_BACKEND", raising=False)


@pytest.fixture(scope="session")
def _threads():
    return torch.get_num_threads()


@pytest.fixture
def one_thread(_threads):
    """Tensors of a few kilobytes: more threads only wait for each other."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(_threads)


@pytest.fixture
def all_threads(one_thread, _threads):
    """Undo ``one_thread`` for one test: what must hold however work is split."""
    torch.set_num_threads(_threads)


@pytest.fixture
def own_rules(monkeypatch):
    """Rules that a test registers, or reads from files, are unknown after it."""
    from sar_fast.weighting import registry

    monkeypatch.setattr(registry, "_rules", dict(registry._rules))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("sar_fast_weighting_"):
            del sys.modules[name]
