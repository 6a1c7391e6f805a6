"""The original ``.pth`` checkpoints of Grounding DINO and SAM as transformers' models, converted in memory.

Sources of the names: GroundingDINO's ``groundingdino/models`` and segment-anything's ``modeling``, against the names
that transformers' classes give their parameters.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Rules = Iterable[tuple[str, str | Callable[[re.Match], str]]]

SWINS = {  # Grounding DINO's config names its backbone: embedding width, depths, heads, window
    "swin_T_224_1k": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "swin_B_224_22k": (128, (2, 2, 18, 2), (4, 8, 16, 32), 7),
    "swin_B_384_22k": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "swin_L_224_22k": (192, (2, 2, 18, 2), (6, 12, 24, 48), 7),
    "swin_L_384_22k": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
}
SAM_WIDTHS = {"vit_b": 768, "vit_l": 1024, "vit_h": 1280}

_BACKBONE = "model.backbone.conv_encoder.model."
_SWIN = _BACKBONE + "swin."
_DINO_RULES = (
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
_DINO_UNUSED = re.compile(r"relative_position_index$|attn_mask$|position_ids$|\.pooler\.|^label_enc\.")

_SAM_RULES = (
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
_SAM_UNUSED = re.compile(r"^pixel_(mean|std)$")


def load_detector(checkpoint: Path, config: Path, text_encoder: str | None = None) -> tuple[nn.Module, Any]:
    """(GroundingDinoForObjectDetection in eval mode, its processor) of an original checkpoint and its config file.

    Args:
        text_encoder: folder or hub id of BERT's config and tokenizer; by default the config's ``text_encoder_type``.

    ``ValueError`` if the file is no such checkpoint, or the config describes another model.
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
        raise ValueError(f"gd_text_encoder {text_encoder!r} (BERT) cannot be loaded: {reason}") from error
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
    state = {k: v for k, v in read_state(checkpoint).items() if not _DINO_UNUSED.search(k)}
    state = split_projections(renamed(state, _DINO_RULES))
    fill(model, state, checkpoint, absent=re.compile(r"\.swin\.layernorm\."))
    processor = GroundingDinoProcessor(GroundingDinoImageProcessor(), tokenizer)
    return model.eval(), processor


def load_segmenter(checkpoint: Path, model_type: str | None = None) -> tuple[nn.Module, Any]:
    """(SamModel in eval mode, its processor) of an original checkpoint; sizes are read off its tensors.

    ``ValueError`` if the file is no such checkpoint, or of another ``model_type`` (vit_b, vit_l, vit_h).
    """
    from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor, SamVisionConfig

    state = {k: v for k, v in read_state(checkpoint).items() if not _SAM_UNUSED.search(k)}
    if "image_encoder.pos_embed" not in state:
        raise ValueError(f"{checkpoint} is no SAM checkpoint: it has no image_encoder.pos_embed")
    _, grid, _, width = state["image_encoder.pos_embed"].shape
    found = {w: name for name, w in SAM_WIDTHS.items()}.get(width)
    if model_type is not None and found is not None and model_type != found:
        raise ValueError(f"sam_model_type is {model_type!r}, but {checkpoint} is a {found}")
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
    state = renamed(state, _SAM_RULES)
    shared = "shared_embedding.positional_embedding"
    state["shared_image_embedding.positional_embedding"] = state[f"prompt_encoder.{shared}"]
    fill(model, state, checkpoint)
    side = grid * patch
    images = SamImageProcessor(size={"longest_edge": side}, pad_size={"height": side, "width": side})
    return model.eval(), SamProcessor(images)


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
        raise ValueError(f"gd_config_path {path} is not a Python file of assignments: {error}") from error
    found: dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            try:
                found[statement.targets[0].id] = ast.literal_eval(statement.value)
            except ValueError:
                continue  # not a plain value; an error below if it was needed
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(f"gd_config_path {path} sets no {', '.join(missing)}; needed a Grounding DINO config")
    return found


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pth``, bare or under ``model``, without ``module.`` in front."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # unpickling fails in as many ways as there are files
        raise ValueError(f"{path} is not a checkpoint: {' '.join(str(error).split())[:200]}") from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no tensors by name, needed a state dict or one under 'model'")
    return {k.removeprefix("module."): v for k, v in content.items()}


def renamed(state: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """``state`` with every rule applied to every name, in order."""
    found = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = value
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


def sorted_blocks(state: Mapping[str, Tensor], suffix: str) -> list[tuple[str, Tensor]]:
    """``image_encoder.blocks.<n>.<suffix>`` in the order of n."""
    pattern = re.compile(rf"image_encoder\.blocks\.(\d+)\.{re.escape(suffix)}")
    found = {int(m[1]): (k, v) for k, v in state.items() if (m := pattern.fullmatch(k))}
    return [found[i] for i in sorted(found)]


def fill(model: nn.Module, state: Mapping[str, Tensor], path: Path, absent: re.Pattern | None = None) -> None:
    """Loads ``state`` into ``model``; ``ValueError`` unless every tensor has its place and every place its tensor."""
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path} has tensors of other shapes: {' '.join(str(error).split())[:300]}") from error
    missing = [k for k in result.missing_keys if absent is None or not absent.search(k)]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{path} is another model: {len(missing)} tensors missing (first {missing[:1]}), "
            f"{len(result.unexpected_keys)} left over (first {list(result.unexpected_keys)[:1]})"
        )
