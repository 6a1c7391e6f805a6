"""Grounding DINO's original checkpoint as transformers' model. Source of the names: GroundingDINO's
``groundingdino/models``, against the names that transformers' classes give their parameters."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.io.original_checkpoints.reading import fill, read_state, renamed

SWINS = {  # Grounding DINO's config names its backbone: embedding width, depths, heads, window
    "swin_T_224_1k": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "swin_B_224_22k": (128, (2, 2, 18, 2), (4, 8, 16, 32), 7),
    "swin_B_384_22k": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "swin_L_224_22k": (192, (2, 2, 18, 2), (6, 12, 24, 48), 7),
    "swin_L_384_22k": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
}
_BACKBONE = "model.backbone.conv_encoder.model."
_SWIN = _BACKBONE + "swin."
_RULES = (
    (r"^backbone\.0\.norm(\d)\.", lambda m: f"{_BACKBONE}hidden_states_norms.stage{int(m[1]) + 1}."),
    (r"^backbone\.0\.patch_embed\.proj\.", _SWIN + "embeddings.patch_embeddings.projection."),
    (r"^backbone\.0\.patch_embed\.norm\.", _SWIN + "embeddings.norm."),
    (r"^backbone\.0\.layers\.(\d+)\.", _SWIN + r"encoder.layers.\1."),
    (r"(blocks\.\d+\.)norm1\.", r"\1layernorm_before."),
    (r"(blocks\.\d+\.)norm2\.", r"\1layernorm_after."),
    (r"(blocks\.\d+\.)attn\.proj\.", r"\1attention.o_proj."),
    (r"(blocks\.\d+\.)attn\.relative_position", r"\1attention.relative_position_bias.relative_position"),
    (r"(blocks\.\d+\.)attn\.qkv\.", r"\1attention.qkv."),
    (r"^bert\.", "model.text_backbone."),
    (r"^feat_map\.", "model.text_projection."),
    (r"^input_proj\.", "model.input_proj_vision."),
    (r"^transformer\.tgt_embed\.", "model.query_position_embeddings."),
    (r"^transformer\.enc_out_bbox_embed\.", "model.encoder_output_bbox_embed."),
    (r"^transformer\.decoder\.ref_point_head\.", "model.decoder.reference_points_head."),
    (r"^transformer\.decoder\.norm\.", "model.decoder.layer_norm."),
    # encoder: a deformable layer over the picture, one over the words, one that fuses them
    (r"^transformer\.encoder\.layers\.(\d+)\.", r"model.encoder.layers.\1.deformable_layer."),
    (r"^transformer\.encoder\.text_layers\.(\d+)\.", r"model.encoder.layers.\1.text_enhancer_layer."),
    (r"^transformer\.encoder\.fusion_layers\.(\d+)\.", r"model.encoder.layers.\1.fusion_layer."),
    (r"deformable_layer\.norm1\.", "deformable_layer.self_attn_layer_norm."),
    (r"deformable_layer\.norm2\.", "deformable_layer.final_layer_norm."),
    (r"text_enhancer_layer\.norm1\.", "text_enhancer_layer.layer_norm_before."),
    (r"text_enhancer_layer\.norm2\.", "text_enhancer_layer.layer_norm_after."),
    (r"fusion_layer\.gamma_v$", "fusion_layer.vision_param"),
    (r"fusion_layer\.gamma_l$", "fusion_layer.text_param"),
    (r"fusion_layer\.layer_norm_v\.", "fusion_layer.layer_norm_vision."),
    (r"fusion_layer\.layer_norm_l\.", "fusion_layer.layer_norm_text."),
    (r"fusion_layer\.attn\.(values_|out_)?v_proj\.", r"fusion_layer.attn.\1vision_proj."),
    (r"fusion_layer\.attn\.(values_|out_)?l_proj\.", r"fusion_layer.attn.\1text_proj."),
    # decoder layers: queries among themselves (norm2), to the words, to the picture (norm1)
    (r"^transformer\.decoder\.layers\.(\d+)\.norm1\.", r"model.decoder.layers.\1.encoder_attn_layer_norm."),
    (r"^transformer\.decoder\.layers\.(\d+)\.norm2\.", r"model.decoder.layers.\1.self_attn_layer_norm."),
    (r"^transformer\.decoder\.layers\.(\d+)\.norm3\.", r"model.decoder.layers.\1.final_layer_norm."),
    (r"^transformer\.decoder\.layers\.(\d+)\.cross_attn\.", r"model.decoder.layers.\1.encoder_attn."),
    (r"^transformer\.decoder\.layers\.(\d+)\.ca_text\.", r"model.decoder.layers.\1.encoder_attn_text."),
    (r"^transformer\.decoder\.layers\.(\d+)\.catext_norm\.", r"model.decoder.layers.\1.encoder_attn_text_layer_norm."),
    (r"\.linear([12])\.", r".fc\1."),
    (r"^transformer\.", "model."),
)  # fmt: skip
# Buffers, BERT's pooler, and a table of training labels: transformers' model computes or lacks them
_UNUSED = re.compile(r"relative_position_index$|attn_mask$|position_ids$|\.pooler\.|^label_enc\.")


def load_detector(checkpoint: Path, config: Path, text_encoder: str | None = None) -> tuple[nn.Module, Any]:
    """(GroundingDinoForObjectDetection in eval mode, its processor) of an original checkpoint and its config file.

    Args:
        text_encoder: folder or hub id of BERT's config and tokenizer; by default the config's ``text_encoder_type``.

    Raises:
        ArgumentError: a ``config`` that is none, a ``text_encoder`` that cannot be loaded.
        ValueError: the file is no such checkpoint, or the config describes another model.
    """
    from transformers import (
        AutoConfig,
        AutoTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    settings = read_config(config)
    name = settings["backbone"]
    if name not in SWINS:
        raise ValueError(f"{config}: backbone {name!r} is none of {', '.join(SWINS)}")
    width, depths, heads, window = SWINS[name]
    text_encoder = text_encoder or settings["text_encoder_type"]
    try:
        text_config, tokenizer = AutoConfig.from_pretrained(text_encoder), AutoTokenizer.from_pretrained(text_encoder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ArgumentError("text_encoder", f"{text_encoder!r}: {reason}", "be BERT's folder or hub id") from error
    model = GroundingDinoForObjectDetection(
        GroundingDinoConfig(
            backbone_config=SwinConfig(
                embed_dim=width,
                depths=list(depths),
                num_heads=list(heads),
                window_size=window,
                image_size=int(name.split("_")[2]),
                out_features=[f"stage{i + 1}" for i in settings["return_interm_indices"]],
            ),
            text_config=text_config,
            d_model=settings["hidden_dim"],
            encoder_layers=settings["enc_layers"],
            decoder_layers=settings["dec_layers"],
            encoder_ffn_dim=settings["dim_feedforward"],
            decoder_ffn_dim=settings["dim_feedforward"],
            encoder_attention_heads=settings["nheads"],
            decoder_attention_heads=settings["nheads"],
            encoder_n_points=settings["enc_n_points"],
            decoder_n_points=settings["dec_n_points"],
            num_queries=settings["num_queries"],
            num_feature_levels=settings["num_feature_levels"],
            max_text_len=settings["max_text_len"],
            activation_function=settings["transformer_activation"],
            positional_embedding_temperature=settings["pe_temperatureH"],
            embedding_init_target=settings["embed_init_tgt"],
            decoder_bbox_embed_share=settings["dec_pred_bbox_embed_share"],
            two_stage_bbox_embed_share=settings["two_stage_bbox_embed_share"],
        )
    )
    state = {k: v for k, v in read_state(checkpoint).items() if not _UNUSED.search(k)}
    state = split_projections(renamed(state, _RULES))
    fill(model, state, checkpoint, absent=re.compile(r"\.swin\.layernorm\."))
    processor = GroundingDinoProcessor(GroundingDinoImageProcessor(), tokenizer)
    return model.eval(), processor


def read_config(path: Path) -> dict[str, Any]:
    """The plain assignments of Grounding DINO's config file, which is Python; nothing in it is run."""
    needed = (
        "backbone", "return_interm_indices", "enc_layers", "dec_layers", "dim_feedforward", "hidden_dim", "nheads",
        "num_queries", "num_feature_levels", "enc_n_points", "dec_n_points", "max_text_len", "text_encoder_type",
        "transformer_activation", "pe_temperatureH", "embed_init_tgt", "dec_pred_bbox_embed_share",
        "two_stage_bbox_embed_share",
    )  # fmt: skip
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ArgumentError("config", f"{path}: {error}", "be a Python file of assignments") from error
    found: dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            try:
                found[statement.targets[0].id] = ast.literal_eval(statement.value)
            except ValueError:
                continue  # not a plain value; an error below if it was needed
    missing = [name for name in needed if name not in found]
    if missing:
        raise ArgumentError("config", f"{path}, which sets no {', '.join(missing)}", "be a Grounding DINO config")
    return found


def split_projections(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value out of the stacked projections of Swin's and PyTorch's attention."""
    found = {}
    for name, value in state.items():
        swin = re.fullmatch(r"(.*attention)\.qkv\.(weight|bias)", name)
        stacked = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", name)
        if swin:
            found |= {f"{swin[1]}.{p}_proj.{swin[2]}": part for p, part in zip("qkv", value.chunk(3))}
        elif stacked:
            parts = zip(("query", "key", "value"), value.chunk(3))
            found |= {f"{stacked[1]}.{p}.{stacked[2]}": part for p, part in parts}
        else:
            found[name] = value
    return found
