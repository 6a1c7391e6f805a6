"""Write the numbers of README.md and docs/weighting.md from the result files: every figure there comes from here.

python benchmarks/readme.py            # rewrites the marked blocks of both
python benchmarks/readme.py --check    # exit 1 if they differ
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from gpu_suite.goals import goals
from gpu_suite.records import identity
from gpu_suite.records import read as records_read

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def cpu_attention() -> str:
    """Table of benchmarks/results/cpu_attention.json."""
    data = json.loads((RESULTS / "cpu_attention.json").read_text())
    lines = [
        "| N (visual) | dtype | provider | time | x plain SDPA | faster than eager | extra memory, of eager's |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in data["records"]:
        shape = r["shape"]
        cells = [
            f"{shape['N']} ({shape['V']})",
            r["dtype"],
            r["provider"],
            f"{r['milliseconds_p50']:.0f} ms",
            f"{r['times_sdpa']:.2f}",
            f"{r['speedup_over_eager']:.1f} x",
            f"{100 * r['peak_extra_of_eager']:.1f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    meta = data["meta"]
    lines += ["", f"{meta['cpu']}, {meta['threads']} threads, torch {meta['torch']}, commit {meta['commit']}."]
    return "\n".join(lines)


def eval_speed() -> str:
    """Table of benchmarks/results/eval_speed.json."""
    data = json.loads((RESULTS / "eval_speed.json").read_text())
    lines = ["| evaluation | against | CPU seconds, theirs | ours | ratio |", "|---|---|---|---|---|"]
    for r in data["records"]:
        other = next(side for side in r["seconds"] if side != "this package")
        theirs, ours = (r["seconds"][side]["cpu_seconds"] for side in (other, "this package"))
        lines.append(f"| {r['analysis']} | {other} | {theirs:.1f} | {ours:.1f} | {r['ratio']:.1f} x |")
    meta = data["meta"]
    about = f"{meta['layers']} layers, {meta['visual_tokens']} visual tokens, {meta['threads']} thread"
    lines += ["", f"{about}, torch {meta['versions']['torch']}, commit {meta['commit'][:7]}."]
    return "\n".join(lines)


def model_overhead() -> str:
    """Table of benchmarks/results/model_overhead.json: the composed backend, which "auto" takes on a CPU."""
    data = json.loads((RESULTS / "model_overhead.json").read_text())
    lines = ["| tokens (visual) | text after the pictures | SAR, x plain SDPA | eager, x SAR |", "|---|---|---|---|"]
    for r in data["records"]:
        if r["provider"] == "sar composed":
            shape = r["shape"]
            batch = f"{shape['B']} x " if "B" in shape else ""
            cells = [f"{batch}{shape['N']} ({shape['V']})", str(shape["T"]), f"{r['times_sdpa']:.2f}"]
            cells.append("-" if r["speedup_over_eager"] is None else f"{r['speedup_over_eager']:.1f} x")
            lines.append(f"| {' | '.join(cells)} |")
    meta, shape = data["meta"], data["records"][0]["shape"]
    about = f"{shape['layers']} layers of width {shape['width']}, {meta['threads']} thread, torch {meta['torch']}"
    lines += ["", f"{about}, commit {meta['commit'][:7]}."]
    return "\n".join(lines)


def gpu() -> str:
    """The goals' ratios of benchmarks/results/gpu/records.jsonl, or that there are none yet."""
    records = records_read(RESULTS / "gpu" / "records.jsonl")
    ratios = list(goals({identity(r): r for r in records if r["key"] == records[-1]["key"]}.values()))
    if not ratios:
        return "No GPU has measured anything yet."
    lines = ["| ratio | D | shapes | least .. largest | goal |", "|---|---|---|---|---|"]
    groups: dict[tuple, list] = {}
    for r in ratios:
        groups.setdefault((r.work, r.shape.get("D", "-"), r.goal, r.at_least), []).append(r.value)
    for (work, head_dim, goal, at_least), values in groups.items():
        cells = [work, str(head_dim), str(len(values)), f"{min(values):.2f} .. {max(values):.2f}"]
        lines.append(f"| {' | '.join(cells)} | {'>=' if at_least else '<='} {goal:g} |")
    last = records[-1]
    about = f"{last['gpu']}, driver {last['driver']}, torch {last['versions']['torch']}, code {last['key']}"
    return "\n".join([*lines, "", f"{about}."])


def weighting_cost() -> str:
    """Table of benchmarks/results/weighting_cost.json, a row per length and rule."""
    data = json.loads((RESULTS / "weighting_cost.json").read_text())
    at = {(r["shape"]["N"], r["provider"], r["mode"]): r for r in data["records"]}
    modes = list(dict.fromkeys(mode for _, _, mode in at))
    lines = [f"| N | rule | {' | '.join(modes)} |", "|---" * (2 + len(modes)) + "|"]
    for length, rule in dict.fromkeys(key[:2] for key in at):
        cells = [_cost(at.get((length, rule, mode))) for mode in modes]
        lines.append(f"| {length} | {rule} | {' | '.join(cells)} |")
    meta, first = data["meta"], data["records"][0]
    machine = meta.get("gpu") or f"{meta['cpu']}, {meta['threads']} thread"
    shape = ", ".join(f"{name} {first['shape'][name]}" for name in ("H", "Hkv", "D"))
    about = f'`"{first["backend"]}"`, {first["dtype"]}, {shape}, causal; {machine}, torch {meta["torch"]}'
    lines += ["", f"{about}, commit {meta['commit']}."]
    return "\n".join(lines)


def _cost(r: dict | None) -> str:
    """Time against plain attention / against the paper's rule inside the backend, memory."""
    if r is None:
        return "-"
    return f"{r['times_plain']:.2f} / {r['times_inside']:.2f}, {r['peak_extra_bytes'] / 1e6:.0f} MB"


PAGES = {
    "README.md": {
        "gpu": gpu,
        "cpu_attention": cpu_attention,
        "model_overhead": model_overhead,
        "eval_speed": eval_speed,
    },
    "docs/weighting.md": {"weighting_cost": weighting_cost},
}


def fill(page: str, text: str) -> str:
    """A page's text with every marked block replaced."""
    for name, table in PAGES[page].items():
        begin, end = f"<!-- numbers:{name} -->", f"<!-- /numbers:{name} -->"
        if begin not in text or end not in text:
            raise SystemExit(f"{page} lacks the block {begin} ... {end}")
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", f"{begin}\n{table()}\n{end}", text, flags=re.S)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is out of date")
    args = parser.parse_args()
    stale = []
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        new = fill(page, text)
        if new != text:
            stale.append(page)
        if not args.check:
            path.write_text(new)
    if args.check:
        raise SystemExit(f"out of date: {', '.join(stale)}; run python benchmarks/readme.py" if stale else 0)


if __name__ == "__main__":
    main()
