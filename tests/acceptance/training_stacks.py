"""Training stacks with SAR, by their own hooks, on a CPU: what docs/integrations.md says was run.

    python tests/acceptance/training_stacks.py                        # all of them
    python tests/acceptance/training_stacks.py --stacks trl axolotl   # some
    python tests/acceptance/training_stacks.py --stacks trl --python trl=.venv/bin/python   # an environment of yours

Each stack gets an environment of its own from PyPI, kept between runs (Python 3.11 or newer; about 11 GB in all, of
which ms-swift's PyTorch with torchvision takes 7). A run's first loss is compared with that of plain transformers and
``apply_sar`` on the batch that the run's model was given. The last lines are a table; the exit code is 1 unless all of
it passed. Logs are kept beside the environments.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MARK = "CHECK "  # as in stacks/common.py, which needs a stack's environment
OURS = ("typer", "rich", "pyyaml", "jinja2")  # what importing sar_fast needs besides the stacks' own requirements
AXOLOTL = (
    *("torch==2.13.0", "transformers==5.16.1", "tokenizers==0.23.1", "huggingface_hub==1.17.0", "peft==0.20.0"),
    *("trl==1.9.0", "accelerate==1.13.0", "datasets==4.8.4", "pydantic==2.12.5", "evaluate==0.4.1", "kernels==0.16.*"),
    *(
        "axolotl-contribs-lgpl==0.0.7",
        "axolotl-contribs-mit==0.0.6",
        "schedulefree==1.4.1",
        "posthog==6.7.11",
        "addict",
    ),
    *("fire", "wandb", "einops", "colorama", "numba", "scipy", "pillow", "sentencepiece", "tensorboard", "zstandard"),
    *("art", "python-dotenv", "fastcore"),
)
UNSLOTH = (
    *(
        "tyro",
        "msgspec",
        "protobuf",
        "sentencepiece",
        "hf_transfer",
        "diffusers",
        "nest-asyncio",
        "structlog",
        "psutil",
    ),
    *("pillow", "torch==2.13.0", "transformers==5.16.1", "trl==1.9.0", "peft==0.20.0", "accelerate==1.13.0"),
    *("datasets==4.8.4", "einops"),
)


@dataclasses.dataclass(frozen=True)
class Stack:
    """One stack's environment and what is run in it.

    Attributes:
        requirements: installed with what they need.
        alone: installed after them without: what else these ask for cannot be had, or is of no use, without a GPU.
        variables: of the environment that its module runs in.
    """

    requirements: tuple[str, ...]
    alone: tuple[str, ...] = ()
    variables: dict[str, str] = dataclasses.field(default_factory=dict)


STACKS = {
    "trl": Stack(("torch==2.13.0", "trl==1.16.0", "transformers==5.23.0", "pillow")),
    "ms-swift": Stack(("torch==2.14.1", "torchvision==0.29.1", "ms-swift==4.6.0", "qwen-vl-utils")),
    "axolotl": Stack(AXOLOTL, ("axolotl==0.19.0", "bitsandbytes", "triton")),
    "unsloth": Stack(
        UNSLOTH,
        ("unsloth==2026.10.9", "unsloth_zoo==2026.10.9", "bitsandbytes", "torchao", "cut_cross_entropy", "triton"),
        {"UNSLOTH_FORCE_CPU": "1"},
    ),
}


def make_environment(name: str, folder: Path) -> Path:
    """The Python of a stack's environment, which is made unless it was finished before."""
    home, stack = folder / name / "env", STACKS[name]
    python, done = home / "bin" / "python", home / "finished"
    if not done.exists():
        venv.create(home, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *stack.requirements, *OURS], check=True)
        if stack.alone:
            subprocess.run([*pip, "--no-deps", *stack.alone], check=True)
        done.touch()
    return python


def run_stack(name: str, python: Path, folder: Path) -> list[dict[str, Any]]:
    """What a stack's module reports; a module that failed is a check that did not pass."""
    work = folder / name / "work"
    work.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **STACKS[name].variables}
    command = [str(python), "-m", f"tests.acceptance.stacks.run_{name.replace('-', '_')}", str(work)]
    with (work / "output.log").open("w") as log:
        ended = subprocess.run(command, cwd=work, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
        log.write(ended.stdout)
    checks = [json.loads(line.removeprefix(MARK)) for line in ended.stdout.splitlines() if line.startswith(MARK)]
    if ended.returncode or not checks:
        checks.append({"check": "ran to its end", "passed": False, "log": str(work / "output.log")})
    return checks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stacks", nargs="+", default=list(STACKS), choices=list(STACKS))
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "training-stacks", help="environments, logs")
    parser.add_argument("--python", nargs="+", default=[], metavar="STACK=PYTHON", help="environments that are there")
    args = parser.parse_args()
    if sys.version_info < (3, 11):
        parser.error("TRL and Axolotl need Python 3.11 or newer")
    folder, given, passed = args.folder.resolve(), dict(word.split("=", 1) for word in args.python), True
    found = {n: run_stack(n, Path(given.get(n) or make_environment(n, folder)).absolute(), folder) for n in args.stacks}
    print()
    for name, checks in found.items():
        for check in checks:
            title, ok = check.pop("check"), check.pop("passed")
            figures = ", ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in check.items())
            print(f"{name:9} {title:34} {'ok' if ok else 'FAILED':7} {figures}")
            passed &= ok
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
