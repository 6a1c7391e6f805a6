"""Masks by grounding: a phrase becomes a box by Grounding DINO, the box a mask by SAM or SAM 2; kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError, arguments_named
from sar_fast.lab.focus.samples import NOTHING_GROUNDED, GroundingSample, MaskSource, check_mask, picture_hash
from sar_fast.lab.io.models import is_missing_folder
from sar_fast.lab.io.original_checkpoints import grounding_dino, is_original, sam
from sar_fast.lab.io.pictures import PictureError, open_mask, png_text
from sar_fast.lab.io.skips import SampleSkipped
from sar_fast.lab.io.stamps import file_stamp, model_stamp, sampled_stamp

CUT = "max_text_len"  # of a mask's picture in the cache


class GroundedMasks(MaskSource):
    """Masks of phrases in pictures; the models are loaded when a mask is not in the cache.

    Args:
        detector: Grounding DINO: an original ``.pth``, or a folder or hub id of transformers' class.
        segmenter: SAM: an original ``.pth``; or a folder or hub id of transformers' SAM or SAM 2.
        detector_config, text_encoder: for a ``.pth`` detector: its config file; BERT's folder or hub id.
        segmenter_type: for a ``.pth`` segmenter: vit_b, vit_l or vit_h.
        box_threshold, text_threshold: least score of a box, and of a word to be named; of the boxes the best is taken.
        cache: folder of masks by picture and phrase; None keeps none.
        device: where the models run.

    ``ArgumentError`` for a name that is no place of such a model, here or when the models are loaded.
    """

    def __init__(
        self,
        detector: str,
        segmenter: str,
        *,
        detector_config: str | None = None,
        text_encoder: str | None = None,
        segmenter_type: str | None = None,
        box_threshold: float = 0.35,
        text_threshold: float = 0.25,
        cache: str | Path | None = None,
        device: str = "cpu",
    ) -> None:
        for name, value in (("box_threshold", box_threshold), ("text_threshold", text_threshold)):
            if not 0 <= value < 1:
                raise ArgumentError(name, value, "be in [0, 1), as scores are")
        if is_original(detector) and detector_config is None:
            raise ArgumentError("detector_config", None, f"be the config file of {detector}, an original checkpoint")
        for name, value in (("detector", detector), ("segmenter", segmenter), ("text_encoder", text_encoder)):
            if value is not None and not is_original(value) and is_missing_folder(value):
                raise ArgumentError(name, repr(value), "be a folder on this machine, or a hub id")
        originals = {n: v for n, v in (("detector", detector), ("segmenter", segmenter)) if is_original(v)}
        for name, value in {**originals, "detector_config": detector_config}.items():
            if value is not None and not Path(value).is_file():
                raise ArgumentError(name, value, "be a file that exists")
        self.detector, self.segmenter = detector, segmenter
        self.detector_config, self.text_encoder, self.segmenter_type = detector_config, text_encoder, segmenter_type
        self.box_threshold, self.text_threshold = box_threshold, text_threshold
        self.cache, self.device = None if cache is None else Path(cache), device
        self._cut: dict[str, int] = {}  # captions longer than the detector reads: how many tokens it does read
        self._description: dict[str, Any] | None = None
        self._models: tuple[nn.Module, Any, nn.Module, Any] | None = None

    def describe(self) -> dict[str, Any]:
        """The checkpoints by content, read once, and the thresholds."""
        if self._description is None:
            self._description = {
                "source": "grounding",
                "detector": _stamp(self.detector),
                "detector_config": None if self.detector_config is None else file_stamp(Path(self.detector_config)),
                "segmenter": _stamp(self.segmenter),
                "box_threshold": self.box_threshold,
                "text_threshold": self.text_threshold,
            }
        return self._description

    def mask(self, sample: GroundingSample) -> np.ndarray:
        picture = sample.image
        path, words = self._path(picture, sample.object_prompt), caption(sample.object_prompt)
        if path is not None and path.is_file():
            found, cut = _unpack(path)
            if cut is not None:
                self._cut[words] = cut
        else:
            found = self.ground(picture, sample.object_prompt)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_suffix(f".{os.getpid()}.partial")
                partial.write_bytes(_pack(found, self._cut.get(words)))
                os.replace(partial, path)
        if found is None:
            cut = f", {note}" if (note := self.note(sample)) else ""
            raise SampleSkipped(NOTHING_GROUNDED, f"{sample.object_prompt!r} at {self.box_threshold}{cut}")
        return check_mask(found, picture.size)

    def note(self, sample: GroundingSample) -> str | None:
        limit = self._cut.get(caption(sample.object_prompt))
        return None if limit is None else f"phrase cut to the {limit} tokens that the detector reads"

    @torch.no_grad()
    def ground(self, picture: Image.Image, phrase: str) -> np.ndarray | None:
        """(height, width) bool of the phrase's best box, None if no box reaches the threshold."""
        box = self.best_box(picture, phrase)
        return None if box is None else self.segment(picture, box)

    @torch.no_grad()
    def best_box(self, picture: Image.Image, phrase: str) -> list[float] | None:
        """(x1, y1, x2, y2) in pixels of the box with the highest score, None if none reaches the threshold."""
        detector, processor, _, _ = self.models()
        inputs = processor(images=picture, text=caption(phrase), return_tensors="pt").to(self.device)
        limit = getattr(detector.config, "max_text_len", None)
        if limit is not None and cut_caption(inputs, limit):
            self._cut[caption(phrase)] = limit
        outputs = detector(**inputs)
        (found,) = processor.post_process_grounded_object_detection(
            outputs,
            inputs["input_ids"],
            threshold=self.box_threshold,
            text_threshold=self.text_threshold,
            target_sizes=[picture.size[::-1]],
        )
        if not len(found["scores"]):
            return None
        return found["boxes"][found["scores"].argmax()].tolist()

    @torch.no_grad()
    def segment(self, picture: Image.Image, box: list[float]) -> np.ndarray:
        """(height, width) bool of the object in a box (x1, y1, x2, y2) in pixels."""
        _, _, segmenter, processor = self.models()
        inputs = processor(images=picture, input_boxes=[[box]], return_tensors="pt").to(self.device)
        outputs = segmenter(**inputs, multimask_output=False)
        sizes = [inputs["original_sizes"].cpu()]
        if "reshaped_input_sizes" in inputs:  # SAM pads; SAM 2 stretches
            sizes.append(inputs["reshaped_input_sizes"].cpu())
        (mask,) = processor.post_process_masks(outputs.pred_masks.float().cpu(), *sizes)  # (boxes, 1, H, W)
        return np.asarray(mask[0, 0]).astype(bool)

    def models(self) -> tuple[nn.Module, Any, nn.Module, Any]:
        """(detector, its processor, segmenter, its processor), loaded once."""
        if self._models is None:
            with arguments_named({"config": "detector_config", "model_type": "segmenter_type"}):
                detector, segmenter = self._load_detector(), self._load_segmenter()
            self._models = (detector[0].to(self.device), detector[1], segmenter[0].to(self.device), segmenter[1])
        return self._models

    def _load_detector(self) -> tuple[nn.Module, Any]:
        if is_original(self.detector):
            return grounding_dino.load_detector(Path(self.detector), Path(self.detector_config), self.text_encoder)
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        with _reading("detector", self.detector, "a Grounding DINO"):
            model = AutoModelForZeroShotObjectDetection.from_pretrained(self.detector)
            return model.eval(), AutoProcessor.from_pretrained(self.detector)

    def _load_segmenter(self) -> tuple[nn.Module, Any]:
        if is_original(self.segmenter):
            return sam.load_segmenter(Path(self.segmenter), self.segmenter_type)
        from transformers import AutoConfig, AutoProcessor, Sam2Model, SamModel

        with _reading("segmenter", self.segmenter, "a SAM or SAM 2"):
            kind = AutoConfig.from_pretrained(self.segmenter).model_type
            if kind not in ("sam", "sam2", "sam2_video"):
                raise ValueError(f"model_type is {kind!r}, needed sam or sam2")
            model = (SamModel if kind == "sam" else Sam2Model).from_pretrained(self.segmenter)
            return model.eval(), AutoProcessor.from_pretrained(self.segmenter)

    def _path(self, picture: Image.Image, phrase: str) -> Path | None:
        if self.cache is None:
            return None
        key = json.dumps([self.describe(), caption(phrase)], sort_keys=True)
        return self.cache / f"{picture_hash(picture)}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.png"


def caption(phrase: str) -> str:
    """A phrase as Grounding DINO was trained on them: lower case, a full stop at its end."""
    return phrase.lower().strip().rstrip(".").rstrip() + "."


def cut_caption(inputs: MutableMapping[str, Tensor], limit: int) -> bool:
    """Whether a caption has more tokens than the detector reads; its inputs are then made fit.

    As in the original, what words see of each other comes of the whole caption, of which the first ``limit`` tokens are
    kept. transformers' detector does so with all of its inputs but the attention mask.
    """
    too_long = inputs["input_ids"].shape[1] > limit
    if too_long:
        inputs["attention_mask"] = inputs["attention_mask"][:, :limit]
    return too_long


@contextlib.contextmanager
def _reading(argument: str, name: str, what: str) -> Iterator[None]:
    """What goes wrong with a model's files, as an error of the argument that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ArgumentError(argument, f"{name!r}: {reason}", f"be {what} that loads") from error


def _stamp(name: str) -> dict[str, Any]:
    """What tells a checkpoint from another of the same name."""
    path = Path(name)
    if path.is_file():
        return {"name": path.name, "content": sampled_stamp(path)}
    if path.is_dir():
        return {"name": path.name, "content": model_stamp(path)}
    return {"name": name}


def _pack(mask: np.ndarray | None, cut: int | None) -> bytes:
    """A one-bit PNG, or no picture for "nothing grounded"; with the length that the caption was cut to, if it was."""
    length = "" if cut is None else str(cut)
    if mask is None:
        return length.encode()
    buffer, facts = io.BytesIO(), PngInfo()
    if length:
        facts.add_text(CUT, length)
    Image.fromarray(mask).save(buffer, format="PNG", pnginfo=facts)
    return buffer.getvalue()


def _unpack(path: Path) -> tuple[np.ndarray | None, int | None]:
    content = path.read_bytes()
    if not content or content.isdigit():
        return None, int(content) if content else None
    try:
        length = png_text(content).get(CUT)
        return open_mask(content), None if length is None else int(length)
    except PictureError as error:
        raise ValueError(f"{path} of the mask cache {error}; delete it") from error
