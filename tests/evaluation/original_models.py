"""Original Grounding DINO and SAM checkpoints of tiny random models, and the models that they were made of."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertTokenizerFast,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    SamConfig,
    SamModel,
    SamVisionConfig,
    SwinConfig,
)

from sar_fast.lab.io.original_checkpoints import grounding_dino
from sar_fast.lab.miniature.checkpoint import load_miniature

SETTINGS = {
    "backbone": "swin_tiny_64_test",
    "return_interm_indices": [1, 2, 3],
    "enc_layers": 2,
    "dec_layers": 2,
    "dim_feedforward": 48,
    "hidden_dim": 64,
    "nheads": 4,
    "num_queries": 20,
    "num_feature_levels": 4,
    "enc_n_points": 2,
    "dec_n_points": 2,
    "max_text_len": 32,
    "text_encoder_type": "bert-base-uncased",
    "transformer_activation": "relu",
    "pe_temperatureH": 20,
    "embed_init_tgt": True,
    "dec_pred_bbox_embed_share": True,
    "two_stage_bbox_embed_share": False,
}
SWIN = (8, (1, 1, 2, 1), (1, 2, 2, 4), 4)


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter its own random values: a swap of two equal ones (biases at 0, norms at 1) must show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def miniature():
    return load_miniature()


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """BERT's config and tokenizer; the special tokens have the ids that Grounding DINO's code has written in."""
    folder = tmp_path_factory.mktemp("bert")
    words = [f"[unused{i}]" for i in range(1100)]
    for index, word in {
        0: "[PAD]",
        100: "[UNK]",
        101: "[CLS]",
        102: "[SEP]",
        103: "[MASK]",
        1012: ".",
        1029: "?",
    }.items():
        words[index] = word
    words[1040:1044] = ["red", "circle", "blue", "square"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    BertConfig(
        vocab_size=1100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detector(bert) -> GroundingDinoForObjectDetection:
    torch.manual_seed(0)
    width, depths, heads, window = SWIN
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            embed_dim=width, depths=list(depths), num_heads=list(heads), window_size=window, image_size=64,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig.from_pretrained(bert), d_model=64, encoder_layers=2, decoder_layers=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4, num_queries=20,
        encoder_n_points=2, decoder_n_points=2, max_text_len=32,
    )  # fmt: skip
    return randomise(GroundingDinoForObjectDetection(config), 1)


# Names of the original repositories, written down from their modules: (transformers', theirs).
DINO = [
    ("model.backbone.conv_encoder.model.swin.embeddings.patch_embeddings.projection", "backbone.0.patch_embed.proj"),
    ("model.backbone.conv_encoder.model.swin.embeddings.norm", "backbone.0.patch_embed.norm"),
    ("model.backbone.conv_encoder.model.swin.encoder.layers.", "backbone.0.layers."),
    ("model.backbone.conv_encoder.model.hidden_states_norms.stage2", "backbone.0.norm1"),
    ("model.backbone.conv_encoder.model.hidden_states_norms.stage3", "backbone.0.norm2"),
    ("model.backbone.conv_encoder.model.hidden_states_norms.stage4", "backbone.0.norm3"),
    (".attention.o_proj", ".attn.proj"),
    (".attention.relative_position_bias.relative", ".attn.relative"),
    (".layernorm_before", ".norm1"),
    (".layernorm_after", ".norm2"),
    ("model.text_backbone.", "bert."),
    ("model.text_projection", "feat_map"),
    ("model.input_proj_vision", "input_proj"),
    ("model.query_position_embeddings", "transformer.tgt_embed"),
    ("model.encoder_output_bbox_embed", "transformer.enc_out_bbox_embed"),
    ("model.decoder.reference_points_head", "transformer.decoder.ref_point_head"),
    ("model.decoder.layer_norm", "transformer.decoder.norm"),
    ("deformable_layer.self_attn_layer_norm", "deformable_layer.norm1"),
    ("deformable_layer.final_layer_norm", "deformable_layer.norm2"),
    ("text_enhancer_layer.layer_norm_before", "text_enhancer_layer.norm1"),
    ("text_enhancer_layer.layer_norm_after", "text_enhancer_layer.norm2"),
    ("vision_param", "gamma_v"),
    ("text_param", "gamma_l"),
    ("layer_norm_vision", "layer_norm_v"),
    ("layer_norm_text", "layer_norm_l"),
    ("attn.vision_proj", "attn.v_proj"),
    ("attn.text_proj", "attn.l_proj"),
    ("values_vision_proj", "values_v_proj"),
    ("values_text_proj", "values_l_proj"),
    ("out_vision_proj", "out_v_proj"),
    ("out_text_proj", "out_l_proj"),
    ("encoder_attn_text_layer_norm", "catext_norm"),
    ("encoder_attn_layer_norm", "norm1"),
    (".self_attn_layer_norm", ".norm2"),
    (".final_layer_norm", ".norm3"),
    ("encoder_attn_text.", "ca_text."),
    ("encoder_attn.", "cross_attn."),
]


def original_dino(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors as GroundingDINO's own state dict names them, with what else such a checkpoint holds."""
    found: dict[str, torch.Tensor] = {}
    state = model.state_dict()
    for name, value in state.items():
        if ".swin.layernorm." in name or re.search(r"(\.key|\.value|attention\.[kv]_proj)\.(weight|bias)$", name):
            continue
        text_attention = ".text_backbone." in name and re.search(r"\.query\.(weight|bias)$", name)
        if re.search(r"\.query\.(weight|bias)$", name) and not text_attention:
            parts = [state[name.replace(".query.", f".{p}.")] for p in ("query", "key", "value")]
            value, name = torch.cat(parts), name.replace(".query.", ".in_proj_")
        elif ".attention.q_proj." in name:
            value = torch.cat([state[name.replace("q_proj", f"{p}_proj")] for p in "qkv"])
            name = name.replace("attention.q_proj", "attn.qkv")
        for theirs, original in DINO:
            name = name.replace(theirs, original)
        name = re.sub(r"^model\.encoder\.layers\.(\d+)\.deformable_layer\.", r"transformer.encoder.layers.\1.", name)
        name = re.sub(
            r"^model\.encoder\.layers\.(\d+)\.text_enhancer_layer\.", r"transformer.encoder.text_layers.\1.", name
        )
        name = re.sub(r"^model\.encoder\.layers\.(\d+)\.fusion_layer\.", r"transformer.encoder.fusion_layers.\1.", name)
        name = re.sub(r"^model\.", "transformer.", name)
        if name.startswith("transformer."):
            name = re.sub(r"\.fc([12])\.", r".linear\1.", name)
        found[name] = value.clone()
    for name, value in state.items():  # BERT's keys and values are not stacked
        if ".text_backbone." in name and re.search(r"\.(key|value)\.(weight|bias)$", name):
            found[name.replace("model.text_backbone.", "bert.")] = value.clone()
    found["bert.pooler.dense.weight"] = torch.zeros(32, 32)
    found["bert.embeddings.position_ids"] = torch.arange(512)[None]
    found["label_enc.weight"] = torch.zeros(5, 64)
    found["backbone.0.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16)
    return found


def write_config(folder: Path, **changes) -> Path:
    path = folder / "GroundingDINO_test.py"
    lines = [f"{k} = {v!r}" for k, v in (SETTINGS | changes).items()]
    path.write_text("batch_size = 1\nimport os\n" + "\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def original(detector, tmp_path_factory) -> tuple[Path, Path]:
    """(checkpoint, config) as GroundingDINO publishes them."""
    folder = tmp_path_factory.mktemp("dino")
    state = {f"module.{k}": v for k, v in original_dino(detector).items()}
    torch.save({"model": state, "epoch": 3}, folder / "groundingdino_test.pth")
    return folder / "groundingdino_test.pth", write_config(folder)


@pytest.fixture(autouse=True)
def tiny_swin(monkeypatch):
    monkeypatch.setitem(grounding_dino.SWINS, "swin_tiny_64_test", SWIN)


def picture(width: int = 120, height: int = 70) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 255, (height, width, 3), dtype=np.uint8))


SAM = [
    ("vision_encoder.layers.", "image_encoder.blocks."),
    ("vision_encoder.", "image_encoder."),
    ("patch_embed.projection", "patch_embed.proj"),
    ("neck.conv1", "neck.0"), ("neck.layer_norm1", "neck.1"), ("neck.conv2", "neck.2"), ("neck.layer_norm2", "neck.3"),
    ("shared_embedding.positional_embedding", "pe_layer.positional_encoding_gaussian_matrix"),
    ("point_embed.", "point_embeddings."),
    ("mask_embed.conv1", "mask_downscaling.0"), ("mask_embed.layer_norm1", "mask_downscaling.1"),
    ("mask_embed.conv2", "mask_downscaling.3"), ("mask_embed.layer_norm2", "mask_downscaling.4"),
    ("mask_embed.conv3", "mask_downscaling.6"),
    ("upscale_conv1", "output_upscaling.0"), ("upscale_layer_norm", "output_upscaling.1"),
    ("upscale_conv2", "output_upscaling.3"),
    ("layer_norm", "norm"),
]  # fmt: skip


def original_sam(model: SamModel) -> dict[str, torch.Tensor]:
    found = {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    for name, value in model.state_dict().items():
        if name.startswith("shared_image_embedding"):
            continue
        if "iou_prediction_head" in name or "hypernetworks" in name:
            name = name.replace("layers.0", "layers.1").replace("proj_in", "layers.0").replace("proj_out", "layers.2")
        for theirs, original in SAM:
            name = name.replace(theirs, original)
        found[name] = value.clone()
    return found


@pytest.fixture(scope="module")
def segmenter() -> SamModel:
    torch.manual_seed(0)
    vision = SamVisionConfig(
        hidden_size=32, mlp_dim=48, num_hidden_layers=3, num_attention_heads=2, image_size=128, patch_size=16,
        window_size=3, global_attn_indexes=[1],
    )  # fmt: skip
    config = SamConfig(vision_config=vision, prompt_encoder_config={"image_size": 128, "patch_size": 16})
    return randomise(SamModel(config), 2)
