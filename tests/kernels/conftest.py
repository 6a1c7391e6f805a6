"""The kernels run in Triton's interpreter on the CPU. It must be on before triton is imported for the first time."""

import os
import sys

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("triton was imported without its interpreter: set TRITON_INTERPRET=1 to run tests/kernels")
os.environ["TRITON_INTERPRET"] = "1"

import torch


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """Fills every torch.empty with NaN, so that an entry that no kernel writes cannot pass for a result."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        elif tensor.dtype == torch.int32:
            tensor.fill_(2**30)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def _seeded(one_thread):
    torch.manual_seed(0)
