"""The kernels on several Triton versions: the interpreter subset and the ahead-of-time check, each version on its own.

    python tests/acceptance/triton_versions.py                       # 3.4.0 3.6.0 3.9.0: oldest, common, newest
    python tests/acceptance/triton_versions.py --versions 3.5.1 3.7.1

Each version is unpacked into a folder of its own that comes first on the path, so the environment stays as it is; the
PyTorch is the environment's. Triton 3.6 and older get a NumPy below 2.4, which their interpreter needs; before 3.6 the
fp64 cases skip themselves, since its interpreter has no fp64 matrix product (pytest's summary names them).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEFAULT = ("3.4.0", "3.6.0", "3.9.0")
INTERPRETED = (
    "tests/kernels/test_forward.py",
    "tests/kernels/test_backward.py",
    "tests/kernels/test_varlen.py",
    "tests/kernels/test_decode.py",
    "tests/kernels/test_offsets.py",
    "tests/kernels/test_configs.py",
)


def old_interpreter(version: str) -> bool:
    """Whether this version's interpreter breaks on NumPy 2.4."""
    return tuple(map(int, version.split(".")[:2])) <= (3, 6)


def unpack(version: str, folder: Path) -> Path:
    """Triton ``version`` (and the NumPy that it needs) in a folder of its own; kept between runs."""
    target = folder / f"triton-{version}"
    if not (target / "triton" / "__init__.py").exists():
        wanted = [f"triton=={version}"] + (["numpy<2.4"] if old_interpreter(version) else [])
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*pip, *wanted], check=True)
    return target


def run(version: str, target: Path, select: str) -> dict[str, bool]:
    """{check: passed} of one version."""
    env = {**os.environ, "PYTHONPATH": str(target), "TRITON_CACHE_DIR": str(target / "cache")}
    seen = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__)"], env=env, capture_output=True, text=True
    )
    if seen.stdout.strip() != version:
        raise SystemExit(f"Triton {version} was asked for, {seen.stdout.strip() or seen.stderr} runs")
    pytest = [sys.executable, "-m", "pytest", "-q", "-rs", "--tb=short", "-p", "no:cacheprovider"]
    pytest += ["-m", "not slow and not gpu", "-k", select]
    interpreted = subprocess.run([*pytest, *INTERPRETED], cwd=ROOT, env={**env, "TRITON_INTERPRET": "1"})
    env.pop("TRITON_INTERPRET", None)
    aot = [sys.executable, "-m", "sar_kernels.aot", "--arch", "sm_80", "sm_90", "--head-dim", "64", "128"]
    compiled = subprocess.run([*aot, "--dtype", "bfloat16"], cwd=ROOT, env=env)
    return {"interpreter": interpreted.returncode == 0, "ahead-of-time": compiled.returncode == 0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", nargs="+", default=list(DEFAULT))
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "results" / "triton-versions", help="where they are unpacked"
    )
    parser.add_argument("-k", dest="select", default="", help="pytest -k expression for the interpreter subset")
    args = parser.parse_args()
    results = {version: run(version, unpack(version, args.folder), args.select) for version in args.versions}
    print()
    for version, checks in results.items():
        print(f"Triton {version:8}", *(f"{name}: {'ok' if ok else 'FAILED'}" for name, ok in checks.items()), sep="  ")
    return 0 if all(ok for checks in results.values() for ok in checks.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
