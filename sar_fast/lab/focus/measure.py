"""``measure_focus``: SFS and FI of a model that the caller has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sar_fast.base.errors import ArgumentError
from sar_fast.base.extras import need
from sar_fast.config import SARConfig
from sar_fast.lab.focus.dataset import GroundingDataset
from sar_fast.lab.focus.prompts import DEFAULT_TEMPLATES
from sar_fast.lab.focus.results import FocusResults, read_results
from sar_fast.lab.focus.run import Looking, run
from sar_fast.lab.focus.samples import DatasetMasks, GroundingSample, MaskSource
from sar_fast.lab.run.session import Session, folder_or_none, processes_of
from sar_fast.lab.run.subject import Subject


def measure_focus(
    model: nn.Module,
    processor: Any,
    samples: Sequence[GroundingSample] | str | Path,
    *,
    sar: SARConfig | None = None,
    masks: MaskSource | None = None,
    layers: Sequence[int] = (-1,),
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    batch_size: int = 8,
    folder: str | Path | None = None,
    overwrite: bool = False,
    overlays: bool = False,
    dataset_dir: str | Path | None = None,
    media_dir: str | Path | None = None,
    max_samples: int | None = None,
    seed: int = 42,
) -> FocusResults:
    """Where a model looks while it reads a query, and whether wording moves its eyes (section 4; docs/analyses.md).

    The same as ``experiments/evaluate.py --do_sfs_fi_eval``. One pass over all prompts of a batch; the model is given
    back as it came.

    Args:
        model: of transformers, of a supported family, PEFT-wrapped or not. processor: its processor.
        samples: pictures with a query, an object's name, and its mask or box; or a dataset's name or file.
        sar: SAR while looking. None: the model as it is, with the SAR that may be on it.
        masks: where masks come from: :class:`~.grounding.GroundedMasks`, say; by default each sample's mask or box.
        layers: attention layers to average; negative ones count from the end.
        templates: paraphrases, each with one ``{}`` for the object's name.
        batch_size: samples per batch; each is as many prompts as there are templates, and one.
        folder: where records go as they come, so that a later call goes on where this one stopped. None keeps nothing.
        overwrite: delete the results of an earlier call in the folder.
        overlays: also draw every query's map over its picture, in ``folder/overlays``.
        dataset_dir, media_dir: of a dataset's name or file: where the registry is, and where pictures' paths start.
        max_samples: take the first ones alone. seed: of the intervals' resampling.

    Returns:
        Scores, records and metadata, on every process of a launch; these share the samples between them.

    Raises:
        ArgumentError: an argument that cannot be, before anything runs or is written; a folder of other results.
        ValueError: a dataset that is none, or no sample that could be scored.
    """
    need("measure_focus", "skimage", *(["matplotlib"] if overlays else []))
    if overlays and folder is None:
        raise ArgumentError("overlays", overlays, "be False without {folder}")
    subject = Subject.of(model, processor, sar)
    dataset = GroundingDataset.find(samples, dataset_dir, media_dir, max_samples)
    looking = Looking(DatasetMasks() if masks is None else masks, layers, templates, batch_size, overlays)
    asked = {
        "samples": dataset.name,
        **looking.settings(),
        "batch_size": batch_size,
        "max_samples": max_samples,
        "sar": None if sar is None else sar.to_dict(),
    }
    state = processes_of(model)
    with folder_or_none(folder, overwrite, state) as path:
        run(subject, dataset, looking, Session(asked, state, seed=seed, overwrite=overwrite), path)
        state.wait_for_everyone()
        return read_results(path)
