"""Choosing a backend: by name, by ``SAR_BACKEND``, or by device and options. Never a silent fall-back."""

from __future__ import annotations

import os

import torch

from sar_fast.backends import composed, torch_backend, triton_backend
from sar_fast.config import check_choice
from sar_fast.types import AttentionOptions
from sar_fast.validation import MAX_HEAD_DIM

PYTORCH_BACKENDS = {"composed": composed, "torch": torch_backend}
_MODULES = {"triton": triton_backend, **PYTORCH_BACKENDS}
BACKENDS = tuple(_MODULES)


def unsupported(name: str, device: torch.device, dtype: torch.dtype, options: AttentionOptions, **has: bool):
    """Why backend ``name`` cannot run a call, or None."""
    return _MODULES[name].unsupported(device, dtype, options, **has)


def choose_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    options: AttentionOptions,
    *,
    padded: bool,
    masked: bool,
    head_dim: int = 0,
) -> str:
    """The backend that will run a call.

    Args:
        name: ``"auto"`` takes ``SAR_BACKEND`` if set, else the first of triton, composed, torch that supports the
            call. A name is taken as it is.
        padded, masked: whether a key_padding_mask or a dense attn_mask is given.
        head_dim: the larger of the key's and the value's; only the torch backend goes beyond ``MAX_HEAD_DIM``.

    Raises:
        ValueError: an unknown name, or a named backend that lacks something: says what, and which backend has it.
    """
    check_choice("backend", name, ("auto", *BACKENDS))
    origin = "backend"
    if name == "auto":
        name = os.environ.get("SAR_BACKEND") or "auto"
        origin = "SAR_BACKEND"
        check_choice(origin, name, ("auto", *BACKENDS))

    def able(backend: str) -> str | None:
        if head_dim > MAX_HEAD_DIM and backend != "torch":
            return f"head_dim={head_dim}: fused kernels go to {MAX_HEAD_DIM}"
        return unsupported(backend, device, dtype, options, padded=padded, masked=masked)

    if name == "auto":
        # the interpreter runs the kernels for tests only: nobody gets it without asking
        candidates = BACKENDS if device.type != "cpu" else tuple(PYTORCH_BACKENDS)
        return next(b for b in candidates if able(b) is None)
    reason = able(name)
    if reason is not None:
        others = [b for b in BACKENDS if b != name and able(b) is None]
        raise ValueError(f"{origin}={name!r} does not support {reason}; use backend={' or '.join(map(repr, others))}")
    return name
