"""What the compiler makes of the decode kernels, without a GPU: in a process without the interpreter."""

import json
import os
import subprocess
import sys

import pytest

from sar_kernels.configs import SHARED_MEMORY_LIMIT


def compiled(*arguments: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sar_kernels.decode_aot", "--json", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def check_budget(rows: list[dict]) -> None:
    assert rows
    for row in rows:
        assert row["shared_bytes"] <= SHARED_MEMORY_LIMIT[row["arch"]], row
        if row["arch"].startswith("sm_"):
            strict = row["arch"] in ("sm_80", "sm_90") and row["head_dim"] <= 128
            assert row["spill_bytes"] <= (0 if strict else 64), row
        if row["kernel"] == "decode_split" and row["arch"] == "sm_90":  # two thread blocks per multiprocessor
            assert 2 * (row["shared_bytes"] + 1024) <= SHARED_MEMORY_LIMIT["sm_90"] + 1024, row


def test_one_query_has_no_spills():
    check_budget(compiled("--arch", "sm_90", "--head-dim", "128", "--mode", "plain", "running", "--short"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
def test_every_variant(arch):
    check_budget(compiled("--arch", arch))
