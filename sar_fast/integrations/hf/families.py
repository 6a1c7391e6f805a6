"""What SAR must know of a model family: where its vision blocks are and which patches feed which visual token.

One declarative entry per family, found by ``config.model_type``; users add their own with :func:`register_family`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class UnsupportedModelError(ValueError):
    """SAR cannot be applied to this model; the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        name: how the family is called in tables and messages.
        model_types: values of ``config.model_type`` that it covers.
        vision_blocks: dotted paths, from the base model, of the vision encoder's list of blocks; the first that exists.
        token_norms: (base model, patch norms as the block's output has them, arguments of ``get_image_features``) ->
            (n,) norms in the order of the placeholders. Tokens made of several patches get the mean of their norms.
        placeholder_ids: names of the config's fields that hold placeholder token ids, by modality.
    """

    name: str
    model_types: tuple[str, ...]
    vision_blocks: tuple[str, ...]
    token_norms: Callable[[nn.Module, Tensor, Mapping[str, Any]], Tensor]
    placeholder_ids: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"image": "image_token_id"})

    def find_vision_blocks(self, base_model: nn.Module) -> nn.ModuleList:
        """The vision encoder's blocks, or an :class:`UnsupportedModelError` that lists the paths tried."""
        for path in self.vision_blocks:
            try:
                blocks = base_model.get_submodule(path)
            except AttributeError:
                continue
            if len(blocks):
                return blocks
        raise UnsupportedModelError(
            f"model: {type(base_model).__name__} has no vision blocks at {' or '.join(self.vision_blocks)}, where the "
            f"{self.name} family keeps them; register_family can describe another layout"
        )


def _llava_norms(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """(images, patches) -> one token per patch; the class token goes where the model drops it."""
    strategy = arguments.get("vision_feature_select_strategy") or base_model.config.vision_feature_select_strategy
    if strategy == "default":
        norms = norms[:, 1:]
    return norms.reshape(-1)


def _qwen2_5_vl_norms(base_model: nn.Module, norms: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """(patches,) in window order -> mean over each merged group, back in reading order."""
    visual = base_model.visual
    grid_thw = arguments.get("image_grid_thw")
    if grid_thw is None:
        grid_thw = arguments["video_grid_thw"]
    merged = norms.reshape(-1, visual.spatial_merge_size**2).mean(-1)
    if hasattr(visual, "get_window_index"):  # transformers before the shared vision utilities
        window_index = torch.as_tensor(visual.get_window_index(grid_thw)[0])
    else:
        from transformers.vision_utils import get_vision_window_index

        window_index = get_vision_window_index(
            grid_thw,
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )[0]
    return merged[torch.argsort(window_index.to(merged.device))]


_REGISTRY: dict[str, Family] = {}


def register_family(family: Family, *, replace: bool = False) -> None:
    """Add a family; ``replace=True`` overrides entries with the same ``model_types``."""
    taken = [t for t in family.model_types if t in _REGISTRY]
    if taken and not replace:
        raise ValueError(f"model_types {taken} are registered already; pass replace=True to override")
    for model_type in family.model_types:
        _REGISTRY[model_type] = family


def supported_model_types() -> tuple[str, ...]:
    """All registered ``config.model_type`` values."""
    return tuple(sorted(_REGISTRY))


def find_family(config: Any) -> Family:
    """The family of a model config, or an :class:`UnsupportedModelError` that names the supported types."""
    model_type = getattr(config, "model_type", None)
    if model_type not in _REGISTRY:
        raise UnsupportedModelError(
            f"model: SAR does not know model_type {model_type!r}; it knows {', '.join(supported_model_types())}. "
            "sar_fast.integrations.hf.register_family adds a family"
        )
    return _REGISTRY[model_type]


register_family(
    Family(
        name="LLaVA-1.5",
        model_types=("llava",),
        vision_blocks=("vision_tower.encoder.layers", "vision_tower.vision_model.encoder.layers"),
        token_norms=_llava_norms,
    )
)
register_family(
    Family(
        name="Qwen2.5-VL",
        model_types=("qwen2_5_vl",),
        vision_blocks=("visual.blocks",),
        token_norms=_qwen2_5_vl_norms,
        placeholder_ids={"image": "image_token_id", "video": "video_token_id"},
    )
)
