"""``sar-fast doctor``: what is installed here, and which backends give the right answer."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import platform
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PACKAGES = (
    "sar_fast",
    "torch",
    "triton",
    "transformers",
    "flash-attn",
    "accelerate",
    "datasets",
    "peft",
    "deepspeed",
    "torchvision",
    "numpy",
    "pillow",
    "matplotlib",
    "jinja2",
    "scikit-image",
)
ROUNDING = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}  # of the output, relative


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show versions, the GPU, and which backends work on this machine.

    Every backend runs a small call in each dtype on each device, and the result is compared with the fp32 reference.
    Exit code 1 if a backend that should work here fails or is wrong.

    **Examples**

    * `sar-fast doctor`

    * `sar-fast doctor --json | jq .backends`
    """
    found = {"versions": versions(), "gpus": gpus(), "backends": try_backends()}
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found)
    if any(trial["status"] in ("wrong", "fails") for trial in found["backends"]):
        raise typer.Exit(1)


def versions() -> dict[str, str | None]:
    """Version of Python and of each package; None where it is not installed."""
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    return installed


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability and memory in bytes of each GPU that torch sees."""
    import torch

    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory} for p in properties]


def try_backends() -> list[dict[str, Any]]:
    """One record per backend, device and dtype: ``status`` "works", "wrong", "fails" or "unavailable", ``error`` of the
    output relative to the fp32 reference, and ``reason`` where it does not run."""
    import torch

    from sar_fast.backends.select import BACKENDS

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [
        {
            "backend": backend,
            "device": device,
            "dtype": dtype,
            **_trial(backend, device, dtype),
        }
        for backend in BACKENDS
        for device in devices
        for dtype in ROUNDING
    ]


def _trial(backend: str, device: str, dtype_name: str) -> dict[str, Any]:
    import torch

    from sar_fast.analysis.timing import attention_inputs
    from sar_fast.backends.protocol import Request
    from sar_fast.backends.select import BACKENDS
    from sar_fast.functional import sar_attn_func
    from sar_fast.reference import sar_attention_reference
    from sar_fast.values import Scores

    dtype = getattr(torch, dtype_name)
    inputs = attention_inputs(128, 64, dtype, heads=4, kv_heads=2, head_dim=64, device=device)
    reason = BACKENDS[backend].unsupported(Request(inputs[0].device, dtype, Scores(64**-0.5), head_dim=64))
    if reason is not None:
        return {"status": "unavailable", "error": None, "reason": reason}
    try:
        out = sar_attn_func(*inputs, backend=backend)
    except Exception as error:  # a broken toolchain fails in its own ways; the failure is the answer that is asked for
        return {"status": "fails", "error": None, "reason": " ".join(str(error).split()) or type(error).__name__}
    q, k, v = (x.float() for x in inputs[:3])
    expected = sar_attention_reference(q, k, v, *inputs[3:])
    error = float((out.float() - expected).abs().max() / expected.abs().max())
    return {"status": "works" if error <= ROUNDING[dtype_name] else "wrong", "error": error, "reason": None}


def _print(found: dict[str, Any]) -> None:
    console = Console()
    table = Table(title="Versions", title_justify="left", show_header=False, box=None)
    for name, version in found["versions"].items():
        table.add_row(name, version or "[dim]not installed[/dim]")
    console.print(table)
    console.print("\nGPU")
    for gpu in found["gpus"]:
        size = gpu["memory_bytes"] / 2**30
        console.print(f"  {gpu['name']}, compute capability {gpu['capability']}, {size:.0f} GiB")
    if not found["gpus"]:
        console.print("  none that torch can use")
    table = Table(title="\nBackends", title_justify="left")
    for name in ("backend", "device", "dtype", "result"):
        table.add_column(name)
    colours = {"works": "green", "wrong": "bold red", "fails": "bold red", "unavailable": "yellow"}
    same = lambda t: (t["backend"], t["device"], t["status"], t["reason"])
    for (backend, device, status, reason), trials in itertools.groupby(found["backends"], key=same):
        for shown in [list(trials)] if reason else [[t] for t in trials]:  # one line per reason, one per error
            detail = reason or f"error {shown[0]['error']:.1e}"
            dtypes = ", ".join(t["dtype"] for t in shown)
            table.add_row(backend, device, dtypes, f"[{colours[status]}]{status}[/]: {escape(detail)}")
    console.print(table)
