"""Which parameters, and which of their rows, project hidden states to queries and to keys in every decoder layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError
from sar_fast.hf.structure import find_attention_modules, unwrap

SEPARATE = {"q": ("q_proj", "q_b_proj", "query"), "k": ("k_proj", "kv_b_proj", "key")}
FUSED = {  # name of a fused projection -> how its output rows are arranged
    "qkv_proj": "blocks",  # all queries, all keys, all values (Phi-3, MiniCPM)
    "c_attn": "blocks",  # Qwen-1
    "W_pack": "blocks",  # Baichuan
    "query_key_value": "blocks",  # ChatGLM
    "wqkv": "groups",  # per key/value head: its queries, its key, its value (InternLM-2)
}


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of a parameter that belongs to a projection: rows of its gradient, or all of it (``rows`` None)."""

    parameter: nn.Parameter
    rows: Tensor | None = None

    def of(self, gradient: Tensor) -> Tensor:
        """This share of the parameter's gradient."""
        return gradient if self.rows is None else gradient[self.rows.to(gradient.device)]


def query_and_key_shares(model: nn.Module) -> list[dict[str, list[Share]]]:
    """Per attention layer, in depth order: ``{"q": shares, "k": shares}`` of the trainable weights.

    Full fine-tuning: the weight of the projection. LoRA: the entries of its A and B together, as the frozen weight has
    no gradient; on a fused projection, B's rows alone, for A serves queries, keys and values alike. A projection with
    nothing to train has no share. Biases do not count.

    ``ValueError`` if a layer has neither separate projections nor a fused one whose layout is known.
    """
    return [{kind: _shares(module, kind) for kind in ("q", "k")} for module in find_attention_modules(unwrap(model))]


def _shares(attention: nn.Module, kind: str) -> list[Share]:
    for name in SEPARATE[kind]:
        if isinstance(getattr(attention, name, None), nn.Module):
            return [Share(p) for p in _weights(getattr(attention, name)) if p.requires_grad]
    for name, arrangement in FUSED.items():
        fused = getattr(attention, name, None)
        if isinstance(fused, nn.Module):
            rows = _fused_rows(attention, fused, arrangement)[kind]
            return [Share(p, rows) for n, p in _named_weights(fused) if p.requires_grad and "lora_A" not in n]
    raise ArgumentError(
        "model",
        type(attention).__name__,
        f"have a {kind} projection that is known ({', '.join(SEPARATE[kind])}; fused: {', '.join(FUSED)})",
    )


def _named_weights(projection: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in projection.named_parameters() if not n.endswith("bias")]


def _weights(projection: nn.Module) -> list[nn.Parameter]:
    return [p for _, p in _named_weights(projection)]


def _fused_rows(attention: nn.Module, fused: nn.Module, arrangement: str) -> dict[str, Tensor]:
    """Output rows of the queries and of the keys."""
    config = attention.config
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    total = (heads + 2 * groups) * size
    base = getattr(fused, "base_layer", fused)
    if base.out_features != total:
        raise ArgumentError(
            "model",
            base.out_features,
            f"have fused projections of {total} rows, for {heads} query and {groups} key/value heads of size {size}",
        )
    arrange: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
        "blocks": lambda r: (r[: heads * size], r[heads * size : (heads + groups) * size]),
        "groups": lambda r: (
            r.view(groups, -1, size)[:, :-2].flatten(),
            r.view(groups, -1, size)[:, -2].flatten(),
        ),
    }
    q, k = arrange[arrangement](torch.arange(total))
    return {"q": q, "k": k}
