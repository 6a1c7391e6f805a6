"""Choosing a backend: by name, by ``SAR_BACKEND``, or by device and call. Never a silent fall-back."""

from __future__ import annotations

import os

from sar_fast.backends import composed, torch_backend
from sar_fast.backends.host_loop import HostLoop
from sar_fast.backends.protocol import Backend, Request
from sar_fast.backends.triton import Triton
from sar_fast.config import check_choice

# in the order in which "auto" tries them
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (Triton(), HostLoop("composed", composed), HostLoop("torch", torch_backend))
}


def choose_backend(name: str, request: Request) -> Backend:
    """The backend that will run a call.

    Args:
        name: ``"auto"`` takes ``SAR_BACKEND`` if set, else the first of triton, composed, torch that supports the
            call. A name is taken as it is.

    Raises:
        ValueError: an unknown name, or a named backend that lacks something: says what, and which backend has it.
    """
    check_choice("backend", name, ("auto", *BACKENDS))
    origin = "backend"
    if name == "auto":
        name = os.environ.get("SAR_BACKEND") or "auto"
        origin = "SAR_BACKEND"
        check_choice(origin, name, ("auto", *BACKENDS))
    if name == "auto":
        candidates = [b for b in BACKENDS.values() if b.on_cpu or request.device.type != "cpu"]
        return next(b for b in candidates if b.unsupported(request) is None)
    reason = BACKENDS[name].unsupported(request)
    if reason is not None:
        others = [b.name for b in BACKENDS.values() if b.name != name and b.unsupported(request) is None]
        raise ValueError(f"{origin}={name!r} does not support {reason}; use backend={' or '.join(map(repr, others))}")
    return BACKENDS[name]
