"""A bare installation, and one with each extra, each in an environment of its own, from the wheel.

    python tests/acceptance/extras.py                          # bare, reports, train, deepspeed, ... of the table below
    python tests/acceptance/extras.py --extras bare train
    python tests/acceptance/extras.py --folder FOLDER          # keeps the environments; they are taken up again

The wheel is installed with the extra and nothing else, outside the checkout; then a few commands run that need it. The
training stacks' extras have programs of their own (training_stacks.py, llamafactory.py).
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = ROOT / "experiments" / "data"
GENERATE = "sar-fast generate --image {picture} --question 'What colour is the circle?' --use_sar --k 2"
EVALUATE = "python {root}/experiments/evaluate.py --model_name_or_path miniature --output_dir {out}"
TRAIN = (
    "python {root}/experiments/train.py --model_name_or_path miniature --do_train --dataset {data}/shapes_llava.json "
    "--max_steps 2 --output_dir {out} --use_cpu"
)
EXTRAS = {  # extra -> (command, what its only error line ends with, "" for success); "bare" has none
    "bare": [
        ("sar-fast doctor", ""),
        (GENERATE, ""),
        ("sar-fast inspect --image {picture} --question 'What is this?' --k 2", ""),
        ("sar-fast demo --output_dir {out}", "pip install 'sar_fast[reports]'"),
        (f"{EVALUATE} --task pope --data_dir {{data}}/benchmarks/pope", "pip install 'sar_fast[train]'"),
        ("python -c 'import sar_fast, sar_fast.lab, sar_kernels.attention'", ""),
    ],
    "reports": [("sar-fast demo --output_dir {out}", ""), (GENERATE, "")],
    "train": [
        (f"{EVALUATE} --task pope --data_dir {{data}}/benchmarks/pope --use_sar --sar_activation_layer_k 2", ""),
        (f"{TRAIN} --report_to none --use_sar --sar_activation_layer_k 2", ""),
        (f"{TRAIN} --finetuning_type lora --report_to none", ""),
        (f"{TRAIN} --report_to wandb", "pip install 'sar_fast[wandb]'"),
        (f"{TRAIN} --report_to tensorboard", "pip install 'sar_fast[tensorboard]'"),
        (f"{TRAIN} --plot_loss --report_to none", "pip install 'sar_fast[reports]'"),
    ],
    "train,tensorboard": [(f"{TRAIN} --report_to tensorboard", "")],
    "train,wandb": [(f"WANDB_MODE=offline {TRAIN} --report_to wandb", "")],
    "train,reports": [
        (f"{EVALUATE} --do_sfs_fi_eval --dataset {{data}}/shapes_grounding.parquet --max_samples 4", ""),
        (f"{EVALUATE} --do_layerwise_probe --dataset {{data}}/shapes_grounding.parquet --max_samples 12", ""),
    ],
}


def build_wheel(folder: Path) -> Path:
    """The wheel of the checkout as it stands."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("sar_fast-*.whl")
    return wheel


def environment(extra: str, wheel: Path, folder: Path) -> Path:
    """The folder of programs of an environment with the wheel and one extra."""
    home = folder / extra.replace(",", "_")
    if not (home / "bin" / "sar-fast").exists():
        venv.create(home, with_pip=True, clear=True)
    name = str(wheel) if extra == "bare" else f"{wheel}[{extra}]"
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, name], check=True)
    subprocess.run([*pip, "--no-deps", "--force-reinstall", str(wheel)], check=True)  # a kept one may have an older
    return home / "bin"


def check(extra: str, programs: Path, outside: Path) -> Iterator[str]:
    """What is wrong with an extra's environment."""
    for number, (command, expected) in enumerate(EXTRAS[extra]):
        out = outside / f"{extra.replace(',', '_')}_{number}"
        picture = next((DATA / "images").glob("*"))
        words = command.format(root=ROOT, data=DATA, picture=picture, out=out)
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", words],
            cwd=outside,
            env={"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(outside), "OMP_NUM_THREADS": "2"},
            capture_output=True,
            text=True,
        )
        last = (done.stderr.strip().splitlines() or [""])[-1]
        right = done.returncode == 0 if not expected else done.returncode == 2 and last.endswith(expected)
        print(f"{'ok' if right else 'FAILED':>7}  {time.monotonic() - began:5.0f}s  [{extra}] {words}", flush=True)
        if not right:
            yield f"[{extra}] {words}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", nargs="+", choices=EXTRAS, default=list(EXTRAS))
    parser.add_argument("--folder", type=Path, help="of the environments; default: a temporary one")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = args.folder or temporary / "environments"
        folder.mkdir(parents=True, exist_ok=True)
        wheel = build_wheel(temporary)
        wrong = []
        for extra in args.extras:
            programs = environment(extra, wheel, folder)
            wrong += check(extra, programs, temporary)
            if args.folder is None:  # some gigabytes each
                shutil.rmtree(programs.parent)
    if wrong:
        raise SystemExit("\n\n".join(wrong))


if __name__ == "__main__":
    main()
