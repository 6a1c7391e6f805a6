"""Every GPU figure of the project by one command: a correctness gate, then the parts, then ratios against the goals.

    python benchmarks/gpu.py                         # everything
    python benchmarks/gpu.py prefill decode          # some parts; each stays under ten minutes on an H100
    python benchmarks/gpu.py --goals                 # ratios of what was measured so far
    python benchmarks/gpu.py --device cpu --tiny     # proves that the suite runs; its figures mean nothing

Records are appended to benchmarks/results/gpu.jsonl; an interrupted run goes on where it stopped, as long as GPU and
commit are the same. Nothing is timed while a result is wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from gpu_suite import attention, decode, models
from gpu_suite.attention import Bench, gate
from gpu_suite.goals import print_goals
from gpu_suite.measure import Records, machine

PARTS = {**attention.PARTS, **decode.PARTS, **models.PARTS}
RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else None)
    parser.add_argument("--tiny", action="store_true", help="sizes that prove the suite runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSONL file that records are appended to")
    parser.add_argument("--goals", action="store_true", help="measure nothing; print ratios against the goals")
    arguments = parser.parse_args(argv)
    unknown = [p for p in arguments.parts if p not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    if arguments.device is None:
        parser.error("no GPU here: --device cpu --tiny only proves that the suite runs")
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu needs --tiny: GPU sizes would take hours")
    if arguments.tiny and arguments.results == RESULTS:
        parser.error("--tiny needs --results FILE: its figures mean nothing and do not belong among the others")
    records = Records(arguments.results, machine(arguments.device))
    if not arguments.goals:
        if str(records.about["commit"]).endswith("-dirty"):
            print("warning: the checkout has changes that are not committed; the records say so", file=sys.stderr)
        bench = Bench(arguments.device, arguments.tiny, records)
        gate(bench)
        for name in arguments.parts or PARTS:
            print(f"-- {name}: {PARTS[name].__doc__.splitlines()[0]}", flush=True)
            PARTS[name](bench)
    print_goals(records.all)


if __name__ == "__main__":
    main()
