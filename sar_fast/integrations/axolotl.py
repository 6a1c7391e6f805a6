"""SAR in Axolotl: ``plugins: [sar_fast.integrations.axolotl.SARPlugin]`` in its YAML (docs/integrations.md)."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, model_validator
from torch import nn

from sar_fast.base.errors import ArgumentError
from sar_fast.hf import apply_sar
from sar_fast.integrations.options import config_of
from sar_fast.method.options import Normalize, PriorSource, TextQueries

KEYS = {  # field of SARConfig -> key of the YAML
    **{name: f"sar_{name}" for name in ("activation_layer_k", "beta", "protect_first_head", "normalize", "weighting")},
    **{name: f"sar_{name}" for name in ("text_queries", "prior_source", "backend")},
    "sav_grad": "sav_grad",
}


class SARArgs(BaseModel):
    """The keys that the plugin adds to Axolotl's; those left out take the defaults of ``SARConfig``."""

    use_sar: bool = True
    sar_activation_layer_k: int | None = None
    sar_beta: float | None = None
    sar_protect_first_head: bool | None = None
    sar_normalize: Normalize | None = None
    sar_weighting: str | dict[str, Any] | None = None
    sar_text_queries: TextQueries | None = None
    sar_prior_source: PriorSource | None = None
    sar_backend: str | None = None
    sav_grad: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def check_sar(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Keys of SAR that do not exist, which Axolotl would leave out, and sequences that are split over ranks."""
        unknown = [key for key in given if key.startswith("sar_") and key not in KEYS.values()]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no option of SAR; known: use_sar, {', '.join(KEYS.values())}")
        ranks = given.get("context_parallel_size") or 1
        if ranks > 1 and given.get("use_sar", True):
            raise ArgumentError(
                "context_parallel_size",
                (
                    f"{ranks}: every rank would get a slice of the prompt, so statistics would be a slice's. "
                    "DDP, FSDP and DeepSpeed's ZeRO split no prompt"
                ),
                "be 1 with SAR",
            )
        return given


class SARPlugin(BasePlugin):
    """Puts SAR on the model once Axolotl has loaded it, adapters included."""

    def get_input_args(self) -> str:
        return f"{__name__}.SARArgs"

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        if cfg.use_sar:
            given = {field: cfg[key] for field, key in KEYS.items() if cfg[key] is not None}
            apply_sar(model, config_of(given, KEYS, model.config))
