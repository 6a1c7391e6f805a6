"""Compiles the kernels of slices into Triton's cache, in parallel, without a GPU; packs and unpacks that cache.

python -m gpu_suite.precompile forward decode --jobs 15
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tarfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

LARGEST_PACK = 16 << 20  # bytes


def pack_name() -> str:
    """A cache serves one Triton and one Python: its launchers are extension modules."""
    from importlib.metadata import version

    python = "".join(platform.python_version_tuple()[:2])
    return f"triton-{version('triton')}-cp{python}-{platform.machine()}.tar.xz"


def pack(cache: Path, folder: Path) -> Path:
    """The cache as one file in ``folder``. Only what the JIT reads: no intermediate representations."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / pack_name()
    partial = target.with_suffix(".partial")
    keep = lambda item: item if item.isdir() or item.name.endswith((".json", ".cubin", ".so")) else None
    with tarfile.open(partial, "w:xz", preset=9) as archive:
        archive.add(cache, arcname=".", filter=keep)
    size = partial.stat().st_size
    if size > LARGEST_PACK:
        raise SystemExit(f"{partial} has {size} bytes, more than {LARGEST_PACK}: leave out slices")
    partial.replace(target)
    return target


def unpack(folder: Path, cache: Path) -> str:
    """Fill the cache from a pack of this Triton and Python, if there is one; says what happened."""
    try:
        found = folder / pack_name()
    except ImportError as error:
        return f"no cache unpacked: {error}"
    if not found.is_file():
        others = sorted(p.name for p in folder.glob("*.tar.xz")) if folder.is_dir() else []
        return f"no cache to unpack: {found} is not there{', only ' + ', '.join(others) if others else ''}"
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(found) as archive:
        archive.extractall(cache, filter="data")
    for group in cache.glob("*/__grp__*.json"):  # Triton keeps absolute paths of a kernel's files in them
        found_there = json.loads(group.read_text())
        files = [group.parent / name for name in found_there["child_paths"]]
        found_there["child_paths"] = {f.name: str(f.resolve()) for f in files if f.exists()}
        group.write_text(json.dumps(found_there))
    return f"cache unpacked from {found}"


Place = tuple[str, int]  # a slice, and which of its launches


def distinct(slices: Sequence[str], arch: str) -> tuple[dict[tuple, Place], dict[str, set[tuple]]]:
    """Every kernel that must be compiled, by what the compiler is told of it, and those of each slice."""
    from gpu_suite.kernels import launches_of
    from sar_kernels.tools.aot_measure import compile_key

    found: dict[tuple, Place] = {}
    of_slice: dict[str, set[tuple]] = {}
    for name in slices:
        keys = [compile_key(launch, arch) for launch in launches_of(name, arch=arch)]
        of_slice[name] = set(keys)
        for index, key in enumerate(keys):
            found.setdefault(key, (name, index))
    return found, {name: keys for name, keys in of_slice.items() if keys}


_launches: dict[str, list] = {}  # of this process


def _begin(arch: str) -> None:
    from gpu_suite.pretend import pretend

    pretend(arch)


def compile_one(name: str, index: int, arch: str) -> tuple[str, bool, float, str | None]:
    """(kernel, whether the cache had it, seconds, error or None) of one launch of a slice."""
    import triton

    from gpu_suite.kernels import launches_of

    if name not in _launches:
        _launches[name] = list(launches_of(name, arch=arch))
    launch, hits, began = _launches[name][index], [], time.time()
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    kernel = launch.kernel.__name__.removesuffix("_kernel")
    launch.kernel.device_caches.clear()  # this process's memory takes for alike what the cache's files tell apart
    try:
        launch.run()
    except Exception as error:  # a kernel that does not compile must not keep the others from it
        return kernel, False, time.time() - began, f"{type(error).__name__}: {error}"[:500]
    return kernel, all(hits), time.time() - began, None


def compile_all(slices: Sequence[str], arch: str, jobs: int) -> int:
    """Compile what misses, the slowest kernels first; prints a line a miss and one a slice; returns how many failed."""
    order = ("dkdv_kernel", "dq_kernel", "forward_kernel", "decode_split_kernel", "second_moments_kernel")
    rank = lambda key: order.index(key[1]) if key[1] in order else len(order)
    began = time.time()
    found, of_slice = distinct(slices, arch)
    keys, hits, failed = sorted(found, key=rank), set(), 0
    places = [found[key] for key in keys]
    context, jobs = multiprocessing.get_context("spawn"), max(1, min(jobs, len(keys)))
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(arch,)) as pool:
        outcomes = pool.map(compile_one, *zip(*places), [arch] * len(places)) if places else ()
        for key, (kernel, hit, seconds, error) in zip(keys, outcomes):
            failed += error is not None
            if hit:
                hits.add(key)
            else:
                print(f"  {kernel}: {error or f'compiled in {seconds:.1f} s'}", flush=True)
    for name, wanted in of_slice.items():
        print(f"{name}: {len(wanted)} kernels, {len(wanted & hits)} from the cache", flush=True)
    print(
        f"{len(keys)} kernels for {arch}: {len(hits)} from the cache, {len(keys) - len(hits) - failed} compiled, "
        f"{failed} failed, {time.time() - began:.1f} s in {jobs} processes",
        flush=True,
    )
    return failed


def main(argv: list[str] | None = None) -> int:
    from gpu_suite.slices import BY_NAME

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slices", nargs="+", choices=sorted(BY_NAME), metavar="slice")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--done", type=Path, help="file to make at the end")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: unset it, the interpreter compiles nothing")
    try:
        return min(1, compile_all(arguments.slices, arguments.arch, arguments.jobs))
    finally:
        if arguments.done is not None:
            arguments.done.touch()


if __name__ == "__main__":
    sys.exit(main())
