"""Converted Grounding DINO and SAM against the original code, run on checkouts of it.

    git clone https://github.com/IDEA-Research/GroundingDINO && git clone https://github.com/facebookresearch/segment-anything
    python tests/acceptance/grounding_originals.py --groundingdino GroundingDINO --segment-anything segment-anything

Random models are built from the original modules (Grounding DINO with its own Swin-T and few, narrow layers), saved as
their checkpoints are, converted by ``sar_fast.lab.focus.checkpoints`` and run on the same input. What the
originals import but do not need here (torchvision, timm, OpenCV ...) is stood in for, and their BERT wrapper, which
transformers 5 breaks, calls BERT itself; so nothing needs to be compiled or installed.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import sys
import tempfile
import types
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizerFast

from sar_fast.lab.focus.grounding import cut_caption
from sar_fast.lab.io.original_checkpoints.grounding_dino import load_detector
from sar_fast.lab.io.original_checkpoints.sam import load_segmenter

RELATIVE = 1e-4  # of the largest value: fp32, other orders of sums through tens of layers
SMALLER = {  # of Grounding DINO's config, so that random models run in seconds
    "enc_layers = 6": "enc_layers = 2",
    "dec_layers = 6": "dec_layers = 3",
    "dim_feedforward = 2048": "dim_feedforward = 128",
    "num_queries = 900": "num_queries = 40",
    "use_checkpoint = True": "use_checkpoint = False",
    "use_transformer_ckpt = True": "use_transformer_ckpt = False",
}


def stand_in(name: str, **attributes: Any) -> None:
    """An importable module with these attributes and nothing else."""
    module = types.ModuleType(name)
    module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
    vars(module).update(attributes)
    sys.modules[name] = module
    if "." in name:
        parent, child = name.rsplit(".", 1)
        setattr(sys.modules[parent], child, module)


class DropPath(nn.Identity):
    """timm's, in evaluation."""

    def __init__(self, *args: object) -> None:
        super().__init__()


def stand_in_for_imports() -> None:
    stand_in("torchvision", __version__="0.27.0", _is_tracing=lambda: False)
    stand_in("torchvision.ops", nms=None, box_convert=None)
    stand_in("torchvision.ops.boxes", nms=None, box_area=None, batched_nms=None)
    stand_in("torchvision.transforms")
    stand_in("torchvision.transforms.functional", resize=None, to_pil_image=None)
    stand_in("torchvision.models")
    stand_in("torchvision.models._utils", IntermediateLayerGetter=object)
    pair = lambda value: value if isinstance(value, tuple) else (value, value)
    stand_in("timm")
    stand_in("timm.models")
    stand_in("timm.models.layers", DropPath=DropPath, to_2tuple=pair, trunc_normal_=nn.init.trunc_normal_)
    for name in ("cv2", "supervision", "pycocotools", "yapf", "yapf.yapflib"):
        stand_in(name)
    stand_in("addict", Dict=dict)
    stand_in("yapf.yapflib.yapf_api", FormatCode=None)
    stand_in("pycocotools.coco", COCO=None)
    stand_in("pycocotools.mask")


def shaken(model: nn.Module) -> nn.Module:
    """Every parameter moved: no two equal ones that a swap would not show in."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model.eval()


def compare(name: str, theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    gap, largest = float((theirs - ours).abs().max()), float(theirs.abs().max())
    good = gap <= RELATIVE * largest
    print(f"{'ok  ' if good else 'FAIL'} {name:24} differs by {gap:.1e}, largest {largest:.1e}")
    return good


@torch.no_grad()
def check_sam(folder: Path) -> bool:
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    encoder = ImageEncoderViT(
        depth=3, embed_dim=32, img_size=128, num_heads=2, patch_size=16, qkv_bias=True, use_rel_pos=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), global_attn_indexes=[1], window_size=3, out_chans=256,
    )  # fmt: skip
    prompts = PromptEncoder(embed_dim=256, image_embedding_size=(8, 8), input_image_size=(128, 128), mask_in_chans=16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    decoder = MaskDecoder(num_multimask_outputs=3, transformer=transformer, transformer_dim=256)
    sam = shaken(Sam(encoder, prompts, decoder))
    torch.save(sam.state_dict(), folder / "sam.pth")
    model, _ = load_segmenter(folder / "sam.pth")
    pixels, box = torch.randn(1, 3, 128, 128), torch.tensor([[[10.0, 20.0, 60.0, 90.0]]])
    sparse, dense = sam.prompt_encoder(points=None, boxes=box[0], masks=None)
    masks, scores = sam.mask_decoder(
        image_embeddings=sam.image_encoder(pixels),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    ours = model(pixel_values=pixels, input_boxes=box, multimask_output=False)
    return all(
        [compare("SAM mask logits", masks, ours.pred_masks[:, 0]), compare("SAM scores", scores, ours.iou_scores[:, 0])]
    )


def bert_that_runs(wrapper: type) -> None:
    """The original BERT wrapper with the same parameters, calling transformers' BERT as it is today."""

    def init(self, bert_model: BertModel) -> None:
        nn.Module.__init__(self)
        self.config, self.pooler = bert_model.config, bert_model.pooler
        self.embeddings, self.encoder = bert_model.embeddings, bert_model.encoder
        object.__setattr__(self, "whole", bert_model)  # not a second copy of the parameters

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None, **more):
        mask = attention_mask[:, None] if attention_mask.dim() == 3 else attention_mask  # phrases see themselves alone
        return self.whole(input_ids, mask, token_type_ids, position_ids)

    wrapper.__init__, wrapper.forward = init, forward


@torch.no_grad()
def check_dino(checkout: Path, folder: Path) -> bool:
    from groundingdino.models.GroundingDINO.bertwarper import BertModelWarper

    bert_that_runs(BertModelWarper)
    from groundingdino.models.GroundingDINO.groundingdino import build_groundingdino

    words = [f"[unused{i}]" for i in range(1100)]
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    for index, word in special.items():
        words[index] = word
    words[1040:1042] = ["red", "circle"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=1100, **sizes)).save_pretrained(folder)

    text = (checkout / "groundingdino" / "config" / "GroundingDINO_SwinT_OGC.py").read_text()
    for old, new in {**SMALLER, '"bert-base-uncased"': repr(str(folder))}.items():
        if old not in text:
            raise ValueError(f"GroundingDINO_SwinT_OGC.py has no {old!r}: another version of the repository?")
        text = text.replace(old, new)
    (folder / "config.py").write_text(text)
    settings: dict[str, Any] = {}
    exec(text, settings)
    plain = {k: v for k, v in settings.items() if not k.startswith("__")}
    theirs = shaken(build_groundingdino(types.SimpleNamespace(**plain, device="cpu", aux_loss=True)))
    torch.save({"model": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, folder / "dino.pth")

    ours, processor = load_detector(folder / "dino.pth", folder / "config.py")
    pixels = torch.randn(1, 3, 160, 224)
    good = True
    for caption in ("red circle.", "red circle " * 150 + "."):  # the second is longer than the detector reads
        words = processor.tokenizer([caption], return_tensors="pt")
        length = words["input_ids"].shape[1]  # logits beyond it are minus infinity
        cut_caption(words, ours.config.max_text_len)
        a = theirs(pixels, captions=[caption])
        b = ours(pixel_values=pixels, pixel_mask=torch.ones(1, 160, 224, dtype=torch.long), **words)
        logits = (a["pred_logits"][..., :length], b.logits[..., :length])
        good &= compare(f"boxes, {length} tokens", a["pred_boxes"], b.pred_boxes)
        good &= compare(f"logits, {length} tokens", *logits)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groundingdino", type=Path, required=True, help="checkout of IDEA-Research/GroundingDINO")
    parser.add_argument("--segment-anything", type=Path, required=True, help="checkout of its repository")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import transformers.models.grounding_dino.modeling_grounding_dino  # noqa: F401  before anything is stood in for

    sys.path[:0] = [str(args.groundingdino.resolve()), str(args.segment_anything.resolve())]
    stand_in_for_imports()
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        good = all([check_sam(Path(folder)), check_dino(args.groundingdino, Path(folder))])
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
