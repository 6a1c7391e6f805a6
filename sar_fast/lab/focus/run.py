"""SFS and FI of a model on a dataset, in a folder of results."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sar_fast.base.errors import ArgumentError
from sar_fast.hf.shared_prefix import sharing_of
from sar_fast.lab.focus.dataset import GroundingDataset
from sar_fast.lab.focus.evaluator import FocusMetricsEvaluator, overlay_path, summarise
from sar_fast.lab.focus.prompts import DEFAULT_TEMPLATES, check_templates
from sar_fast.lab.focus.results import RESULTS
from sar_fast.lab.focus.samples import DatasetMasks, GroundingSample, MaskSource
from sar_fast.lab.run.progress import progress_bar
from sar_fast.lab.run.results import ResultFolder, write_json
from sar_fast.lab.run.session import Session
from sar_fast.lab.run.subject import Loaded, Subject

OVERLAYS = "overlays"


@dataclasses.dataclass(frozen=True)
class Looking:
    """How focus is measured.

    Attributes:
        masks: where masks come from. layers: attention layers to average, negative from the end.
        templates: paraphrases, each with one ``{}`` for the object's name.
        batch_size: samples per batch, whose prompts all run together. overlays: draw each query's map in ``overlays/``.

    ``ArgumentError`` for layers or templates that are none, and an empty batch.
    """

    masks: MaskSource = dataclasses.field(default_factory=DatasetMasks)
    layers: Sequence[int] = (-1,)
    templates: Sequence[str] = DEFAULT_TEMPLATES
    batch_size: int = 8
    overlays: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ArgumentError("batch_size", self.batch_size, "be at least 1")
        if isinstance(self.layers, str) or not isinstance(self.layers, Sequence):
            raise ArgumentError("layers", repr(self.layers), "be a list of attention layers, [-1] for the last")
        check_templates(self.templates)

    def settings(self) -> dict[str, Any]:
        """What scores depend on, as plain values."""
        return {"layers": list(self.layers), "templates": list(self.templates), "masks": self.masks.describe()}

    def evaluator(self, loaded: Loaded, overlays: Path | None) -> FocusMetricsEvaluator:
        """The evaluator of a model, which puts SAR on while it looks and must not find it there."""
        model, processor, handle = loaded
        if handle is not None:
            handle.remove()
        config = None if handle is None else handle.config
        return FocusMetricsEvaluator(model, processor, self.masks, config, self.layers, self.templates, overlays)


def run(subject: Subject, dataset: GroundingDataset, looking: Looking, session: Session, path: str | Path) -> None:
    """Scores what is not scored yet in the folder ``path``, then summarises all; every process of a launch calls it.

    The model is opened only where something is left to score. :func:`~.results.read_results` reads what was found.
    """
    settings = {"analysis": "sfs_fi", **dataset.settings(), **subject.settings(), **looking.settings()}
    folder = session.open(path, settings, products=[RESULTS, f"{OVERLAYS}/*.png"])
    known = folder.records()
    overlays = folder.path / OVERLAYS if looking.overlays else None
    batches = _pending(dataset.samples, looking.batch_size, known, overlays)
    total = sum(map(len, batches))
    with contextlib.ExitStack() as stack:
        evaluator = looking.evaluator(stack.enter_context(subject.opened()), overlays) if batches else None
        session.begin("SFS and FI", len(dataset.samples), total)
        if evaluator is not None:
            session.note(sharing=sharing_of(evaluator.model).describe())
            _score(evaluator, batches, known, session, folder)
    if not session.worked():
        return
    found = folder.records()
    records = [found[sample.id] for sample in dataset.samples]
    results = summarise(records, session.seed)
    folder.merge(records)
    write_json(folder.path / RESULTS, {**results, "metadata": {"settings": settings, **session.metadata}})
    session.finish()


def _pending(
    samples: Sequence[GroundingSample], size: int, known: Mapping[str, Mapping[str, Any]], overlays: Path | None
) -> list[Sequence[GroundingSample]]:
    """Batches in which a sample has no record yet, or none of the overlays that are asked for."""

    def done(sample: GroundingSample) -> bool:
        record = known.get(sample.id)
        drawn = overlays is None or record is None or "skipped" in record or overlay_path(overlays, sample.id).is_file()
        return record is not None and drawn

    batches = [samples[start : start + size] for start in range(0, len(samples), size)]
    return [batch for batch in batches if not all(map(done, batch))]


def _score(
    evaluator: FocusMetricsEvaluator,
    batches: Sequence[Sequence[GroundingSample]],
    known: Mapping[str, Any],
    session: Session,
    folder: ResultFolder,
) -> None:
    """This process's share of the batches, records appended as they come."""
    state = session.state
    mine = batches[state.process_index :: state.num_processes]
    bar = progress_bar(sum(map(len, mine)), "SFS/FI", here=state.is_main_process)
    with bar, folder.open_part(state.process_index) as part:
        for batch in mine:
            scored = evaluator.score(batch)
            part.append({"key": record["id"], **record} for record in scored if record["id"] not in known)
            bar.update(len(batch))
