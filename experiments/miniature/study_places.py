"""Measures what fine-tuning does to the miniature of places, and whether SAR undoes it; writes the tables of a page.

    python experiments/miniature/study_places.py --models results/places --output_dir results/places/study

``--models`` holds ``seed_N/base`` of train_places.py and ``seed_N/{sft,control,unbiased}`` of fine_tune_places.py.
Answers are kept as they come, so an interrupted run goes on. ``--page`` gets the tables; without it they are printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from sar_fast.lab.miniature.places.checkpoint import SIDES
from sar_fast.lab.paper.study.report import TABLES, write_page
from sar_fast.lab.paper.study.run import run
from sar_fast.lab.paper.study.settings import Study


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="Markdown page whose tables are replaced")
    parser.add_argument("--validation", type=int, default=100, help="validation questions of every kind")
    parser.add_argument("--test", type=int, default=300, help="test questions of every kind")
    parser.add_argument("--pictures", type=int, default=100, help="pictures for SFS and FI")
    parser.add_argument("--sides", type=int, nargs="+", default=[*SIDES], help="of pictures, in pixels")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    study = Study(args.models, args.output_dir, args.validation, args.test, args.pictures, tuple(args.sides))
    found = run(study)
    if args.page is not None:
        write_page(study, found, args.page)
        print(f"{args.page}: tables of {', '.join(TABLES)}")
        return
    for name, make in TABLES.items():
        print(f"{name}\n\n{make(study, found)}")


if __name__ == "__main__":
    main()
