"""Which provider a call gets: a pure function of the call and of the machine, never of a clock.

``speed.json`` holds what ``benchmarks/speed_table.py`` made of a GPU's records: per architecture, direction and head
dim, and from a length on, the ways to compute a call, fastest first. Where it says nothing, the order of
:data:`UNMEASURED` holds among providers, and this project's own kernels come before all of them.
"""

from __future__ import annotations

import json
from pathlib import Path

from sar_fast.backends.protocol import Request
from sar_fast.backends.providers.aten import CuDNN, TorchFlash
from sar_fast.backends.providers.packages import FlashAttention2, FlashAttention3, FlashAttention4
from sar_fast.backends.providers.protocol import Limits, Provider

TABLE = Path(__file__).with_name("speed.json")
_AMPERE_ON = ("sm_8", "sm_9", "sm_10", "sm_12")

# An expectation, not a measurement: FlashAttention-3 and -4 are written for one generation each.
UNMEASURED = {
    "sm_8": ("fa2", "torch-fa2", "cudnn"),
    "sm_9": ("fa3", "torch-fa3", "cudnn", "fa4", "torch-fa4", "fa2", "torch-fa2"),
    "sm_10": ("fa4", "torch-fa4", "cudnn", "fa2", "torch-fa2"),
}

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        FlashAttention3("fa3", "flash_attn_interface", Limits(("sm_9",), window=True, softcap=True)),
        TorchFlash("torch-fa3", "FA3", Limits(("sm_9",))),
        FlashAttention4("fa4", "flash_attn.cute.interface", Limits(("sm_9", "sm_10"), 128, equal_head_dims=False)),
        TorchFlash("torch-fa4", "FA4", Limits(("sm_9", "sm_10"), 128)),
        CuDNN(),
        FlashAttention2("fa2", "flash_attn.flash_attn_interface", Limits(_AMPERE_ON, window=True, softcap=True)),
        TorchFlash("torch-fa2", "FA2", Limits((*_AMPERE_ON, "gfx9"), window=True)),
    )
}

# rows with "arch", "direction" ("forward" or "training"), "head_dim", "length" and "order"; read here, as traced code
# may not read files
SPEED_TABLE: list[dict] = json.loads(TABLE.read_text())["rows"]


def measured_lengths() -> list[int]:
    """The lengths from which on rows hold."""
    return [row["length"] for row in SPEED_TABLE]


def measured_order(request: Request) -> tuple[str, ...]:
    """Names of backends, fastest first, as measured for calls like this; empty if none was.

    A row holds from its length on, up to the next; head dims are rounded up to a measured one.
    """
    direction = "training" if request.backward else "forward"
    alike = [r for r in SPEED_TABLE if (r["arch"], r["direction"]) == (request.arch, direction)]
    wide = [r["head_dim"] for r in alike if r["head_dim"] >= request.head_dim]
    alike = [r for r in alike if wide and r["head_dim"] == min(wide) and r["length"] <= request.length]
    return tuple(max(alike, key=lambda r: r["length"])["order"]) if alike else ()


def unmeasured_order(arch: str) -> tuple[str, ...]:
    """Names of all providers, those first that are expected to be fastest on an architecture."""
    expected = next((order for prefix, order in UNMEASURED.items() if arch.startswith(prefix)), ())
    return (*expected, *(name for name in PROVIDERS if name not in expected))


def refusal(provider: Provider, request: Request) -> str | None:
    """Why a provider cannot compute such a call here, or None."""
    reason = provider.unsupported(request)
    if reason is None and (absent := provider.missing()):
        reason = f"being called here: {absent}"
    return reason
