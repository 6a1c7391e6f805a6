"""SAM's original checkpoint as transformers' model. Source of the names: segment-anything's ``modeling``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.io.original_checkpoints import SAM_WIDTHS
from sar_fast.lab.io.original_checkpoints.reading import fill, read_state, renamed

MARK = "image_encoder.pos_embed"  # a tensor that no other checkpoint has

_RULES = (
    (r"^image_encoder\.", "vision_encoder."),
    (r"^(vision_encoder\.)blocks\.", r"\1layers."),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"\bnorm(\d|_final_attn)\.", r"layer_norm\1."),
    (r"neck\.0\.", "neck.conv1."),
    (r"neck\.1\.", "neck.layer_norm1."),
    (r"neck\.2\.", "neck.conv2."),
    (r"neck\.3\.", "neck.layer_norm2."),
    (r"pe_layer\.positional_encoding_gaussian_matrix$", "shared_embedding.positional_embedding"),
    (r"point_embeddings\.", "point_embed."),
    (r"mask_downscaling\.0\.", "mask_embed.conv1."),
    (r"mask_downscaling\.1\.", "mask_embed.layer_norm1."),
    (r"mask_downscaling\.3\.", "mask_embed.conv2."),
    (r"mask_downscaling\.4\.", "mask_embed.layer_norm2."),
    (r"mask_downscaling\.6\.", "mask_embed.conv3."),
    (r"output_upscaling\.0\.", "upscale_conv1."),
    (r"output_upscaling\.1\.", "upscale_layer_norm."),
    (r"output_upscaling\.3\.", "upscale_conv2."),
    (r"(iou_prediction_head|output_hypernetworks_mlps\.\d+)\.layers\.0\.", r"\1.proj_in."),
    (r"(iou_prediction_head|output_hypernetworks_mlps\.\d+)\.layers\.2\.", r"\1.proj_out."),
    (r"(iou_prediction_head|output_hypernetworks_mlps\.\d+)\.layers\.1\.", r"\1.layers.0."),
)
_UNUSED = re.compile(r"^pixel_(mean|std)$")


def load_segmenter(checkpoint: Path, model_type: str | None = None) -> tuple[nn.Module, Any]:
    """(SamModel in eval mode, its processor) of an original checkpoint; sizes are read off its tensors.

    Raises:
        ArgumentError: a ``model_type`` (vit_b, vit_l, vit_h) that it is not of.
        ValueError: the file is no such checkpoint.
    """
    from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor, SamVisionConfig

    state = {k: v for k, v in read_state(checkpoint).items() if not _UNUSED.search(k)}
    if MARK not in state:
        raise ValueError(f"{checkpoint} is no SAM checkpoint: it has no {MARK}")
    _, grid, _, width = state[MARK].shape
    found = {w: name for name, w in SAM_WIDTHS.items()}.get(width)
    if model_type is not None and found is not None and model_type != found:
        raise ArgumentError("model_type", repr(model_type), f"be {found!r}, which {checkpoint} is")
    patch = state["image_encoder.patch_embed.proj.weight"].shape[-1]
    reach = [v.shape[0] for k, v in sorted_blocks(state, "attn.rel_pos_h")]  # 2 * side - 1 of what a block attends over
    head_dim = state["image_encoder.blocks.0.attn.rel_pos_h"].shape[1]
    model = SamModel(
        SamConfig(
            vision_config=SamVisionConfig(
                hidden_size=width,
                mlp_dim=state["image_encoder.blocks.0.mlp.lin1.weight"].shape[0],
                num_hidden_layers=len(reach),
                num_attention_heads=width // head_dim,
                image_size=grid * patch,
                patch_size=patch,
                window_size=(min(reach) + 1) // 2,
                global_attn_indexes=[i for i, n in enumerate(reach) if n == 2 * grid - 1],
            ),
            prompt_encoder_config={"image_size": grid * patch, "patch_size": patch},
        )
    )
    state = renamed(state, _RULES)
    shared = "shared_embedding.positional_embedding"
    state["shared_image_embedding.positional_embedding"] = state[f"prompt_encoder.{shared}"]
    fill(model, state, checkpoint)
    side = grid * patch
    images = SamImageProcessor(size={"longest_edge": side}, pad_size={"height": side, "width": side})
    return model.eval(), SamProcessor(images)


def sorted_blocks(state: Mapping[str, Tensor], suffix: str) -> list[tuple[str, Tensor]]:
    """``image_encoder.blocks.<n>.<suffix>`` in the order of n."""
    pattern = re.compile(rf"image_encoder\.blocks\.(\d+)\.{re.escape(suffix)}")
    found = {int(m[1]): (k, v) for k, v in state.items() if (m := pattern.fullmatch(k))}
    return [found[i] for i in sorted(found)]
