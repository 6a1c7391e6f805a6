"""Register, spill and shared-memory budgets of the chosen configurations, held by the compiler alone (no GPU).

The compiler runs in a process of its own, since this one has the interpreter switched on.
"""

import json
import os
import subprocess
import sys

import pytest

from sar_kernels.configs import SHARED_MEMORY_LIMIT

BUDGETED = ("sm_80", "sm_90")  # the others must compile and fit their shared memory


def compiled(*arguments: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sar_kernels.aot", "--json", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = json.loads(result.stdout)
    assert rows
    return rows


def check_budget(rows: list[dict]) -> None:
    for row in rows:
        what = {k: row[k] for k in ("arch", "kernel", "purpose", "head_dim", "causal", "options", "spill_bytes")}
        assert row["shared_bytes"] <= SHARED_MEMORY_LIMIT[row["arch"]], what
        if row["arch"] not in BUDGETED:
            continue
        if row["kernel"] in ("forward", "statistics"):
            assert row["spill_bytes"] <= (0 if row["head_dim"] <= 128 else 64), what
        if row["kernel"] in ("dq", "dkdv") and row["purpose"] == "sar_sav_grad":
            assert row["spill_bytes"] <= 64, what
        if (
            row["arch"] == "sm_90"
            and row["kernel"] in ("forward", "statistics", "dq", "dkdv")
            and row["head_dim"] <= 128
        ):
            assert row["wgmma"], what


def check_residency(rows: list[dict]) -> None:
    """The statistics do not cost a resident block: SAR on and off fill a multiprocessor alike."""
    forward = {(r["arch"], r["head_dim"], r["causal"], r["purpose"]): r for r in rows if r["kernel"] == "forward"}
    for (arch, head_dim, causal, purpose), row in forward.items():
        if purpose != "attention" and arch in BUDGETED:
            plain = forward[arch, head_dim, causal, "attention"]
            assert (row["block_m"], row["block_n"]) == (plain["block_m"], plain["block_n"])
            assert row["blocks_per_sm"] >= plain["blocks_per_sm"] > 0, (row, plain)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_forward_budget(arch):
    rows = compiled("--arch", arch, "--head-dim", "64", "128", "--kernel", "forward")
    check_budget(rows)
    check_residency(rows)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
def test_every_variant(arch):
    rows = compiled("--arch", arch)
    check_budget(rows)
    check_residency(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["window"], ["softcap"], ["padding"], ["packed"], ["window", "softcap", "padding"]]
)
def test_options_compile_within_shared_memory(options):
    rows = compiled("--arch", "sm_90", "gfx942", "--head-dim", "128", "--options", *options)
    assert all(r["shared_bytes"] <= SHARED_MEMORY_LIMIT[r["arch"]] for r in rows)


@pytest.mark.slow
def test_fp32_inputs_fit_shared_memory():
    rows = compiled("--arch", "sm_80", "sm_89", "--head-dim", "64", "256", "--dtype", "float32")
    assert all(r["shared_bytes"] <= SHARED_MEMORY_LIMIT[r["arch"]] for r in rows)


def test_interpreter_is_refused():
    command = [sys.executable, "-m", "sar_kernels.aot"]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr
