"""What users see of SAR on a model: ``apply_sar``, ``remove_sar`` and the handle between them."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from sar_fast.backends.protocol import Request
from sar_fast.backends.select import choose_backend
from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.config import SARConfig
from sar_fast.hf import install
from sar_fast.hf.cache_state import Switch
from sar_fast.hf.features import handle_of
from sar_fast.hf.structure import Layout, inner_attention, tensor_parallel_shards, unwrap
from sar_fast.method.distributed import Shards
from sar_fast.method.roles import TokenRoles
from sar_fast.method.state import SARStats
from sar_fast.method.weighting.split import module_of


class SARHandle:
    """SAR on one model: removes it, describes it, and holds what the last call recorded. Also a context manager.

    Attributes:
        config: the options in force.
        stats: layer index -> :class:`~sar_fast.SARStats` of the last call, with ``SARConfig(record=True)``.
        rows: layer index -> (B, H, Sk) fp32 attention of each sample's last text query over its visual keys, with
            ``SARConfig(record_rows="last_text")``.
        roles, prior: token roles of the last prompt, and its (B, S) fp32 prior.
        layout: where things are in the model.
        shards: the ranks that hold a layer's heads or queries between them, or None.
        switch: what caches ask whether their state still goes on.
    """

    def __init__(self, model: nn.Module, config: SARConfig, shards: Shards | None = None) -> None:
        self.layout = Layout(model)
        self.config = config
        self.shards = tensor_parallel_shards(self.model) if shards is None else shards
        if self.shards is not None:
            self.shards.check_heads(self.model.config.get_text_config().num_attention_heads)
        self.check_options(config)
        self.switch = Switch(on=False)
        self._installed = False
        self._attention_before: str | None = None
        self.stats: dict[int, SARStats] = {}
        self.rows: dict[int, Tensor] = {}
        self.roles: TokenRoles | None = None
        self.prior: Tensor | None = None

    @property
    def model(self) -> nn.Module:
        """The transformers model inside its wrappers."""
        return self.layout.model

    @property
    def sar_layers(self) -> list[int]:
        """Indices of the re-weighted attention layers, counted among layers that attend."""
        total = self.layout.total_layers
        return list(range(total - self.config.activation_layer_k, total))

    def check_options(self, config: SARConfig) -> None:
        """Whether this handle can take other options: K must fit, and the prior's source is fixed once SAR is on."""
        if config.activation_layer_k > self.layout.total_layers:
            raise ArgumentError(
                "activation_layer_k",
                config.activation_layer_k,
                f"be at most the number of attention layers, {self.layout.total_layers}",
            )
        if config.prior_source != self.config.prior_source:
            raise ArgumentError(
                "prior_source", repr(config.prior_source), f"stay {self.config.prior_source!r} while SAR is applied"
            )

    def reconfigure(self, config: SARConfig) -> None:
        """Other options for the calls to come; a cache that holds pictures cannot be continued under them.

        A rule that is a module takes the place of the one before it as a part of the model.
        """
        self.check_options(config)
        if self._installed:
            install.swap_rules(self.layout, module_of(self.config.weighting), module_of(config.weighting))
        self.config = config
        self.switch.on = config.measures
        install.mark_layers(self.layout, self.sar_layers)

    def install(self) -> None:
        """Put SAR on the model; ``apply_sar`` calls it."""
        self._attention_before = install.put_on(self)
        self._installed, self.switch.on = True, self.config.measures

    def remove(self) -> None:
        """Restore the model exactly; a second call does nothing.

        Its class too, once no other model of that class has SAR; what others patched or set meanwhile stays.
        """
        if handle_of(self.layout.base_model) is not self:
            return
        self._installed = self.switch.on = False
        install.take_off(self, self._attention_before)

    def __enter__(self) -> SARHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def describe(self) -> dict[str, Any]:
        """What this model gets, as plain values; head counts and the head dim of queries are the last layer's."""
        layout = self.layout
        last = inner_attention(layout.attention_modules[-1])  # configs may hold them per layer
        heads = self.model.config.get_text_config().num_attention_heads
        parameter = next(self.model.parameters())
        head_dim = getattr(last, "qk_head_dim", None) or last.head_dim  # latent attention names it so
        request = Request(parameter.device, parameter.dtype, head_dim=head_dim)
        return {
            "model_type": self.model.config.model_type,
            "family": layout.family.name,
            "attention_layers": layout.total_layers,
            "sar_layers": self.sar_layers,
            "num_heads": heads,
            "num_kv_heads": heads // last.num_key_value_groups,
            "head_dim": head_dim,
            "vision_blocks": len(layout.vision_blocks),
            "prior_block": layout.prior_block,
            "prior_source": self.config.prior_source,
            "backend": choose_backend(self.config.backend, request).name,
            "image_token_ids": layout.placeholder_ids,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, of a model with SAR on, needs its class's feature methods as the original does."""
        self.__dict__.update(state)
        if self._installed:
            install.watch_class(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> SARHandle | None:
        """A copy of the model gets a handle of its own; a copy of a part of it gets none."""
        if memo and id(self.model) not in memo:
            return None
        memo[id(self)] = other = object.__new__(type(self))
        state = {k: v if k == "shards" else copy.deepcopy(v, memo) for k, v in self.__dict__.items()}
        other.__setstate__({**state, "switch": Switch(self.switch.on)})
        return other


def apply_sar(model: nn.Module, config: SARConfig | None = None, *, shards: Shards | None = None) -> SARHandle:
    """Put SAR on a Hugging Face multimodal model, in place.

    Args:
        model: a transformers model of a supported family, PEFT-wrapped or not.
        config: default :class:`~sar_fast.SARConfig`. A ``weighting`` that is a module becomes the submodule
            ``sar_weighting`` of the base model, on the device of its attention layers: give optimizers the model's
            parameters after this call. PEFT freezes what it finds: call it first.
        shards: the ranks that hold a layer's heads between them (:class:`~.method.distributed.Shards`), where another
            library split the model; transformers' own tensor parallelism is found by itself.

    Returns:
        A handle: ``handle.remove()`` restores the model exactly; ``with apply_sar(model):`` does it at the end.

    Raises:
        UnsupportedModelError: the model's family is not known, or lacks something; the message says what.
        ValueError: K exceeds the number of attention layers, SAR is on this model already, or its ``sar_weighting`` is
            somebody else's.
    """
    config = SARConfig() if config is None else config
    if not isinstance(config, SARConfig):
        raise ArgumentTypeError("config", type(config).__name__, "be a SARConfig")
    if handle_of(unwrap(model).base_model) is not None:
        raise ArgumentError(
            "model",
            "one that SAR is applied to already",
            "be without SAR: call remove_sar(model) or handle.remove() first",
        )
    handle = SARHandle(model, config, shards)
    handle.install()
    return handle


def remove_sar(model: nn.Module) -> None:
    """Take SAR off a model that ``apply_sar`` put it on."""
    handle = handle_of(unwrap(model).base_model)
    if handle is None:
        raise ArgumentError("model", "one without SAR", "be one that SAR is applied to")
    handle.remove()


def patch_model_for_sar(
    model: nn.Module,
    use_sar: bool = True,
    sar_activation_layer_k: int = 10,
    sar_beta: float | None = None,
    **options: Any,
) -> SARHandle | None:
    """The research code's name for :func:`apply_sar`; ``use_sar=False`` is the model without SAR, which is taken off
    where it is applied, and returns None.

    ``sar_beta`` is 0.5 by default; ``options`` are further fields of :class:`~sar_fast.SARConfig`, a ``weighting`` in
    place of ``sar_beta`` among them.
    """
    if not isinstance(use_sar, bool):
        raise ArgumentTypeError("use_sar", f"{type(use_sar).__name__} {use_sar!r}", "be a bool")
    if not use_sar:
        handle = handle_of(unwrap(model).base_model)
        if handle is not None:
            handle.remove()
        return None
    return apply_sar(model, SARConfig(activation_layer_k=sar_activation_layer_k, beta=sar_beta, **options))
