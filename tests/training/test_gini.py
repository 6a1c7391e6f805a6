"""The bounded-memory Gini coefficient is that of its definition, on every path it can take."""

from __future__ import annotations

import pytest
import torch

from sar_fast.lab.training.gini import gini
from tests.helpers import combinations


def by_definition(values: torch.Tensor) -> float:
    """Mean absolute difference of all pairs over twice the mean, in fp64: no sort, no rank."""
    x = values.detach().flatten().double().abs()
    if not x.sum():
        return 0.0
    return ((x[:, None] - x[None, :]).abs().mean() / (2 * x.mean())).item()


def by_sort(values: torch.Tensor) -> float:
    x = values.detach().flatten().double().abs().sort().values
    n = x.numel()
    return ((2 * torch.arange(1, n + 1) - n - 1) * x).sum().item() / (n * x.sum().item())


@pytest.fixture(scope="module")
def generator():
    return torch.Generator().manual_seed(0)


# One value at a time takes seconds: every day in one dtype.
PATHS = combinations(
    ("normal", "heavy", "sparse", "few_values", "one_bucket", "subnormal"),
    (torch.float32, torch.bfloat16, torch.float16),
    (1, 7, 100, 1 << 22),
    daily=lambda kind, dtype, limit: limit > 1 or dtype == torch.float32,
)


@pytest.mark.parametrize(("kind", "dtype", "limit"), PATHS)
def test_equals_the_definition(generator, kind, dtype, limit):
    """``limit`` 1 and 7 force many groups and counting by value; few values make every bucket overfull."""
    x = torch.randn(101, generator=generator)
    x = {
        "normal": x,
        "heavy": x**5,
        "sparse": x * (torch.rand(101, generator=generator) > 0.9),
        "few_values": x.round(),
        "one_bucket": 1 + x.sigmoid() / 200,  # one high half of the bits in fp32
        "subnormal": x * 1e-40,
    }[kind].to(dtype)
    assert gini(x, limit) == pytest.approx(by_definition(x), abs=1e-12)


def test_known_values():
    assert gini(torch.ones(10)) == 0
    assert gini(torch.zeros(10)) == 0
    assert gini(torch.tensor([-3.0])) == 0
    assert gini(torch.tensor([0.0, 0.0, 0.0, -2.0])) == pytest.approx(3 / 4)
    assert gini(torch.tensor([1.0, 3.0])) == pytest.approx(1 / 4)


def test_scale_sign_order_shape_and_parts_do_not_matter(generator):
    x = torch.randn(60, 50, generator=generator)
    expected = by_definition(x)
    assert gini(-x.t() * 1e-20) == pytest.approx(expected, abs=1e-6)
    assert gini([x[:20], x[20:].t()], limit=64) == pytest.approx(expected, abs=1e-12)


def test_a_large_tensor_equals_the_sort(generator):
    x = torch.randn(3_000_000, generator=generator) * torch.rand(3_000_000, generator=generator)
    assert gini(x, limit=1 << 18) == pytest.approx(by_sort(x), abs=1e-10)


@pytest.mark.slow
def test_a_hundred_million_entries_in_bounded_memory():
    """Peak memory above the gradient itself, measured by the kernel in a fresh process: under 400 MB for 1e8 entries,
    where sorting them takes 1.2 GB."""
    import subprocess
    import sys

    script = (
        "import resource, torch; from sar_fast.lab.training.gini import gini\n"
        "torch.set_num_threads(1)\n"
        "gini(torch.randn(1000)); x = torch.randn(100_000_000)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "value = gini(x)\n"
        "print(value, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    value, megabytes = map(float, out.split())
    assert value == pytest.approx(2**0.5 - 1, abs=1e-3)  # of |normal|, by calculus
    assert megabytes < 400


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: gini(torch.ones(3, dtype=torch.float64)), TypeError, "float32"),
        (lambda: gini(torch.ones(0)), ValueError, "values must have entries"),
        (lambda: gini(torch.tensor([1.0, torch.nan])), ValueError, "values must be finite"),
        (lambda: gini(torch.tensor([1.0, -torch.inf])), ValueError, "values must be finite"),
        (lambda: gini(torch.ones(3), 0), ValueError, "limit must be"),
    ],
)
def test_bad_input_is_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
