"""Semantic focus score (SFS) and focus instability (FI) of a model over a dataset."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image
from torch import nn

from sar_fast.config import SARConfig
from sar_fast.lab.focus.attention import PromptAttention, layer_indices, prompt_attention
from sar_fast.lab.focus.bootstrap import interval_of_mean
from sar_fast.lab.focus.grids import TokenGrid, token_grids
from sar_fast.lab.focus.maps import attention_map, semantic_focus, structural_similarities
from sar_fast.lab.focus.prompts import DEFAULT_TEMPLATES, check_templates, check_words
from sar_fast.lab.focus.samples import DatasetMasks, GroundingSample, MaskSource, check_size
from sar_fast.lab.io.processors import ProcessorRefusal
from sar_fast.lab.io.prompts import PromptFormat
from sar_fast.lab.io.skips import REFUSED, SampleSkipped
from sar_fast.lab.measure.recording import attention_layers
from sar_fast.lab.show.overlay import heat_overlay

Records = dict[str, dict[str, Any]]
SFS, FI = "semantic_focus_score", "focus_instability"


@dataclasses.dataclass
class FocusMetricsEvaluator:
    """Measures where a model looks: at the object of the query (SFS), and at the same place however it is asked (FI).

    A map is the attention of the prompt's last token over the visual tokens, mean over ``layers`` and heads, on the
    picture's pixels. SFS is its share inside the object's mask. FI is 1 - the mean SSIM of the query's map to the maps
    of the templates, filled with the object's name.

    Args:
        model: a transformers model of a supported family, without SAR on it. processor: its processor.
        masks: where masks come from; by default the dataset's masks and boxes.
        config: SAR while looking, or None for the model as it is. With SAR, records also hold both scores of maps in
            which heads count by their factor c.
        layers: attention layers to average; negative ones count from the end.
        templates: paraphrases, each with one ``{}`` for the object's name.
        overlay_dir: where to write each query's map over its picture, or None.
    """

    model: nn.Module
    processor: Any
    masks: MaskSource = dataclasses.field(default_factory=DatasetMasks)
    config: SARConfig | None = None
    layers: Sequence[int] = (-1,)
    templates: Sequence[str] = DEFAULT_TEMPLATES
    overlay_dir: str | Path | None = None

    def __post_init__(self) -> None:
        self.templates = check_templates(self.templates)
        layer_indices(self.layers, attention_layers(self.model), self.config)
        self.overlay_dir = None if self.overlay_dir is None else Path(self.overlay_dir)

    def describe(self) -> dict[str, Any]:
        """The settings that scores depend on, as plain values."""
        return {
            "layers": list(self.layers),
            "templates": list(self.templates),
            "masks": self.masks.describe(),
            "sar": None if self.config is None else self.config.to_dict(),
        }

    def score(self, samples: Sequence[GroundingSample]) -> list[dict[str, Any]]:
        """One record per sample, all prompts of all samples in one batch.

        A record has ``id``, ``picture`` (its key), ``mask_share`` (of the picture's area), ``semantic_focus_score``,
        ``focus_instability`` and ``ssim`` (per template), with SAR also ``c_weighted`` with both scores, and ``note``
        if there is something to know of its mask; or ``id``, ``skipped`` (reason) and ``detail``.
        """
        records: Records = {}
        kept: list[tuple[GroundingSample, Image.Image, np.ndarray]] = []
        for sample in samples:
            try:
                check_words(self.processor, self._questions(sample))
                picture = check_size(sample.image)
                kept.append((sample, picture, self.masks.mask(sample)))
            except SampleSkipped as skipped:
                records[sample.id] = _skipped(sample, skipped)
        if kept:
            asked: dict[str, list[int]] = {}  # picture -> its samples: they share its encoding and its tokens' run
            for number, (sample, _, _) in enumerate(kept):
                asked.setdefault(sample.picture_key, []).append(number)
            pictures = [kept[numbers[0]][1] for numbers in asked.values()]
            questions = [[q for n in numbers for q in self._questions(kept[n][0])] for numbers in asked.values()]
            form = PromptFormat.of(self.model, self.processor)
            try:
                groups = form.encode_groups(pictures, questions)
            except ProcessorRefusal:
                refused = self._refused(form, kept)
                if not refused:
                    raise
                others = iter(self.score([sample for sample in samples if sample.id not in refused]))
                return [refused.get(sample.id) or next(others) for sample in samples]
            groups = groups.to(self.model.device, self.model.dtype)
            found = prompt_attention(self.model, groups, self.layers, self.config)
            grids = [
                token_grids(self.model, self.processor, groups.inputs, b, len(rows[0].mean), picture.size)
                for b, (picture, rows) in enumerate(zip(pictures, found))
            ]
            prompts = 1 + len(self.templates)
            jobs = [
                (*kept[number], rows[i * prompts : (i + 1) * prompts], places)
                for numbers, rows, places in zip(asked.values(), found, grids)
                for i, number in enumerate(numbers)
            ]
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # SciPy's and Pillow's filters let other threads run
                for record in pool.map(self._record, *zip(*jobs)):
                    records[record["id"]] = record
        return [records[sample.id] for sample in samples]

    def _refused(self, form: PromptFormat, kept: Sequence[tuple[GroundingSample, Image.Image, np.ndarray]]) -> Records:
        """Records, by id, of samples of whose picture or words the processor makes no prompt."""
        refused = {}
        for sample, picture, _ in kept:
            reason = next(filter(None, (form.refusal(picture, q) for q in self._questions(sample))), None)
            if reason is not None:
                refused[sample.id] = _skipped(sample, SampleSkipped(REFUSED, reason))
        return refused

    def _questions(self, sample: GroundingSample) -> list[str]:
        return [sample.query, *(template.format(sample.object_prompt) for template in self.templates)]

    def _record(
        self,
        sample: GroundingSample,
        picture: Image.Image,
        mask: np.ndarray,
        looks: Sequence[PromptAttention],
        grids: Sequence[TokenGrid],
    ) -> dict[str, Any]:
        """The scores of one sample from the attention of its prompts."""
        maps = [attention_map(look.mean, grids, picture.size) for look in looks]
        record = {
            "id": sample.id,
            "picture": sample.picture_key,
            "mask_share": float(mask.mean()),
            **_scores(maps, mask),
        }
        if self.config is not None:
            weighted = [attention_map(look.weighted, grids, picture.size) for look in looks]
            record["c_weighted"] = _scores(weighted, mask)
        if note := self.masks.note(sample):
            record["note"] = note
        if self.overlay_dir is not None:
            self._draw(sample.id, picture, maps[0], mask)
        return record

    def _draw(self, name: str, picture: Image.Image, attention: np.ndarray, mask: np.ndarray) -> None:
        """Heat over the picture, the mask's edge in white."""
        drawn = np.array(heat_overlay(picture, attention, float(attention.max())))
        inner = mask.copy()
        inner[1:] &= mask[:-1]
        inner[:-1] &= mask[1:]
        inner[:, 1:] &= mask[:, :-1]
        inner[:, :-1] &= mask[:, 1:]
        drawn[mask & ~inner] = 255
        path = overlay_path(self.overlay_dir, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        Image.fromarray(drawn).save(partial, format="PNG")
        os.replace(partial, path)  # a file that is there is whole


def overlay_path(folder: Path, name: str) -> Path:
    """Where the map of the sample with this id is drawn."""
    return folder / f"{quote(name, safe='')}.png"


def _skipped(sample: GroundingSample, why: SampleSkipped) -> dict[str, Any]:
    return {"id": sample.id, "skipped": why.reason, "detail": str(why)}


def _scores(maps: Sequence[np.ndarray], mask: np.ndarray) -> dict[str, Any]:
    similarities = structural_similarities(maps[0], maps[1:])
    return {SFS: semantic_focus(maps[0], mask), FI: 1 - float(np.mean(similarities)), "ssim": similarities}


def _by(records: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[str]]:
    """Ids of the records that have the key, by its value."""
    found: dict[str, list[str]] = {}
    for record in records:
        if key in record:
            found.setdefault(record[key], []).append(record["id"])
    return found


def summarise(records: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """The run's scores: means over the scored samples, 95 % bootstrap intervals over pictures, ids by skip and by note.

    ``uniform_focus_score`` is the SFS of a map that is the same everywhere: the masks' mean share of the picture.
    ``ValueError`` if no sample was scored.
    """
    scored = [r for r in records if "skipped" not in r]
    skipped, notes = _by(records, "skipped"), _by(records, "note")
    if not scored:
        reasons = ", ".join(f"{reason} ({len(ids)})" for reason, ids in skipped.items()) or "the dataset is empty"
        raise ValueError(f"no sample could be scored: {reasons}")
    pictures = [r["picture"] for r in scored]

    def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key in (SFS, FI):
            values = [row[key] for row in rows]
            found[key] = float(np.mean(values))
            found[f"{key}_ci95"] = interval_of_mean(values, pictures, seed=seed)
        return found

    results = {
        **means(scored),
        "num_samples_evaluated": len(scored),
        "num_samples_skipped": len(records) - len(scored),
        "skipped": skipped,
        "notes": notes,
        "num_pictures": len(set(pictures)),
        "uniform_focus_score": float(np.mean([r["mask_share"] for r in scored])),
    }
    if all("c_weighted" in r for r in scored):
        results["c_weighted"] = means([r["c_weighted"] for r in scored])
    return results
