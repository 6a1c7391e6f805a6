"""Every documented command in a fresh clone; of those that cannot be run here, the reason.

    python tests/acceptance/documented_commands.py              # about half an hour on 2 cores
    python tests/acceptance/documented_commands.py --list       # what would be run, as what, and what would not
    python tests/acceptance/documented_commands.py --only sweep

A page's commands run in their order: a second one often takes what the first one wrote; the next page begins without
results. ``INSTEAD`` puts what the repository ships in the place of a reader's own files.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "experiments/README.md", "CONTRIBUTING.md", "kernels/README.md", "benchmarks/README.md")
LIMIT = 30 * 60  # seconds of one command
MINI = "experiments/sar_paper/exp_sec3.2_grad_sparsity_sft_mini.yaml"
BENCHMARK = "experiments/sar_paper/eval_sec6.2_main_llava_mini.yaml"

INSTEAD = [  # (pattern in a command, what stands there here); experiments of full scale by their small siblings
    (r"(experiments/sar_paper/(?:exp|eval|analysis)_[\w.]+?)(?<!_mini)\.yaml", r"\1_mini.yaml"),
    (r"results/(sft|control)_grad_analysis", r"results/mini_\1"),
    (r"--k 0 5 10( 15)?", "--k 0 2 4"),
    (r"\bmy\.json\b", "experiments/data/shapes_llava.json"),
    (r"\bBASE\b", "miniature"),
    (r"(--task (pope|mme)) ", r"\1 --data_dir experiments/data/benchmarks/\2 "),
    (r"\bCONFIG\.yaml\b", MINI),
    (r"\bFILE\.yaml\b", BENCHMARK),
    (r"my_rules\.py:Mine", "my_rules.py:Above"),
    (r"--use_sar --sar_weighting", "--use_sar --sar_activation_layer_k 4 --sar_weighting"),
    (r"--use_sar (?=--output_dir)", "--use_sar --sar_activation_layer_k 4 "),
    (r"--weighting my_rules", "--k 4 --weighting my_rules"),
    (r"train\.json --media_dir images", "experiments/data/shapes_llava.json --media_dir experiments/data"),
    (r"--model llava-hf/llava-1.5-7b-hf --max_length", "--model miniature --max_length"),
    (r"(experiments/launch/\w+\.sh)(?!.*--gpus)", r"\1 --gpus 8"),
    (r"(experiments/launch/\w+\.sh)", r"\1 --dry-run"),
    (r"--hostfile HOSTS", "--hostfile hosts"),
    (r"--head HOST\b", "--head node0"),
    (r"('\{\"name\": \"softmax\".*\}')", r"\1 --output_dir results/softmax"),
]
ELSEWHERE = [  # (pattern of a command, why it is not run here)
    (r"^make (demo|test|lint)\b", "CI runs them"),
    (r"^make (test-all|sanitize|bench|gpu-)", "hours, or a GPU"),
    (r"^python -m pytest tests/kernels", "a GPU: the interpreter's cases are part of make test"),
    (r"^python -m sar_kernels\.tools\.tune", "a GPU"),
    (r"^python3? benchmarks/(gpu|plot|readme|speed_table)\.py|^export PYTHONPATH", "a GPU's records"),
    (r"^mkdir -p results/kept|^cp .*results/kept", "a GPU's records"),
    (r"^\. \.venv", "the environment is the one that runs this"),
    (r"^pip install", "an environment of its own: tests/acceptance/extras.py, and each page's acceptance program"),
    (r"^sar-fast convert", "published checkpoints; tests/evaluation/test_focus_grounding.py converts small ones"),
    (r"^lmms-eval", "lmms-eval in an environment of its own; tests/evaluation/test_lmms_eval.py"),
    (r"^(swift|axolotl) |^python my_script|training_stacks\.py", "tests/acceptance/training_stacks.py"),
    (r"llamafactory", "tests/acceptance/llamafactory.py"),
    (r"^python examples/trl_sft\.py", "TRL in an environment of its own: tests/acceptance/training_stacks.py"),
    (r"^python -m deepspeed\.checkpoint|^echo universal", "a DeepSpeed checkpoint: tests/training/test_distributed.py"),
]


@dataclasses.dataclass
class Command:
    """One command of a page: as it is written, and as it is run here; ``why_not`` if it is not."""

    page: str
    written: str
    run: str
    why_not: str = ""


def pages() -> list[Path]:
    return [*(ROOT / page for page in PAGES), *sorted((ROOT / "docs").rglob("*.md"))]


def written(page: Path) -> Iterator[str]:
    """The commands of a page's shell blocks and of the commands in its tables, continued lines joined."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        for line in re.sub(r"\s*(#[^\n]*)?\\\n\s*", " ", block).splitlines():
            command = re.sub(r"(^|\s+)#.*$", "", line).strip()
            yield from (part.strip() for part in command.split("; ") if part.strip())
    for row in re.findall(r"^\|.*\|$", text, flags=re.MULTILINE):
        yield from (
            c for c in re.findall(r"`([^`]+)`", row) if re.match(r"(python experiments/|sar-fast \w+ experiments)", c)
        )
        yield from (c for c in re.findall(r"`(sar-fast plot [^`]+)`", row))


def commands() -> list[Command]:
    """Every documented command, of each page once, in the order of the pages."""
    found: dict[tuple[Path, str], Command] = {}
    for page in pages():
        for text in written(page):
            run = text
            for pattern, other in INSTEAD:
                run = re.sub(pattern, other, run)
            why = next((why for pattern, why in ELSEWHERE if re.search(pattern, text)), "")
            found.setdefault((page, run), Command(page.relative_to(ROOT).as_posix(), text, run, why))
    return list(found.values())


def unused() -> list[str]:
    """Patterns that no command has any more."""
    every = [text for page in pages() for text in written(page)]
    return [p for p, _ in (*INSTEAD, *ELSEWHERE) if not any(re.search(p, text) for text in every)]


def clone(folder: Path) -> dict[str, str]:
    """A fresh clone in ``folder`` with a reader's own files; the environment in which its commands run."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    programs = folder.parent / "programs"
    programs.mkdir()
    for name, words in {"python": "", "sar-fast": "-m sar_fast", "python3": ""}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        (programs / name).chmod(0o755)
    page = (folder / "docs" / "weighting.md").read_text(encoding="utf-8")
    (rules,) = re.findall(r"^```python\n(# my_rules\.py\n.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    (folder / "my_rules.py").write_text(rules, encoding="utf-8")
    (folder / "hosts").write_text("node0 slots=8\nnode1 slots=8\n")
    picture = next((folder / "experiments" / "data" / "images").glob("*"))
    (folder / "photo.jpg").write_bytes(picture.read_bytes())
    path = os.pathsep.join([str(folder), str(folder / "kernels")])
    return {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": path, "PYTHON": "python"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", default="", help="commands that have this in them")
    args = parser.parse_args()
    chosen = [command for command in commands() if args.only in command.run]
    if args.list:
        for c in chosen:
            print(f"{c.page}: {c.written}\n    {f'not here: {c.why_not}' if c.why_not else c.run}")
        return
    failed = []
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "sar_fast"
        environment = clone(folder)
        page = ""
        for command in chosen:
            if command.page != page:
                page = command.page
                print(page)
                shutil.rmtree(folder / "results", ignore_errors=True)
            if command.why_not:
                print(f"{'-':>7}  {command.written}   ({command.why_not})")
                continue
            began = time.monotonic()
            done = subprocess.run(
                ["bash", "-c", command.run], cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT
            )
            how = "FAILED" if done.returncode else "ok"
            print(f"{time.monotonic() - began:6.1f}s  {command.run}   {how}", flush=True)
            if done.returncode:
                failed.append(command)
                print(done.stdout[-2000:], done.stderr[-2000:], sep="\n")
    if failed:
        raise SystemExit(f"{len(failed)} of {len(chosen)} commands failed")


if __name__ == "__main__":
    main()
