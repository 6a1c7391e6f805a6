"""``SARAttention``: LLaMA/Qwen-style self-attention with SAR inside, for code that swaps the attention class."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sar_fast.attention.functional import plain_attention
from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.config import SARConfig
from sar_fast.hf.cache_state import attach
from sar_fast.hf.decoding import attend_with_state
from sar_fast.hf.module import conversion, inputs, positions
from sar_fast.method.state import SARStats
from sar_fast.method.validation import MAX_HEAD_DIM
from sar_fast.method.values import Call, Roles, Scores


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
        rope_theta: base of the rotary frequencies, used when a call brings no ``position_embeddings``; None: such a
            call rotates nothing.
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2); 0 = off.
        layer_idx: this layer's place in a cache.
        config: SAR's options; ``activation_layer_k=0`` makes the module plain attention.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is needed.
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
        rope_theta: float | None = 10_000.0,
        softcap: float = 0.0,
        layer_idx: int = 0,
        config: SARConfig | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ArgumentError("num_heads", f"{num_heads} and {num_kv_heads}", "be a multiple of num_kv_heads")
        if head_dim is None and hidden_size % num_heads:
            raise ArgumentError(
                "head_dim", f"{num_heads} and {hidden_size}", "be given when num_heads does not divide hidden_size"
            )
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        if not 1 <= self.head_dim <= MAX_HEAD_DIM:
            raise ArgumentError("head_dim", self.head_dim, f"be between 1 and {MAX_HEAD_DIM}")
        if isinstance(softcap, bool) or not isinstance(softcap, (int, float)) or not 0 <= softcap < math.inf:
            raise ArgumentError("softcap", repr(softcap), "be a finite number >= 0 (0 = off)")
        if rope_theta is not None and not 0 < rope_theta < math.inf:
            raise ArgumentError("rope_theta", repr(rope_theta), "be a finite number > 0, or None")
        if config is not None and not isinstance(config, SARConfig):
            raise ArgumentTypeError("config", type(config).__name__, "be a SARConfig or None")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.num_key_value_groups = num_heads // num_kv_heads
        self.scaling = self.head_dim**-0.5
        self.rope_theta = rope_theta
        self.model_positions: positions.ModelPositions | None = None
        self.softcap = float(softcap)
        self.attention_dropout = 0.0
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

        Projections without and with biases, grouped queries, soft-capping, norms of q and k per head, and half-split
        rotary positions, also of some of the channels, can be taken over. Whether that is all the module does is found
        out by running both on random input, in fp32 on the CPU, whatever the weights are and wherever they lie.

        Hooks on the module itself are not taken over.

        Raises:
            ValueError: SARAttention with these weights would not equal the module: says what is missing, what the
                module has beside, or by how much the outputs differ.
        """
        if isinstance(module, SARAttention):
            raise ArgumentError("module", "a SARAttention already: set its sar_config", "be a transformers attention")
        conversion.check_structure(module)
        head_dim = module.head_dim
        with conversion.isolated(), torch.device("meta"):
            new = cls(
                module.q_proj.in_features,
                module.q_proj.out_features // head_dim,
                module.k_proj.out_features // head_dim,
                head_dim,
                softcap=getattr(module, "attn_logit_softcapping", None) or 0.0,
                layer_idx=module.layer_idx,
                config=config,
            )
        for name in conversion.SHARED:
            if getattr(module, name, None) is not None:
                setattr(new, name, getattr(module, name))
        new.is_causal = getattr(module, "is_causal", True)
        new.scaling = getattr(module, "scaling", new.scaling)
        new.attention_dropout = getattr(module, "attention_dropout", 0.0)
        new.rope_theta, new.model_positions = conversion.check_equal(new, module)
        new.training = module.training
        return new

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
        cache: Any = None,
        **keywords: Any,
    ) -> tuple[Tensor, None]:
        """Attention of (B, S, hidden_size); causal, but for modules taken from one with ``is_causal=False``.

        Args:
            position_embeddings: (cos, sin), each (B or 1, S, R), R even and at most head_dim: the first R channels of
                each head are rotated. Default: of ``position_ids`` (B, S), which default to the positions after the
                cached ones; with the rotary embedding of its model where the module was taken from one.
            attention_mask: (B, past + S) non-zero = real token, or (B or 1, 1, S, past + S) bool or additive with 0 =
                visible; on a static cache also over all its columns.
            past_key_values: a transformers cache; it also carries this layer's decode state. ``cache`` is its name
                in transformers 5.24 and newer.
            visual_mask: (B, past + S) bool; text_mask: (B, S) bool; prior: (B, past + S). All three are needed for a
                prompt, unless the config's weighting needs no statistics. At decode steps the cache remembers V and the
                prior, and every new query that no 2D attention_mask hides is text unless text_mask says so. For a
                second picture give all three again: V and the prior of all pictures so far, the earlier ones where they
                were, and the text after the new one; T starts afresh in the rows with new visual
                tokens, and weights frozen by ``decode="prompt"`` are computed anew. Without new
                visual tokens T goes on, and frozen weights stay.
            keywords: what decoder layers pass down: those without effect on attention (``use_cache``,
                ``cache_position``, ``output_hidden_states``, ``num_items_in_batch``, ...) and any that are None are
                ignored; all others are errors, by name where they would change the result (``cu_seq_lens_q``,
                ``output_attentions=True``, ``sliding_window``, ``is_causal=False``, ...).

        Returns:
            (output (B, S, hidden_size), None), as transformers' attention modules.

        Raises:
            ValueError: a mask or prior of another shape, dtype or device; a cache that SAR did not fill; dropout.
            TypeError: an unknown keyword, with the nearest known one.
        """
        inputs.check_keywords(keywords, causal=self.is_causal)
        inputs.check_not_packed(position_ids, attention_mask)
        past_key_values = inputs.one_cache(past_key_values, cache)
        if self.training and self.attention_dropout:
            raise ArgumentError("attention_dropout", self.attention_dropout, "be 0 in training: no dropout")
        B, S = inputs.check_hidden(hidden_states)
        span = inputs.cache_span(past_key_values, self.layer_idx, S)
        padding, dense = inputs.split_mask(attention_mask, B, S, span, hidden_states.device, causal=self.is_causal)
        roles, weighs = None, self.sar_config.activation_layer_k > 0
        if weighs and (self.sar_config.weighs_by_statistics or (visual_mask is not None and span.past == 0)):
            roles = inputs.roles_of_call(
                visual_mask,
                text_mask,
                prior,
                like=hidden_states,
                span=span,
                padding=padding,
                cache=past_key_values,
                layer=self.layer_idx,
                config=self.sar_config,
            )
        if position_embeddings is None:
            position_embeddings = self._rotary(position_ids, span.past, hidden_states)
        q, k, v = self._project(hidden_states, position_embeddings)
        if roles is not None and roles.needs_no_grad(self.sar_config, q, k, v):
            raise ArgumentError(
                "past_key_values",
                "inputs that require gradients",
                "come under torch.no_grad(): running statistics have no backward",
            )
        if past_key_values is not None:  # the first write: everything was checked before
            k, v = past_key_values.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
            k, v = (x[:, :, : span.keys].transpose(1, 2) for x in (k, v))  # a static cache has unfilled slots
            if k.shape[1] != span.keys:
                raise ArgumentError("past_key_values", k.shape[1], f"keep all positions, {span.keys}")
        scores = Scores(self.scaling, causal=self.is_causal and dense is None, softcap=self.softcap)
        call = Call(q, k, v, scores, key_padding_mask=padding, attn_mask=dense)
        if not weighs:
            out, _ = plain_attention(call)
        elif roles is None:  # weights that no statistic decides
            layer = {"layer": self.layer_idx, "past": None, "keep_stats": False}
            out, self.last_stats, _ = attend_with_state(call, config=self.sar_config, **layer)
        else:
            out = self._reweighted(call, roles, span, past_key_values)
        return self.o_proj(out.reshape(B, S, -1)), None

    def _project(self, hidden_states: Tensor, embeddings: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        """q (B, S, H, D), k and v (B, S, Hkv, D), normalised and rotated."""
        B, S, _ = hidden_states.shape
        q, k, v = (p(hidden_states).view(B, S, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        if (q.shape[2], k.shape[2], v.shape[2]) != heads:
            raise ArgumentError(
                "q_proj, k_proj and v_proj",
                f"{q.shape[2]}, {k.shape[2]} and {v.shape[2]}",
                f"give all heads, {heads}: SAR weighs them against each other",
            )
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if embeddings is not None:
            cos, sin = positions.check_embeddings(embeddings, B, S, self.head_dim)
            q, k = positions.rotate(q, cos, sin), positions.rotate(k, cos, sin)
        return q.to(v.dtype), k.to(v.dtype), v  # fp32 norms or cosines beside half-precision projections

    def _rotary(self, position_ids: Tensor | None, past: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """(cos, sin) of a call that brings none; None where the module has no positions of its own."""
        if self.model_positions is None and self.rope_theta is None:
            return None
        if position_ids is not None:
            inputs.check_position_ids(position_ids, like)
        else:
            position_ids = (past + torch.arange(like.shape[1], device=like.device))[None]
        if self.model_positions is not None:
            return self.model_positions(like, position_ids)
        return positions.half_split(like, position_ids, self.head_dim, self.rope_theta)

    def _reweighted(self, call: Call, roles: inputs.RolesOfCall, span: inputs.Span, cache: Any) -> Tensor:
        """SAR attention (B, S, H, D), with the cache's state read and written."""
        call.roles = Roles(roles.visual_mask, roles.text_mask, roles.prior)
        out, self.last_stats, state = attend_with_state(
            call,
            config=self.sar_config,
            past=roles.past,
            layer=self.layer_idx,
            frozen=roles.frozen,
            carried_rows=roles.carried_rows,
            check_prior=roles.given,
        )
        if cache is None or state is None:
            return out
        on_cache = attach(cache)
        if not span.traced:
            on_cache.length = span.keys
        if not roles.frozen:
            if roles.given:
                on_cache.set_visual(roles.visual_mask, roles.prior.detach())
            length = span.keys if span.capacity is None else None
            on_cache.store(self.layer_idx, state, length, self.sar_config.decode)
        return out
