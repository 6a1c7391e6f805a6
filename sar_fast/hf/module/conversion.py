"""Whether :class:`SARAttention` equals a transformers attention module: by what it holds, then by what it computes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError
from sar_fast.config import SARConfig
from sar_fast.hf.module.positions import ModelPositions, half_split, layer_type_of, model_positions

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
SHARED = (*PROJECTIONS, "q_norm", "k_norm")
FULL_ATTENTION = ("full_attention", "attention", "hybrid")  # what configs call layers that see all positions
BATCH, LENGTH = 2, 17
FAR = 131_072  # the second comparison's positions reach at least this far: some models scale queries by position
SCORE_STD = 8.0  # large enough that a soft-cap or a sink shows
VALUE_STD = 100.0  # large enough that a clamp shows
TOLERANCE = 1e-4  # of the largest output, in fp32


def check_structure(module: nn.Module) -> None:
    """Raise ``ValueError`` for what a module's attributes alone say against it."""
    name = type(module).__name__
    missing = [n for n in PROJECTIONS if n not in getattr(module, "_modules", {})]
    missing += [n for n in ("head_dim", "layer_idx") if getattr(module, n, None) is None]
    missing += [
        f"{n}.{size}"
        for n in PROJECTIONS
        for size in ("in_features", "out_features")
        if n not in missing and not hasattr(getattr(module, n), size)
    ]
    if missing:
        raise ArgumentError("module", f"{name} without {', '.join(missing)}", "be a LLaMA/Qwen-style self-attention")
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):  # accelerate's wrapper calls the class's
        raise ArgumentError("module", f"a {name} with a forward of its own", "run its class's forward")
    extra = _extra_state(module)
    if extra:
        raise ArgumentError(
            "module",
            f"{name}, which also has {', '.join(extra)}",
            f"hold the projections {', '.join(PROJECTIONS)} and at most q_norm and k_norm",
        )
    _check_sees_everything(module)
    heads, total = module.q_proj.out_features // module.head_dim, _heads_of(module)
    if total is not None and heads != total:
        raise ArgumentError(
            "module",
            f"{heads} from {name}.q_proj (a rank's share, or more than queries)",
            f"hold all heads of its layer, {total} by its config: SAR weighs them against each other",
        )


def _extra_state(module: nn.Module) -> list[str]:
    names = [name for name, _ in module.named_parameters()]
    for prefix, part in module.named_modules():
        persistent = part._buffers.keys() - part._non_persistent_buffers_set
        names += [f"{prefix}.{n}" if prefix else n for n in persistent if part._buffers[n] is not None]
    return sorted(n for n in names if n.split(".")[0] not in SHARED)


def _heads_of(module: nn.Module) -> int | None:
    try:
        return getattr(getattr(module, "config", None), "num_attention_heads", None)
    except RuntimeError:  # transformers' configs of unlike layers refuse to name one number; the comparison tells
        return None


def _check_sees_everything(module: nn.Module) -> None:
    """Windows and chunks live in the mask that the model makes: the module computes the same with and without."""
    kind = layer_type_of(module)
    if kind is not None and kind not in FULL_ATTENTION:
        raise ArgumentError("module", f"layer {module.layer_idx} of type {kind!r}", "attend to all positions")
    if hasattr(module, "sliding_window"):
        window = module.sliding_window
    else:
        window = None if kind is not None else getattr(getattr(module, "config", None), "sliding_window", None)
    if window is not None:
        raise ArgumentError("module", f"sliding_window={window}", "attend to all positions")


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """fp32 on the CPU, whatever the caller's device, autocast and inference mode are; their random numbers stay."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.device("cpu"))
        yield


def check_equal(new: nn.Module, module: nn.Module) -> tuple[float | None, ModelPositions | None]:
    """Compare ``new``, a SARAttention, with the module that it was made from.

    Both run with the same stand-ins for the projections and the same norms with random weights: weights that are zero,
    quantised, or not there hide nothing and cost nothing.

    Returns:
        (rope_theta, model_positions) of ``new``: where calls without position_embeddings take their positions from.

    Raises:
        ValueError: the outputs differ, or the module cannot be run as self-attention.
    """
    with isolated():
        generator = torch.Generator().manual_seed(0)
        children = _stand_ins(module, generator)
        ours, theirs = _bare(new, children, generator), _bare(module, children, generator)
        ours.sar_config = SARConfig(activation_layer_k=0)
        theirs.config = _eager(getattr(module, "config", None))
        rotary, positions = model_positions(module), (torch.arange(LENGTH)[None], _far_positions(module))
        rotated = "position_embeddings" in inspect.signature(type(module).forward).parameters
        for ids in positions if rotated else ():
            _compare(ours, theirs, _embeddings(rotary, ids, module.head_dim), ids, generator)
        if rotated and not _rotates_only_if_told(theirs, generator):
            return None, model_positions(module)  # anew: the comparison may have moved its frequencies
        ours.rope_theta = None
        for ids in positions:
            _compare(ours, theirs, None, ids, generator)
        return None, None


class _StandIn(nn.Module):
    """A random map from ``in_features`` to ``out_features`` channels, each a multiple of one of the inputs."""

    def __init__(self, in_features: int, out_features: int, std: float, generator: torch.Generator) -> None:
        super().__init__()
        self.in_features = in_features
        self.source = torch.randint(in_features, (out_features,), generator=generator)
        self.gain = torch.randn(out_features, generator=generator, dtype=torch.float32) * std

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.source] * self.gain


def _stand_ins(module: nn.Module, generator: torch.Generator) -> dict[str, nn.Module]:
    scaling = getattr(module, "scaling", None) or module.head_dim**-0.5
    std = (SCORE_STD / (abs(scaling) * module.head_dim**0.5)) ** 0.5
    stds = {"q_proj": std, "k_proj": std, "v_proj": VALUE_STD, "o_proj": 1.0}
    children = {
        n: _StandIn(getattr(module, n).in_features, getattr(module, n).out_features, stds[n], generator) for n in stds
    }
    norms = [n for n in ("q_norm", "k_norm") if isinstance(getattr(module, n, None), nn.Module)]
    return {**children, **{n: _bare(getattr(module, n), {}, generator) for n in norms}}


def _bare(module: nn.Module, children: dict[str, nn.Module], generator: torch.Generator) -> nn.Module:
    """An object of the module's class and attributes, without hooks, in eval mode, with random weights on the CPU."""
    blank = vars(nn.Module())
    twin = object.__new__(type(module))
    left_out = {*blank, "forward", "_old_forward", "_hf_hook", "_compiled_call_impl"}
    twin.__dict__.update(blank, **{n: value for n, value in vars(module).items() if n not in left_out}, training=False)

    def like(t: Tensor | None) -> Tensor | None:
        if t is None or not t.is_floating_point():
            return t
        return torch.rand(t.shape, generator=generator, dtype=torch.float32) + 1

    twin._parameters = {
        n: None if p is None else nn.Parameter(like(p), requires_grad=False) for n, p in module._parameters.items()
    }
    twin._buffers = {n: like(t) for n, t in module._buffers.items()}
    twin._modules = {
        n: children[n] if n in children else None if child is None else _bare(child, {}, generator)
        for n, child in module._modules.items()
    }
    return twin


def _eager(config: Any) -> Any:
    """A copy of the config that asks for eager attention; its sub-configs are not touched."""
    if config is None:
        return None
    new = object.__new__(type(config))
    internal = hasattr(config, "_attn_implementation_internal")  # the public setter would reach into sub-configs
    new.__dict__.update(vars(config))
    new.__dict__["_attn_implementation_internal" if internal else "_attn_implementation"] = "eager"
    return new


def _far_positions(module: nn.Module) -> Tensor:
    """(1, LENGTH) positions from 0 to far beyond the model's limit."""
    limit = getattr(getattr(module, "config", None), "max_position_embeddings", None) or 0
    return torch.linspace(0, max(4 * limit, FAR), LENGTH).round().long()[None]


def _embeddings(rotary: ModelPositions, ids: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    like = torch.zeros(1, LENGTH, 1, dtype=torch.float32)
    return half_split(like, ids, head_dim, 10_000.0) if rotary.rotary is None else rotary(like, ids)


def _run(module: nn.Module, x: Tensor, embeddings: Any, ids: Tensor) -> Tensor:
    """Output (B, S, hidden_size) of the class's forward under an explicit causal mask, with what it takes by name."""
    mask = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min, dtype=torch.float32).triu(1)
    named = {
        "position_embeddings": embeddings,
        "attention_mask": mask.expand(BATCH, 1, -1, -1),
        "position_ids": ids.expand(BATCH, -1),
    }
    takes = inspect.signature(type(module).forward).parameters
    named["cache" if "cache" in takes else "past_key_values"] = None
    if all(p.kind != p.VAR_KEYWORD for p in takes.values()):
        named = {n: value for n, value in named.items() if n in takes}
    out = type(module).forward(module, x, **named)
    return out[0] if isinstance(out, tuple) else out


def _input(module: nn.Module, generator: torch.Generator) -> Tensor:
    return torch.randn(BATCH, LENGTH, module.q_proj.in_features, generator=generator, dtype=torch.float32)


def _rotates_only_if_told(module: nn.Module, generator: torch.Generator) -> bool:
    """Whether a call without position_embeddings is one without rotation; most modules unpack them unasked."""
    try:
        _run(module, _input(module, generator), None, torch.arange(LENGTH)[None])
    except TypeError:  # None cannot be unpacked
        return False
    return True


def _compare(ours: nn.Module, theirs: nn.Module, embeddings: Any, ids: Tensor, generator: torch.Generator) -> None:
    name, x = type(theirs).__name__, _input(theirs, generator)
    outs = []
    for module in (theirs, ours):
        try:
            outs.append(_run(module, x, embeddings, ids))
        except Exception as error:
            raise ArgumentError(
                "module",
                f"{type(error).__name__} from {type(module).__name__}: {error}",
                f"run as a LLaMA/Qwen-style self-attention, to compare {name} with SARAttention on random input",
            ) from error
    want, got = outs
    if got.shape != want.shape:
        raise ArgumentError(
            "module", f"{tuple(want.shape)} from {name}", f"give {tuple(got.shape)} for {tuple(x.shape)}"
        )
    difference = ((got - want).abs().max() / want.abs().max()).item()
    if not difference <= TOLERANCE:
        raise ArgumentError(
            "module",
            f"{name}, which differs on random input by {difference:.1e} of the largest output",
            "compute what SARAttention does with the same projections, norms, scale and soft-cap",
        )
