"""Where the kernels run: compiled on a GPU if there is one, else in Triton's interpreter on the CPU.

``TRITON_INTERPRET=1`` asks for the interpreter on a machine with a GPU. It must be on before triton is imported for the
first time.
"""

import os
import sys

import pytest
import torch

COMPILED = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") in ("", "0")

if not COMPILED:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "triton was imported without its interpreter: set TRITON_INTERPRET=1 to run tests/kernels"
        )
    os.environ["TRITON_INTERPRET"] = "1"

with torch.device("cpu"):  # PyTorch notes which functions obey a default device before they are replaced below
    torch.empty(0)


@pytest.fixture(autouse=True)
def _device():
    """Tensors that the tests make without naming a device live where the kernels run."""
    with torch.device("cuda" if COMPILED else "cpu"):
        yield


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """Fills every torch.empty with NaN, so that an entry that no kernel writes cannot pass for a result.

    Its value is the torch.empty that does not.
    """
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        elif tensor.dtype == torch.int32:
            tensor.fill_(2**30)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    return empty


@pytest.fixture(autouse=True)
def _seeded(one_thread):
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Skips, with the reason named, what needs a GPU where the kernels are interpreted."""
    if not COMPILED:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: the kernels run in the interpreter here"))
