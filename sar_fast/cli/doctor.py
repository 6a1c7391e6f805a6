"""``sar-fast doctor``: what is installed here, and which backends give the right answer."""

from __future__ import annotations

import dataclasses
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
    """Show versions, the GPU, which backends and libraries work on this machine, and which are taken for what.

    Every backend runs a small call in each dtype on each device, and the result is compared with the fp32 reference.
    Exit code 1 if a backend that should work here fails or is wrong.

    **Examples**

    * `sar-fast doctor`

    * `sar-fast doctor --json | jq .backends`
    """
    found = {
        "versions": versions(),
        "gpus": gpus(),
        "backends": try_backends(),
        "providers": providers(),
        "choices": choices(),
    }
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

    from sar_fast.backends.providers.choice import PROVIDERS
    from sar_fast.backends.select import BACKENDS

    found = [name for name, provider in PROVIDERS.items() if provider.missing() is None]
    names = {"cpu": list(BACKENDS)}
    if torch.cuda.is_available():
        names["cuda"] = [*BACKENDS, *(f"composed:{name}" for name in found)]
    return [
        {"backend": backend, "device": device, "dtype": dtype, **_trial(backend, device, dtype)}
        for device in names
        for backend in names[device]
        for dtype in ROUNDING
    ]


def providers() -> list[dict[str, Any]]:
    """One record per library whose attention backend "composed" can take, ``reason`` where it cannot be called here."""
    from sar_fast.backends.providers.choice import PROVIDERS
    from sar_fast.backends.providers.cpu import CPU_FLASH

    return [{"provider": p.name, "reason": p.missing()} for p in (CPU_FLASH, *PROVIDERS.values())]


def choices() -> list[dict[str, Any]]:
    """What "auto" and "composed" take on each device, for calls of 8,192 tokens in bfloat16 at head dim 128."""
    import torch

    from sar_fast.backends.protocol import Request
    from sar_fast.backends.select import choose_backend
    from sar_fast.method.values import Scores

    calls = {
        "inference": {},
        "training": {"backward": True},
        "packed training": {"backward": True, "packed": True},
        "padded inference": {"padded": True},
        "a window": {"scores": Scores(0.1, window=(1024, -1))},
        "a decode step": {"decode": True},
    }
    found = []
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for call, needs in calls.items():
            request = Request(torch.device(device), torch.bfloat16, head_dim=128, length=8192)
            request = dataclasses.replace(request, **needs)
            found.append({"device": device, "call": call})
            for name in ("auto", "composed"):
                try:
                    found[-1][name] = choose_backend(name, request).name
                except ValueError as error:  # which says why
                    found[-1][name] = f"none: {error}"
    return found


def _trial(backend: str, device: str, dtype_name: str) -> dict[str, Any]:
    import torch

    from sar_fast.attention.functional import sar_attn_func
    from sar_fast.backends.protocol import Request
    from sar_fast.backends.select import BY_NAME
    from sar_fast.lab.measure.timing import attention_inputs
    from sar_fast.method.reference import sar_attention_reference
    from sar_fast.method.values import Scores

    dtype = getattr(torch, dtype_name)
    inputs = attention_inputs(128, 64, dtype, heads=4, kv_heads=2, head_dim=64, device=device)
    reason = BY_NAME[backend].unsupported(Request(inputs[0].device, dtype, Scores(64**-0.5), head_dim=64))
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
    table = Table(
        title="\nLibraries whose attention backend composed can take", title_justify="left", show_header=False
    )
    for provider in found["providers"]:
        reason = provider["reason"]
        table.add_row(provider["provider"], f"[yellow]{escape(reason)}[/]" if reason else "[green]there[/]")
    console.print(table)
    table = Table(title="\nTaken for 8,192 tokens, bfloat16, head dim 128", title_justify="left")
    for name in ("device", "call", "auto", "composed"):
        table.add_column(name)
    for choice in found["choices"]:
        table.add_row(*(escape(choice[name]) for name in ("device", "call", "auto", "composed")))
    console.print(table)
