"""Draw the GPU figures from benchmarks/results/gpu/records.jsonl: speed and memory of attention by the prompt's length.

python benchmarks/plot.py [--results FILE] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from gpu_suite.records import identity

HERE = Path(__file__).parent


def read(path: Path) -> list[dict[str, Any]]:
    """The last records of the GPU and the code that were measured last."""
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: python benchmarks/gpu.py writes it")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    last = records[-1]
    latest = {identity(r): r for r in records if (r["gpu"], r["key"]) == (last["gpu"], last["key"])}
    return list(latest.values())


def curves(records: list[dict[str, Any]], mode: str, value: str, **at: Any) -> dict[str, list[tuple[int, float]]]:
    """Provider -> (N, value) points of one mode, where the shape agrees with ``at``."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for r in records:
        if r["mode"] == mode and r.get(value) is not None and all(r["shape"].get(k) == v for k, v in at.items()):
            found[r["provider"]].append((r["shape"]["N"], r[value]))
    return {provider: sorted(points) for provider, points in found.items()}


def draw(panels: list[tuple[str, str, dict[str, list[tuple[int, float]]]]], title: str, path: Path) -> None:
    """One panel per (title, y label, curves)."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), layout="constrained", squeeze=False)
    for ax, (name, label, lines) in zip(axes[0], panels):
        for provider, points in lines.items():
            ax.plot(*zip(*points), "o-", label=provider)
        ax.set(title=name, xlabel="N, tokens", ylabel=label)
        ax.set_xscale("log", base=2)
        ax.set_ylim(bottom=0)
        if lines:
            ax.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results" / "gpu" / "records.jsonl")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "images")
    arguments = parser.parse_args(argv)
    records = read(arguments.results)
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = f"{records[-1]['gpu']}, code {records[-1]['key']}"
    attention = [r for r in records if r["kernel"] == "attention"]
    dims = sorted({r["shape"]["D"] for r in attention}, reverse=True)
    speed = [
        (f"{mode}, D {d}", "TFLOP/s", curves(attention, mode, "tflops", D=d, T=0.05))
        for mode in ("forward", "forward+backward")
        for d in dims
    ]
    draw(speed, f"Causal attention, V/N about 0.9: {about}", arguments.out / "gpu_speed.png")
    memory = curves(attention, "scaling N", "peak_extra_bytes")
    mib = {p: [(n, b / 2**20) for n, b in points] for p, points in memory.items()}
    draw([("forward", "MiB beyond the inputs", mib)], f"Memory: {about}", arguments.out / "gpu_memory.png")


if __name__ == "__main__":
    main()
