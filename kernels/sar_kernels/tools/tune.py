"""Measures configurations on the GPU at hand; the fastest go to `tuned.json`, which the choosing functions prefer.

    python -m sar_kernels.tools.tune [--head-dim 64 128] [--dtype bfloat16] [--kernel forward dq decode]
                                     [--seqlen 512 4096]
    python -m sar_kernels.tools.tune --shortlist benchmarks/shortlist_sm_90.json --out FILE --seconds 20

Offline only: nothing is ever tuned inside a call. The forward and the decode kernel's choices are made for the variant
with statistics and hold for plain attention too, because both must use the same tiles (see `configs.choose`). All
candidates take half an hour to compile; `sar_kernels.tools.shortlist` finds those worth measuring without a GPU.
Run `sar_kernels.tools.aot` afterwards: it shows what the new choices spill and how many blocks they keep resident.

A choice is replaced if the best candidate's median time is below the present one's by more than the present one's
spread: the distance between the quartiles of its samples, taken before all candidates and once more after them, so that
a clock that drifts meanwhile counts as spread. Whatever fails is recorded beside the times and ends nothing, unless the
GPU itself no longer answers; the run that continues the file then leaves that candidate out.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import triton

from sar_kernels.call import MAX_HEAD_DIM, AttentionOptions, Call, WeightOptions
from sar_kernels.configs import SHORT, TUNED, KernelConfig, device_arch, length_class, padded_head_dim
from sar_kernels.decode.plan import DecodeCall
from sar_kernels.dense.plan import Through, plan_backward, plan_sar_forward
from sar_kernels.launch import Launch, run_all
from sar_kernels.tools.shortlist import (
    CONFIG,
    DTYPES,
    PAGES,
    SEQLENS,
    TUNABLE,
    Choice,
    choices,
    describe,
    write_atomically,
)

TOKENS = 16384  # per measurement, as batch * seqlen
HEAD_DIMS = (16, 32, 64, 128, 256)
FIRST_LOOK = 3  # runs, after which a slow candidate is left
STOP = 1.3  # times the best so far: slower ones are left
MOST_RUNS = 100


def _generator(device: str) -> torch.Generator | None:
    """Seeded; tensors on "meta" have no memory to fill."""
    return None if device == "meta" else torch.Generator(device).manual_seed(0)


def prefill_launches(choice: Choice, config: KernelConfig | None, device: str = "cuda", arch: str | None = None):
    """The launches of one forward and backward call, the last of them of the kernel to be measured."""
    kernel, seqlen, head_dim = choice.kernel, choice.seqlen, choice.head_dim
    batch, heads, kv_heads = max(1, TOKENS // seqlen), 16, 4
    drawn = {"device": device, "generator": _generator(device)}
    normal = lambda h: torch.randn((batch, seqlen, h, head_dim), dtype=choice.dtype, **drawn)
    q, k, v, dout = normal(heads), normal(kv_heads), normal(kv_heads), normal(heads)
    token = torch.arange(seqlen, device=device).expand(batch, -1)
    visual, text = token < seqlen // 2, token >= seqlen // 2
    prior = visual / visual.sum(-1, keepdim=True)
    weights = WeightOptions(0.5)
    configs = None if config is None else {kernel: config}
    closed_form = True if kernel == "second_moments" else None
    options = AttentionOptions(choice.causal, head_dim**-0.5)
    call = Call(q, k, v, options, arch=arch, configs=configs, closed_form=closed_form)
    (out, lse, av, sa, c, count), work = plan_sar_forward(call, visual, text, prior, weights)
    through = Through(visual, text, prior, weights, av, sa, count) if choice.sav else None
    work += plan_backward(call, dout, out, lse, c, through)[1]
    index = next(i for i, launch in enumerate(work) if launch.kernel.__name__ == f"{kernel}_kernel")
    return work[: index + 1]


def decode_launches(choice: Choice, config: KernelConfig | None, device: str = "cuda", arch: str | None = None):
    """The split kernel of one decode step, with statistics, over 8k keys."""
    batch, heads, kv_heads, capacity, head_dim = 4, 32, 8, 8192, choice.head_dim
    page, seqlen_q = PAGES[choice.layout], 1 if choice.few else 8
    drawn = {"device": device, "generator": _generator(device)}
    normal = lambda *shape: torch.randn(shape, dtype=choice.dtype, **drawn)
    k, v = normal(batch, capacity, kv_heads, head_dim), normal(batch, capacity, kv_heads, head_dim)
    table = None
    if page:
        k, v = (t.view(-1, page, kv_heads, head_dim) for t in (k, v))
        table = torch.randperm(len(k), **drawn).view(batch, -1).to(torch.int32)
    lengths = torch.full((batch,), capacity, dtype=torch.int32, device=device)
    options = AttentionOptions(True, head_dim**-0.5)
    q = normal(batch, seqlen_q, heads, head_dim)
    sm_count = 132 if device == "meta" else None
    call = DecodeCall(q, k, v, lengths, options, table, arch=arch, sm_count=sm_count, config=config)
    zeros = lambda *shape: torch.zeros(shape, device=device)
    call.set_state(zeros(batch, heads), zeros(batch, heads), zeros(batch), zeros(batch, heads))
    visual = (torch.arange(capacity, device=device) < capacity // 2).expand(batch, -1)
    text = torch.ones((batch, seqlen_q), dtype=torch.bool, device=device)
    call.set_roles(visual, text, visual * (2 / capacity))
    return call.plan("running", WeightOptions(0.5))[:1]


def launches(
    choice: Choice, config: KernelConfig | None, device: str = "cuda", arch: str | None = None
) -> list[Launch]:
    """What is measured: the last of these, after the others have run. config None: the present one.

    device "meta" with an arch: the same launches, to be compiled without a GPU.
    """
    plan = decode_launches if choice.kernel == "decode" else prefill_launches
    return plan(choice, config, device, arch)


@functools.cache
def _flushed() -> torch.Tensor:
    """Larger than any second-level cache: writing it leaves nothing of a kernel's inputs there."""
    return torch.empty(2**28, dtype=torch.int8, device="cuda")


def _timed(launch: Launch, runs: int) -> list[float]:
    """GPU milliseconds of each run, from a cache that holds nothing of it."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start, end in events:
        _flushed().zero_()
        start.record()
        launch.run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def sample(work: list[Launch], milliseconds: float, stop_at: float | None = None) -> list[float]:
    """Times of the last launch in ms, after those that it needs: some `milliseconds` of them.

    If the first three are slower than stop_at, there are no more.
    """
    run_all(work)
    torch.cuda.synchronize()
    times = _timed(work[-1], FIRST_LOOK)
    median = statistics.median(times)
    if stop_at is not None and median > stop_at:
        return times
    more = min(MOST_RUNS, int(milliseconds / median)) - FIRST_LOOK
    return times + _timed(work[-1], max(0, more))


@dataclass(frozen=True)
class Bench:
    """The device, and how things are measured on it; tests put in a clock of their own."""

    arch: str
    name: str
    measure: Callable[[list[Launch], float, float | None], list[float]] = sample
    synchronize: Callable[[], None] = torch.cuda.synchronize
    clock: Callable[[], float] = time.monotonic
    launches: Callable[[Choice, KernelConfig | None], list[Launch]] = launches


def spread(samples: list[float]) -> float:
    """The distance between the quartiles."""
    if len(samples) < 2:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return high - low


def decide(present: list[float], times: dict[KernelConfig, list[float]]) -> KernelConfig | None:
    """The candidate with the least median time, or None if the present configuration is as good within its spread."""
    best = min(times, key=lambda config: statistics.median(times[config]), default=None)
    if best is None or not present:
        return best
    gain = statistics.median(present) - statistics.median(times[best])
    return best if gain > spread(present) else None


@dataclass
class Search:
    """One key's measurements so far."""

    key: str
    choice: Choice
    present: KernelConfig
    bench: Bench
    milliseconds: float
    times: dict[KernelConfig, list[float]] = field(default_factory=dict)
    errors: dict[KernelConfig, str] = field(default_factory=dict)
    left_out: set[KernelConfig] = field(default_factory=set)
    complete: bool = False
    fatal: KernelConfig | None = None  # after this one the GPU no longer answered

    def attempt(self, config: KernelConfig, stop_at: float | None = None) -> None:
        """Measures one configuration; whatever goes wrong is printed and kept."""
        try:
            work = self.bench.launches(self.choice, None if config == self.present else config)
            samples = self.bench.measure(work, self.milliseconds, stop_at)
            self.times.setdefault(config, []).extend(samples)
        except Exception as error:
            self.errors[config] = f"{type(error).__name__}: {str(error).strip()[:300]}"
            print(f"{self.key}: {describe(config)}: {self.errors[config]}", flush=True)
            if not self.answers():
                self.fatal = config

    def answers(self) -> bool:
        """Whether the device still works: an illegal access, for one, fails everything after it."""
        try:
            self.bench.synchronize()
        except Exception as error:
            print(f"{self.key}: the GPU no longer answers: {str(error).strip()[:300]}", flush=True)
            return False
        return True

    def median(self, config: KernelConfig) -> float:
        return statistics.median(self.times[config])

    def chosen(self) -> KernelConfig | None:
        """What takes the present configuration's place, if anything does."""
        others = {config: samples for config, samples in self.times.items() if config != self.present}
        return decide(self.times.get(self.present, []), others)

    def run(self, configs: list[KernelConfig], deadline: float) -> None:
        """Measures the present configuration, all others, and if one is faster the present one again."""
        for config in dict.fromkeys((self.present, *configs)):
            if config in self.left_out:
                continue  # it broke down the GPU in an earlier run
            if self.bench.clock() >= deadline:
                return
            best = min(map(self.median, self.times), default=math.inf)
            self.attempt(config, STOP * best if self.times else None)
            if self.fatal:
                return
        self.complete = bool(self.times)
        if self.present in self.times and self.chosen() is not None and self.bench.clock() < deadline:
            self.attempt(self.present)

    def resume(self, record: dict) -> None:
        """Leaves out what broke down the GPU in an earlier run."""
        for row in record.get("candidates", ()):
            if row.get("fatal"):
                config = KernelConfig(**{name: row[name] for name in CONFIG})
                self.errors[config] = row["error"]
                self.left_out.add(config)

    def record(self) -> dict:
        """All that was measured, for the file."""
        rows = []
        for config in dict.fromkeys((*self.times, *self.errors)):
            row = asdict(config)
            if config in self.times:
                samples = self.times[config]
                row |= {"milliseconds": self.median(config), "spread": spread(samples), "samples": len(samples)}
            if config in self.errors:
                row["error"] = self.errors[config]
            if config == self.fatal or config in self.left_out:
                row["fatal"] = True
            rows.append(row)
        return {"complete": self.complete, "present": asdict(self.present), "candidates": rows}

    def summary(self) -> str:
        """One line: the present time, the best one, and the choice."""
        chosen = self.chosen()
        present = f"{self.median(self.present):.4f}" if self.present in self.times else "?"
        best = f"{self.median(chosen):.4f}" if chosen else present
        cut = "" if self.complete else " (cut short)"
        return f"{self.key}: {present} -> {best} ms {describe(chosen) if chosen else '(unchanged)'}{cut}"


def keep(found: dict, search: Search) -> None:
    """Puts what a search found into the file's content."""
    chosen = search.chosen()
    if chosen is not None:
        found["configs"][search.key] = asdict(chosen)
    elif found["configs"].get(search.key) != asdict(search.present):  # an earlier run's choice, not confirmed
        found["configs"].pop(search.key, None)
    found["measured"][search.key] = search.record()


def tune(
    work: list[tuple[Choice, list[KernelConfig]]],
    found: dict,
    path: Path,
    bench: Bench,
    milliseconds: float,
    deadline: float = math.inf,
) -> bool:
    """Makes these choices and writes the file after each of them; False if the GPU broke down."""
    for choice, configs in work:
        if bench.clock() >= deadline:
            break
        search = Search(choice.key(bench.arch), choice, choice.present(bench.arch), bench, milliseconds)
        search.resume(found["measured"].get(search.key, {}))
        search.run(configs, deadline)
        if search.times or search.errors:
            keep(found, search)
            write_atomically(path, found)
            print(search.summary(), flush=True)
        if search.fatal:
            return False
    return True


def read_shortlist(path: Path) -> tuple[str, dict[str, list[KernelConfig]]]:
    """The architecture that `sar_kernels.tools.shortlist` made a file for, and each key's configurations."""
    try:
        content = json.loads(path.read_text())
        keys = {
            key: [KernelConfig(**{name: row[name] for name in CONFIG}) for row in rows]
            for key, rows in content["keys"].items()
        }
        return content["arch"], keys
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"got {path} ({type(error).__name__}: {error}), need a file of sar_kernels.tools.shortlist"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sar_kernels.tools.tune", description=__doc__.split("\n")[0])
    of = lambda values: f"of {', '.join(values)}"
    several = lambda name, metavar, **kwargs: parser.add_argument(name, nargs="+", metavar=metavar, **kwargs)
    several("--head-dim", "D", type=int, help="default: 64 128, or all in the shortlist")
    several("--dtype", "DTYPE", choices=DTYPES, help=f"{of(DTYPES)}; default: bfloat16, or all in the shortlist")
    several("--kernel", "KERNEL", choices=TUNABLE, help=f"{of(TUNABLE)}; default: all")
    several("--seqlen", "S", type=int, help="default: 512 4096; from a shortlist its lengths, measured at these")
    parser.add_argument("--shortlist", type=Path, metavar="FILE", help="measure only what this file lists")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: tuned.json, which calls read")
    parser.add_argument("--again", action="store_true", help="measure what --out has already, too")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after these with what there is")
    parser.add_argument("--milliseconds", type=float, help="per candidate; default: 20 with a shortlist, else 100")
    return parser


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not all(1 <= d <= MAX_HEAD_DIM for d in args.head_dim or ()):
        parser.error(f"--head-dim: got {args.head_dim}, need 1 to {MAX_HEAD_DIM}")
    lengths = args.seqlen or (1,)
    if min(lengths) < 1 or len({length_class(n) for n in lengths}) < len(lengths):
        parser.error(
            f"--seqlen: got {args.seqlen}, need one up to {SHORT}, one above, or both: a choice holds for each"
        )
    for name in ("seconds", "milliseconds"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name}: got {value}, need more than 0")


def from_shortlist(
    path: Path, arch: str, kernels=TUNABLE, head_dims=HEAD_DIMS, dtypes=DTYPES, seqlens=SEQLENS
) -> list[tuple[Choice, list[KernelConfig]]]:
    """A shortlist's choices in its order, those that the other arguments leave.

    Raises:
        ValueError: the file is none of `sar_kernels.tools.shortlist`, or made for another architecture.
    """
    made_for, keys = read_shortlist(path)
    if made_for != arch:
        raise ValueError(f"got {path}, made for {made_for}, need one for this GPU's {arch}")
    by_key = lambda *args: {choice.key(arch): choice for choice in choices(*args)}
    wanted = by_key(kernels, {padded_head_dim(d) for d in head_dims}, dtypes, seqlens)
    unknown = keys.keys() - by_key(TUNABLE, HEAD_DIMS, DTYPES, SEQLENS).keys()
    if unknown:
        raise ValueError(f"got {path} with {', '.join(sorted(unknown))}, need keys of {', '.join(TUNABLE)}")
    return [(wanted[key], configs) for key, configs in keys.items() if key in wanted]


def _earlier(path: Path, again: list[str]) -> dict:
    """What the file has from earlier runs; `again` are to be measured anew."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}")
    found = {"configs": {}, "measured": {}, **(json.loads(path.read_text()) if path.exists() else {})}
    for key in found["measured"].keys() & set(again):
        record = found["measured"][key]
        record["complete"] = False
        record["candidates"] = [{k: v for k, v in row.items() if k != "fatal"} for row in record["candidates"]]
    return found


def main(argv: list[str] | None = None, bench: Bench | None = None) -> int:
    """Command line; bench: another device than the GPU at hand. Exit status 1 if the GPU broke down."""
    parser = _parser()
    args = parser.parse_args(argv)
    _check(parser, args)
    if bench is None and not torch.cuda.is_available():
        parser.error("no GPU: tuning measures; `python -m sar_kernels.tools.aot` checks configurations without one")
    if bench is None:
        bench = Bench(device_arch(torch.device("cuda", torch.cuda.current_device())), torch.cuda.get_device_name())
    deadline = bench.clock() + args.seconds
    if args.shortlist is not None:
        try:
            left = (args.kernel or TUNABLE, args.head_dim or HEAD_DIMS, args.dtype or DTYPES, args.seqlen or SEQLENS)
            work = from_shortlist(args.shortlist, bench.arch, *left)
        except ValueError as error:
            parser.error(f"--shortlist: {error}")
    else:
        dtypes = args.dtype or ("bfloat16",)
        every = choices(args.kernel or TUNABLE, args.head_dim or (64, 128), dtypes, args.seqlen or SEQLENS)
        work = [(choice, list(choice.candidates(bench.arch))) for choice in every]
    path = args.out or TUNED
    keys = [choice.key(bench.arch) for choice, _ in work]
    try:
        found = _earlier(path, keys if args.again or args.out is None else [])
    except (OSError, ValueError, AttributeError) as error:
        parser.error(f"--out: got {path} ({type(error).__name__}: {error}), need a file of this command, or none")
    found["device"] = f"{bench.name}, torch {torch.__version__}, triton {triton.__version__}"
    done = lambda key: found["measured"].get(key, {}).get("complete", False)
    before = sum(map(done, keys))
    left = [item for item, key in zip(work, keys) if not done(key)]
    alive = tune(left, found, path, bench, args.milliseconds or (20 if args.shortlist else 100), deadline)
    print(_summary(found, keys, before, alive), flush=True)
    return 0 if alive else 1


def _summary(found: dict, keys: list[str], before: int, alive: bool) -> str:
    records = {key: found["measured"][key] for key in keys if key in found["measured"]}
    done = sum(record["complete"] for record in records.values())
    missing = [key for key in keys if not records.get(key, {}).get("complete")]
    errors = sum("error" in row for record in records.values() for row in record["candidates"])
    names = f" ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''})" if missing else ""
    changed = sum(found["configs"].get(key, r["present"]) != r["present"] for key, r in records.items())
    end = "" if alive else "; the GPU no longer answers"
    return (
        f"{done} of {len(keys)} keys done ({before} before), {changed} changed, {len(missing)} missing{names}, "
        f"{errors} errors{end}"
    )


if __name__ == "__main__":
    sys.exit(main())
