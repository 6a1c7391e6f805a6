"""What linear heads can read off each decoder layer: the object's box, or its class (section 6.3, Figure 5)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError, check_choice
from sar_fast.config import SARConfig
from sar_fast.hf import apply_sar
from sar_fast.hf.structure import find_decoder_layers
from sar_fast.lab.focus.bootstrap import interval_of_mean
from sar_fast.lab.focus.prompts import check_words
from sar_fast.lab.focus.samples import GroundingSample, box_problem
from sar_fast.lab.io.answering import encode_texts
from sar_fast.lab.io.boxes import box_iou
from sar_fast.lab.io.chat_template import build_prompt
from sar_fast.lab.io.processors import ProcessorRefusal
from sar_fast.lab.io.prompts import PromptFormat
from sar_fast.lab.io.skips import SampleSkipped
from sar_fast.lab.probe.features import FeatureStore, layer_features
from sar_fast.lab.probe.heads import (
    HeadTraining,
    corners,
    loss_per_layer,
    mean_loss,
    predict,
    root_mean_square,
    scaled,
    train_heads,
)
from sar_fast.lab.probe.results import RIGHT_IOU, ProbeResults
from sar_fast.lab.run.progress import progress_bar

TASKS = ("grounding", "classification")
TRAIN_SHARE = 0.8  # of the pictures


@dataclasses.dataclass
class LayerwiseProbe:
    """Trains a linear head on the output of every decoder layer at the prompt's last token, and scores it.

    Args:
        model: a transformers image-text-to-text model, without SAR on it. processor: its processor.
        task: ``"grounding"``: the box as (xc, yc, w, h) in 0..1 by L1 loss, right at IoU >= 0.5; or
            ``"classification"``: the label by cross-entropy.
        training: of the heads. seeds: of initial weights and order; the split is the same for all.
        split_seed: of the split, 80 % of the pictures for training.
        batch_size: prompts per forward pass. config: SAR while reading features, or None.
        depends: plain values that the features depend on beyond samples, SAR and the model's name: its weights, say.
    """

    model: nn.Module
    processor: Any
    task: str = "grounding"
    training: HeadTraining = dataclasses.field(default_factory=HeadTraining)
    seeds: Sequence[int] = (0, 1, 2)
    split_seed: int = 0
    batch_size: int = 8
    config: SARConfig | None = None
    depends: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("task", self.task, TASKS)
        if not self.seeds:
            raise ArgumentError("seeds", "none", "be at least one")

    def usable(self, samples: Sequence[GroundingSample]) -> tuple[list[GroundingSample], dict[str, list[str]]]:
        """The samples that have a target, and the others' ids by reason. ``ValueError`` if a column is missing."""
        kept, skipped = [], {}
        readable: set[str] = set()  # pictures that decode: a header alone does not tell a truncated one
        for sample in samples:
            try:
                check_words(self.processor, [sample.query])
                reason = _box_problem(sample) if self.task == "grounding" else _label_problem(sample)
                if reason is None and sample.picture_key not in readable:
                    sample.image  # noqa: B018  raises if the picture cannot be decoded
                    readable.add(sample.picture_key)
            except SampleSkipped as problem:
                reason = problem.reason
            if reason is None:
                kept.append(sample)
            else:
                skipped.setdefault(reason, []).append(sample.id)
        return kept, skipped

    def check(self, kept: Sequence[GroundingSample], skipped: Mapping[str, Sequence[str]]) -> None:
        """``ValueError`` if the samples are too few to train on some and validate on others, or have one label."""
        if not kept:
            reasons = ", ".join(f"{reason} ({len(ids)})" for reason, ids in skipped.items()) or "the dataset is empty"
            raise ValueError(f"no sample can be probed: {reasons}")
        split_by_picture([s.picture_key for s in kept], self.split_seed)
        self._targets(kept)

    def open_store(
        self, samples: Sequence[GroundingSample], folder: str | Path, *, overwrite: bool = False
    ) -> FeatureStore:
        """Where features of these samples are kept; ``ValueError`` if the folder holds those of others.

        ``overwrite`` deletes those of others instead; the same ones stay.
        """
        layers = len(find_decoder_layers(self.model))
        shape = (len(samples), layers, self.model.config.get_text_config().hidden_size)
        asked = hashlib.sha256(repr([(s.id, s.query, s.picture_key) for s in samples]).encode()).hexdigest()
        settings = {
            "samples": asked,
            "sar": None if self.config is None else self.config.to_dict(),
            "model": getattr(self.model.config, "_name_or_path", ""),
            **self.depends,
        }
        return FeatureStore(folder, shape, self.model.dtype, settings, overwrite)

    def extract(
        self,
        samples: Sequence[GroundingSample],
        folder: str | Path,
        rank: int = 0,
        world: int = 1,
        *,
        progress: bool = False,
    ) -> tuple[FeatureStore, int]:
        """(store, forward passes made): features of all samples, which ``folder`` keeps. Batches that are there cost no
        pass; the others go to the ranks in turn, and a rank makes its own."""
        store, passes = self.open_store(samples, folder), 0
        starts = range(0, len(samples), self.batch_size)[rank::world]
        bar = progress_bar(len(starts), "features", unit="batch", here=progress)
        with bar, contextlib.nullcontext() if self.config is None else apply_sar(self.model, self.config):
            for start in starts:
                bar.update()
                rows = range(start, min(start + self.batch_size, len(samples)))
                if not store.missing(rows):
                    continue
                chunk = [samples[i] for i in rows]
                store.put(rows, layer_features(self.model, self._encode(chunk)))
                passes += 1
        return store, passes

    def _encode(self, samples: Sequence[GroundingSample]) -> Any:
        """Inputs of a batch on the model's device; ``ValueError`` names a sample that the processor refuses."""
        pictures, prompts = [_picture(s) for s in samples], [build_prompt(self.processor, s.query) for s in samples]
        try:
            inputs = encode_texts(self.processor, pictures, prompts, padding_side="left")
        except ProcessorRefusal as error:
            form = PromptFormat.of(self.model, self.processor)
            for sample, picture in zip(samples, pictures):
                if reason := form.refusal(picture, sample.query):
                    raise ValueError(f"sample {sample.id}: {reason}; leave it out of the dataset") from error
            raise
        return inputs.to(self.model.device, self.model.dtype)

    def fit(self, samples: Sequence[GroundingSample], store: FeatureStore) -> ProbeResults:
        """Trains and scores the heads of all layers on the features of ``samples``."""
        pictures = [s.picture_key for s in samples]
        train, validation = split_by_picture(pictures, self.split_seed)
        targets, outputs = self._targets(samples)
        constant = best_constant(targets[train], outputs)
        features, right, losses = scaled(store.get, train, self.training), [], []
        for seed in self.seeds:
            heads = train_heads(features, targets, train, outputs, self.training, seed)
            right.append(is_right(predict(heads, features, validation), targets[validation]))  # (n, L)
            losses.append(mean_loss(heads, features, targets, train))  # (L,)
        per_seed = torch.stack(right)  # (seeds, n, L)
        per_sample = per_seed.double().mean(0).numpy()  # (n, L)
        held_out = [pictures[i] for i in validation.tolist()]
        return ProbeResults(
            task=self.task,
            training=self.training,
            seeds=tuple(self.seeds),
            scores=per_sample.mean(0),
            intervals=np.array([interval_of_mean(column, held_out, seed=self.split_seed) for column in per_sample.T]),
            by_seed=per_seed.double().mean(1).numpy(),
            by_sample={samples[i].id: row for i, row in zip(validation.tolist(), per_sample)},
            baseline=float(is_right(constant.expand(len(validation), 1, -1), targets[validation]).double().mean()),
            skipped={},
            forward_passes=0,
            sizes={
                "train_samples": len(train),
                "validation_samples": len(validation),
                "train_pictures": len(set(pictures)) - len(set(held_out)),
                "validation_pictures": len(set(held_out)),
            },
            train_loss=torch.stack(losses).mean(0).numpy(),
            constant_loss=float(loss_per_layer(constant.expand(len(train), 1, -1), targets[train])),
            steps=self.training.epochs * -(-len(train) // self.training.batch_size),
            feature_rms=root_mean_square(store.get, train).numpy(),
        )

    def run(self, samples: Sequence[GroundingSample], folder: str | Path) -> ProbeResults:
        """Features, heads and scores; ``folder`` keeps the features."""
        kept, skipped = self.usable(samples)
        self.check(kept, skipped)
        store, passes = self.extract(kept, folder)
        return dataclasses.replace(self.fit(kept, store), skipped=skipped, forward_passes=passes)

    def _targets(self, samples: Sequence[GroundingSample]) -> tuple[Tensor, int]:
        if self.task == "grounding":
            return torch.tensor([_normalised(s) for s in samples], dtype=torch.float32), 4
        names = sorted({s.label for s in samples})
        if len(names) < 2:
            raise ValueError(f"classification needs at least two labels; all samples have {names}")
        return torch.tensor([names.index(s.label) for s in samples]), len(names)


def split_by_picture(pictures: Sequence[str], seed: int) -> tuple[Tensor, Tensor]:
    """(training, validation) sample numbers; all samples of a picture are on one side.

    ``ValueError`` if there are fewer than two pictures.
    """
    unique = list(dict.fromkeys(pictures))
    if len(unique) < 2:
        raise ValueError(f"the dataset has {len(unique)} picture, needed at least 2: one to train on, one to validate")
    order = np.random.default_rng(seed).permutation(len(unique))
    count = min(max(1, round(TRAIN_SHARE * len(unique))), len(unique) - 1)
    training = {unique[i] for i in order[:count]}
    sides = torch.tensor([p in training for p in pictures])
    return sides.nonzero().flatten(), (~sides).nonzero().flatten()


def is_right(predicted: Tensor, targets: Tensor) -> Tensor:
    """(n, L, outputs) and (n, 4) or (n,) -> (n, L) bool."""
    if targets.is_floating_point():
        return torch.from_numpy(box_iou(corners(predicted), corners(targets[:, None])) >= RIGHT_IOU)
    return predicted.argmax(-1) == targets[:, None]


def best_constant(targets: Tensor, outputs: int) -> Tensor:
    """(outputs,) the answer without features of the least loss: the median box, or the classes' log frequencies."""
    if targets.is_floating_point():
        return targets.median(0).values
    return (targets.bincount(minlength=outputs) / len(targets)).log()


def _box_problem(sample: GroundingSample) -> str | None:
    if sample.bbox is None:
        raise ValueError(f"sample {sample.id}: no bbox; the grounding probe needs one (x1, y1, x2, y2 in pixels)")
    if len(sample.bbox) != 4 or not all(math.isfinite(v) for v in sample.bbox):
        raise ValueError(f"sample {sample.id}: bbox must be four finite numbers; got {list(sample.bbox)}")
    return box_problem(sample.bbox, sample.size)


def _label_problem(sample: GroundingSample) -> str | None:
    return None if sample.label else "no label"


def _picture(sample: GroundingSample) -> Image.Image:
    try:
        return sample.image
    except SampleSkipped as error:
        raise ValueError(f"sample {sample.id}: {error}") from error


def _normalised(sample: GroundingSample) -> tuple[float, float, float, float]:
    """(xc, yc, w, h) as fractions of the picture, cut at its edge."""
    width, height = sample.size
    x1, x2 = (min(max(v / width, 0.0), 1.0) for v in (sample.bbox[0], sample.bbox[2]))
    y1, y2 = (min(max(v / height, 0.0), 1.0) for v in (sample.bbox[1], sample.bbox[3]))
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
