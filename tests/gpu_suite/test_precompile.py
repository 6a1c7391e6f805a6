"""Kernels compiled without a GPU are what a later run finds: packed, moved, unpacked, and none compiled again.

The compiler runs in processes of its own, since this one has the interpreter switched on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from gpu_suite import precompile

from .conftest import BENCHMARKS

ROOT = BENCHMARKS.parent


def command(*arguments: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = [sys.executable, "benchmarks/gpu.py", *arguments]
    result = subprocess.run(program, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="launchers are built by gcc on Linux"
)
def test_a_packed_cache_serves_another_place(tmp_path):
    carry, first, second = tmp_path / "carry", tmp_path / "cache", tmp_path / "elsewhere"
    build = ("--build-cache", str(carry), "--slice", "short", "--jobs", "2", "--cache")
    printed = command(*build, str(first))
    assert "5 kernels for sm_90: 0 from the cache, 5 compiled, 0 failed" in printed
    assert "forward: compiled in" in printed  # every miss is named
    assert (carry / precompile.pack_name()).stat().st_size < precompile.LARGEST_PACK
    shutil.rmtree(first)
    assert precompile.unpack(carry, second) == f"cache unpacked from {carry / precompile.pack_name()}"
    printed = command(*build, str(second))
    assert "short: 5 kernels, 5 from the cache" in printed
    assert "5 from the cache, 0 compiled, 0 failed" in printed


def test_a_pack_of_another_triton_is_named(tmp_path):
    (tmp_path / "triton-1.0-cp27-x86_64.tar.xz").touch()
    said = precompile.unpack(tmp_path, tmp_path / "cache")
    assert "is not there, only triton-1.0-cp27-x86_64.tar.xz" in said


def test_the_interpreter_is_refused(capsys):
    with pytest.raises(SystemExit):
        precompile.main(["short"])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
