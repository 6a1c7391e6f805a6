"""The kernels on several Triton versions: the interpreter subset and the ahead-of-time check, each version on its own.

    python tests/acceptance/triton_versions.py                       # 3.4.0 3.6.0 3.9.0: oldest, common, newest
    python tests/acceptance/triton_versions.py --versions 3.5.1 3.7.1
    python tests/acceptance/triton_versions.py --versions 3.9.0 --checks ahead-of-time --arch sm_90 --jobs 1  # a part

Each version is unpacked into a folder of its own that comes first on the path, so the environment stays as it is; the
PyTorch is the environment's. What was compiled is kept there too: an ahead-of-time check that was cut short goes on
where it stopped when it is started again. Triton 3.6 and older get a NumPy below 2.4, which their interpreter needs;
before 3.6 the fp64 cases skip themselves, since its interpreter has no fp64 matrix product (pytest's summary names
them).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEFAULT = ("3.4.0", "3.6.0", "3.9.0")
CHECKS = ("interpreter", "ahead-of-time")
INTERPRETED = (
    "tests/kernels/test_forward.py",
    "tests/kernels/test_moments.py",
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


def run(version: str, target: Path, args: argparse.Namespace) -> dict[str, bool]:
    """{check: passed} of one version, for the checks that were asked for."""
    path = os.pathsep.join([str(target), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(target / "cache")}
    seen = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__)"], env=env, capture_output=True, text=True
    )
    if seen.stdout.strip() != version:
        raise SystemExit(f"Triton {version} was asked for, {seen.stdout.strip() or seen.stderr} runs")
    commands = {
        "interpreter": [
            *(sys.executable, "-m", "pytest", "-q", "-rs", "--tb=short", "-p", "no:cacheprovider"),
            *("-m", "not slow and not gpu", "-k", args.select, *args.tests),
        ],
        "ahead-of-time": [
            *(sys.executable, "-m", "sar_kernels.tools.aot", "--dtype", "bfloat16", "--arch", *args.arch),
            *("--head-dim", *map(str, args.head_dim), *(["--jobs", str(args.jobs)] if args.jobs else [])),
        ],
    }
    env.pop("TRITON_INTERPRET", None)
    modes = {"interpreter": {"TRITON_INTERPRET": "1"}, "ahead-of-time": {}}
    return {
        check: subprocess.run(commands[check], cwd=ROOT, env={**env, **modes[check]}).returncode == 0
        for check in args.checks
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", nargs="+", default=list(DEFAULT))
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "results" / "triton-versions", help="where they are unpacked"
    )
    parser.add_argument("--checks", nargs="+", default=list(CHECKS), choices=CHECKS)
    parser.add_argument("--tests", nargs="+", default=list(INTERPRETED), help="files or test ids, for the interpreter")
    parser.add_argument("-k", dest="select", default="", help="pytest -k expression, for the interpreter")
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90"], help="ahead of time")
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128], help="ahead of time")
    parser.add_argument("--jobs", type=int, help="processes that compile ahead of time (default: one per core)")
    args = parser.parse_args()
    results = {version: run(version, unpack(version, args.folder), args) for version in args.versions}
    print()
    for version, checks in results.items():
        print(f"Triton {version:8}", *(f"{name}: {'ok' if ok else 'FAILED'}" for name, ok in checks.items()), sep="  ")
    return 0 if all(ok for checks in results.values() for ok in checks.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
