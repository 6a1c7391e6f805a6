"""Choosing a backend: by name, by ``SAR_BACKEND``, or by device and call. Never a silent fall-back."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from sar_fast.backends import composed, torch_backend
from sar_fast.backends.host_loop import HostLoop
from sar_fast.backends.protocol import Backend, Request
from sar_fast.backends.providers.choice import PROVIDERS, measured_lengths, measured_order, unmeasured_order
from sar_fast.backends.providers.protocol import Provider
from sar_fast.backends.triton import Triton
from sar_fast.backends.whole_batch import WholeBatch
from sar_fast.base import plugins
from sar_fast.base.errors import ArgumentError, check_choice
from sar_fast.method.values import Scores

# in the order in which "auto" tries them where nothing was measured
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (Triton(), HostLoop("composed", composed), HostLoop("torch", torch_backend))
}
BY_NAME: dict[str, Backend] = dict(BACKENDS)  # and "composed:<provider>"
HEAD_DIMS = (64, 96, 128, 192, 256)  # between these, no choice changes


def register_provider(provider: Provider) -> None:
    """Make another library's attention known, as ``backend="composed:<its name>"``; it replaces one of its name."""
    PROVIDERS[provider.name] = provider
    backend = WholeBatch(provider, BACKENDS["triton"])
    BY_NAME[backend.name] = backend


for _provider in list(PROVIDERS.values()):
    register_provider(_provider)


def register_backend(backend: Backend, *, replace: bool = False) -> None:
    """Make a backend known by its name; ``"auto"`` takes it only for calls that none before it supports.

    An installed package adds one by an entry point of the group ``sar_fast.backends``: its name, and where the object
    is.

    Raises:
        ArgumentError: no backend, or a name that another has, without ``replace``.
    """
    missing = [n for n in ("name", "unsupported", "forward", "backward", "decode") if not hasattr(backend, n)]
    if missing:
        raise ArgumentError("backend", repr(backend), f"be a Backend (sar_fast.backends.protocol); no {missing[0]}")
    if backend.name in ("", "auto") or ":" in backend.name or (backend.name in BACKENDS and not replace):
        taken = ", ".join(BACKENDS)
        raise ArgumentError("backend", f"the name {backend.name!r}", f"be called otherwise than {taken}, auto")
    BACKENDS[backend.name] = BY_NAME[backend.name] = backend


def check_backend_name(argument: str, name: object) -> None:
    """Raise :class:`~sar_fast.base.errors.ArgumentError` unless ``name`` is ``"auto"`` or a backend's."""
    if isinstance(name, str) and name not in ("auto", *BY_NAME):
        found = plugins.load("backends", name, argument)
        if found is not None:
            register_backend(found)
    of_provider = isinstance(name, str) and ":" in name
    check_choice(argument, name, tuple(n for n in BY_NAME if ":" in n) if of_provider else ("auto", *BACKENDS))


def choose_backend(name: str, request: Request) -> Backend:
    """The backend that will run a call.

    Args:
        name: ``"auto"`` takes ``SAR_BACKEND`` if set, else the first that supports the call of those that were
            measured to be fast, of triton, composed, torch. A name is taken as it is; on a GPU ``"composed"`` takes the
            first provider that supports the call, and ``"composed:<provider>"`` that one.

    Raises:
        ValueError: an unknown name, or a named backend that lacks something: says what, and which backend has it.
    """
    origin = "backend"
    check_backend_name(origin, name)
    if name == "auto" and os.environ.get("SAR_BACKEND"):
        name, origin = os.environ["SAR_BACKEND"], "SAR_BACKEND"
        check_backend_name(origin, name)
    if torch.compiler.is_compiling() and (request.device.type != "cpu" or ":" in name):
        return BY_NAME[_constant_choice(name, origin, *_constants(request))]
    return _first_that_supports(name, origin, request)


def _constants(request: Request) -> tuple:
    """What a choice depends on, as a traced graph is tied to it: comparisons of sizes, not sizes."""
    scores, least = request.scores, lambda bounds, n: max([0, *(x for x in bounds if x <= n)])
    return (
        *(request.device, request.dtype, scores.causal, scores.windowed, scores.softcap > 0),
        *(request.padded, request.masked, request.bounded, least(HEAD_DIMS, request.head_dim - 1), request.packed),
        *(request.square, least(measured_lengths(), request.length), request.backward, request.deterministic),
        request.decode,
    )


@torch.compiler.assume_constant_result  # asked once per graph; libraries are imported here, which no graph can
def _constant_choice(name: str, origin: str, device, dtype, causal: bool, windowed: bool, capped: bool, *others) -> str:
    """Name of the chosen backend."""
    scores = Scores(1.0, causal, (1, -1) if windowed else (-1, -1), float(capped))
    padded, masked, bounded, head_dim, *rest = others
    return _first_that_supports(
        name, origin, Request(device, dtype, scores, padded, masked, bounded, head_dim + 1, *rest)
    ).name


def _first_that_supports(name: str, origin: str, request: Request) -> Backend:
    """The first candidate that does not refuse the call; else an error with all their reasons."""
    for backend in _candidates(name, request):
        if backend.unsupported(request) is None:
            return backend
    candidates, refused = list(_candidates(name, request)), {}
    for backend in candidates:
        refused.setdefault(backend.unsupported(request), []).append(backend.name)
    several = len(refused) > 1
    reasons = "; ".join(f"{reason} ({', '.join(names)})" if several else reason for reason, names in refused.items())
    others = [b.name for b in BACKENDS.values() if b not in candidates and b.unsupported(request) is None]
    raise ArgumentError(
        origin, f"{name!r}, which does not support {reasons}", f"be {' or '.join(map(repr, others))} here"
    )


def _candidates(name: str, request: Request) -> Iterator[Backend]:
    """What a name may mean for a call, in the order in which it is tried."""
    on_cpu = request.device.type == "cpu"
    if name not in ("auto", "composed") or (name == "composed" and on_cpu):
        yield BY_NAME[name]
    elif on_cpu:
        yield from (b for b in BACKENDS.values() if b.on_cpu)
    else:
        yield from (BY_NAME[n] for n in measured_order(request) if name == "auto" or n.startswith("composed:"))
        if name == "auto":
            yield BACKENDS["triton"]
        yield from (BY_NAME[f"composed:{n}"] for n in unmeasured_order(request.arch))
        yield from (BACKENDS[n] for n in ("composed", "torch") if name in ("auto", n))
