"""``SARAttention``: LLaMA/Qwen-style self-attention with SAR inside, for code that swaps the attention class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sar_fast.cache_state import attach, state_of
from sar_fast.config import SARConfig
from sar_fast.decoding import attend_with_state
from sar_fast.functional import plain_attention
from sar_fast.types import AttentionOptions, SARStats
from sar_fast.validation import MAX_HEAD_DIM


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split convention: x (B, S, heads, D), cos and sin (B or 1, S, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat([-second, first], dim=-1) * sin[:, :, None]


class SARAttention(nn.Module):
    """Causal self-attention with grouped queries, rotary positions and re-weighted heads.

    ``state_dict`` keys are those of transformers' LLaMA and Qwen attention: ``{q,k,v,o}_proj.weight``, ``.bias`` where
    there is one, ``{q,k}_norm.weight`` with ``qk_norm``.

    Args:
        hidden_size: width of the hidden states.
        num_heads, num_kv_heads: query heads, and key/value heads (default: as many); a divisor of the former.
        head_dim: default ``hidden_size // num_heads``.
        qkv_bias, o_bias: biases of the projections.
        qk_norm: RMS-normalise q and k per head before the rotary embedding (Qwen3).
        norm_eps: its epsilon.
        rope_theta: base of the rotary frequencies, used when a call brings no ``position_embeddings``.
        layer_idx: this layer's place in a cache.
        config: SAR's options; ``activation_layer_k=0`` makes the module plain attention.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        rope_theta: float = 10_000.0,
        layer_idx: int = 0,
        config: SARConfig | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads; got {num_heads} and {num_kv_heads}")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(
                f"head_dim must be given when num_heads does not divide hidden_size; got {num_heads} and {hidden_size}"
            )
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        if not 1 <= self.head_dim <= MAX_HEAD_DIM:
            raise ValueError(f"head_dim must be between 1 and {MAX_HEAD_DIM}; got {self.head_dim}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.num_key_value_groups = num_heads // num_kv_heads
        self.scaling = self.head_dim**-0.5
        self.rope_theta = rope_theta
        self.layer_idx = layer_idx
        self.is_causal = True
        self.sar_config = SARConfig() if config is None else config
        self.last_stats: SARStats | None = None
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=o_bias)
        if qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=norm_eps)

    @classmethod
    def from_module(cls, module: nn.Module, config: SARConfig | None = None) -> SARAttention:
        """Build from a transformers attention module; projections and norms are the same objects, not copies.

        Raises:
            ValueError: the module is not a LLaMA/Qwen-style self-attention; says what is missing.
        """
        missing = [
            n for n in ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "layer_idx") if not hasattr(module, n)
        ]
        if missing:
            raise ValueError(
                f"module must be a LLaMA/Qwen-style self-attention; {type(module).__name__} lacks {', '.join(missing)}"
            )
        if getattr(module, "sliding_window", None) is not None:
            raise ValueError(f"module must attend to all positions; it has sliding_window={module.sliding_window}")
        head_dim, width = module.head_dim, module.q_proj.in_features
        with torch.device("meta"):
            new = cls(
                width,
                module.q_proj.out_features // head_dim,
                module.k_proj.out_features // head_dim,
                head_dim,
                layer_idx=module.layer_idx,
                config=config,
            )
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            if hasattr(module, name):
                setattr(new, name, getattr(module, name))
        new.scaling = getattr(module, "scaling", new.scaling)
        theta = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
        new.rope_theta = theta.get("rope_theta", new.rope_theta)
        return new.train(module.training)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        *,
        visual_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        prior: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attention of (B, S, hidden_size).

        Args:
            position_embeddings: (cos, sin), each (B or 1, S, head_dim); default from ``position_ids`` (B, S), which
                default to the positions after the cached ones.
            attention_mask: (B, past + S) non-zero = real token, or (B, 1, S, past + S) bool or additive.
            past_key_values: a transformers cache; it also carries this layer's decode state.
            visual_mask: (B, past + S) bool; text_mask: (B, S) bool; prior: (B, past + S). Needed for a prompt; at
                decode steps the cache remembers V and the prior, and every new query is text unless text_mask says so.

        Returns:
            (output (B, S, hidden_size), None), as transformers' attention modules.
        """
        B, S, _ = hidden_states.shape
        shape = (B, S, -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape) for p in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
        if position_embeddings is None:
            position_embeddings = self._rotary(position_ids, past_length, hidden_states)
        cos, sin = position_embeddings
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past_key_values is not None:
            k, v = past_key_values.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
            k, v = (x[:, :, : past_length + S].transpose(1, 2) for x in (k, v))  # a static cache has unfilled slots

        padding, dense = _split_mask(attention_mask, k.shape[1])
        options = AttentionOptions(softmax_scale=self.scaling, causal=dense is None)
        if self.sar_config.activation_layer_k == 0:
            out, _ = plain_attention(q, k, v, options=options, key_padding_mask=padding, attn_mask=dense)
        else:
            out = self._reweighted(q, k, v, visual_mask, text_mask, prior, padding, dense, options, past_key_values)
        return self.o_proj(out.reshape(B, S, -1)), None

    def _rotary(self, position_ids: Tensor | None, past_length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if position_ids is None:
            position_ids = torch.arange(past_length, past_length + like.shape[1], device=like.device)[None]
        exponent = torch.arange(0, self.head_dim, 2, device=like.device, dtype=torch.float32) / self.head_dim
        angle = position_ids[..., None].float() * self.rope_theta**-exponent  # [B or 1, S, D / 2]
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos().to(like.dtype), angle.sin().to(like.dtype)

    def _reweighted(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visual_mask: Tensor | None,
        text_mask: Tensor | None,
        prior: Tensor | None,
        padding: Tensor | None,
        dense: Tensor | None,
        options: AttentionOptions,
        cache: Any,
    ) -> Tensor:
        B, S, Sk = q.shape[0], q.shape[1], k.shape[1]
        remembered = state_of(cache)
        past = remembered.layers.get(self.layer_idx) if remembered is not None else None
        if visual_mask is None and past is None:
            raise ValueError(
                "visual_mask, text_mask and prior must be given for a prompt (an all-False visual_mask for text only); "
                "got visual_mask=None"
            )
        frozen = past is not None and visual_mask is None and self.sar_config.decode == "prompt"
        if visual_mask is None:
            missing = Sk - remembered.visual_mask.shape[1]
            visual_mask = nn.functional.pad(remembered.visual_mask, (0, missing))
            prior = nn.functional.pad(remembered.norms, (0, missing))
            if text_mask is None:
                text_mask = torch.ones(B, S, dtype=torch.bool, device=q.device)
        elif text_mask is None or prior is None:
            raise ValueError("text_mask and prior must be given together with visual_mask; got None")
        for name, mask, want in (("visual_mask", visual_mask, (B, Sk)), ("text_mask", text_mask, (B, S))):
            if mask.dtype != torch.bool or tuple(mask.shape) != want:
                raise ValueError(f"{name} must be bool of shape {want}; got {mask.dtype} {tuple(mask.shape)}")
        if tuple(prior.shape) != (B, Sk):
            raise ValueError(f"prior must have shape {(B, Sk)}; got {tuple(prior.shape)}")
        out, self.last_stats, state = attend_with_state(
            q,
            k,
            v,
            visual_mask,
            text_mask,
            prior,
            config=self.sar_config,
            options=options,
            past=past,
            frozen=frozen,
            key_padding_mask=padding,
            attn_mask=dense,
        )
        if cache is not None and not frozen:
            on_cache = attach(cache)
            on_cache.visual_mask, on_cache.norms = visual_mask, prior
            on_cache.store(self.layer_idx, state, Sk, keep_snapshots=self.sar_config.decode == "running")
        return out


def _split_mask(attention_mask: Tensor | None, num_keys: int) -> tuple[Tensor | None, Tensor | None]:
    """(key padding (B, keys) bool or None, dense (B or 1, 1, S, keys) bool or None)."""
    if attention_mask is None:
        return None, None
    if attention_mask.dim() == 2:
        if attention_mask.shape[1] != num_keys:
            raise ValueError(
                f"attention_mask must cover the cached and the new positions, {num_keys}; got "
                f"{tuple(attention_mask.shape)}"
            )
        return attention_mask != 0, None
    if attention_mask.dim() == 4:
        dense = attention_mask[..., :num_keys]
        return None, dense if dense.dtype == torch.bool else dense == 0
    raise ValueError(f"attention_mask must have 2 or 4 dimensions; got shape {tuple(attention_mask.shape)}")
