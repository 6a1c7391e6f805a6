"""The integration's tests on several transformers versions, each on its own.

    python tests/acceptance/transformers_versions.py                      # 5.5.4 5.17.0 5.24.0
    python tests/acceptance/transformers_versions.py --versions 5.4.0 --tests tests/hf/test_families.py -k llava

Each version, with the tokenizers and huggingface_hub that it asks for, is unpacked into a folder of its own that comes
first on the path, so the environment stays as it is; PyTorch and all else are the environment's. What a version cannot
do without SAR is an expected failure, which the tests show (``tests/hf/tiny/lacks.py``); pytest's summary counts those.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEFAULT = ("5.5.4", "5.17.0", "5.24.0")  # what LLaMA-Factory 0.9.5 takes, the oldest before, the newest


def wanted(version: str) -> list[str]:
    """What pip installs: packages that transformers refuses to be without in another version."""
    major, minor = map(int, version.split(".")[:2])
    beside = ["huggingface_hub<2"] if (major, minor) < (5, 18) else []
    beside += ["tokenizers==0.22.2"] if (major, minor) < (5, 16) else []
    return [f"transformers=={version}", *beside]


def unpack(version: str, folder: Path) -> Path:
    """transformers ``version`` in a folder of its own; kept between runs."""
    target = folder / f"transformers-{version}"
    if not (target / "transformers" / "__init__.py").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*pip, *wanted(version)], check=True)
    return target


def run(version: str, target: Path, args: argparse.Namespace) -> bool:
    """Whether the tests pass."""
    path = os.pathsep.join(
        [str(target), str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    code = "import transformers; print(transformers.__version__)"
    seen = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if seen.stdout.strip() != version:
        raise SystemExit(f"transformers {version} was asked for, {seen.stdout.strip() or seen.stderr} runs")
    print(f"transformers {version}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-n", str(args.jobs)]
    return (
        subprocess.run([*command, "-m", args.marks, "-k", args.select, *args.tests], cwd=ROOT, env=env).returncode == 0
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", nargs="+", default=list(DEFAULT))
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "results" / "transformers-versions", help="where they are unpacked"
    )
    parser.add_argument("--tests", nargs="+", default=["tests/hf"], help="files or test ids")
    parser.add_argument("--marks", default="not slow and not gpu", help="pytest -m expression")
    parser.add_argument("-k", dest="select", default="", help="pytest -k expression")
    parser.add_argument("--jobs", type=int, default=2, help="pytest processes")
    args = parser.parse_args()
    results = {version: run(version, unpack(version, args.folder), args) for version in args.versions}
    print()
    for version, passed in results.items():
        print(f"transformers {version:8} {'ok' if passed else 'FAILED'}")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
