"""The layer-wise probe of a model on a dataset, in a folder of results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sar_fast.base.errors import ArgumentError, check_choice
from sar_fast.lab.focus.dataset import GroundingDataset
from sar_fast.lab.probe.features import DONE, FeatureStore
from sar_fast.lab.probe.heads import HeadTraining
from sar_fast.lab.probe.probe import TASKS, LayerwiseProbe
from sar_fast.lab.probe.results import DETAILS, RESULTS, WORDS, write_files
from sar_fast.lab.run.session import Session
from sar_fast.lab.run.subject import Loaded, Subject

FIGURE = "layerwise_probe.png"
FEATURES = "features"


@dataclasses.dataclass(frozen=True)
class Probing:
    """How layers are probed.

    Attributes:
        task: what heads learn, ``"grounding"`` or ``"classification"``. training: of the heads.
        seeds: how often heads are trained, from different initial weights and orders.
        batch_size: prompts per forward pass.

    ``ArgumentError`` for a number below 1, and another task.
    """

    task: str = "grounding"
    training: HeadTraining = dataclasses.field(default_factory=HeadTraining)
    seeds: int = 3
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_choice("task", self.task, TASKS)
        for name in ("seeds", "batch_size"):
            if getattr(self, name) < 1:
                raise ArgumentError(name, getattr(self, name), "be at least 1")

    def settings(self, seed: int) -> dict[str, Any]:
        """What scores depend on beyond the features, as plain values."""
        return {
            "task": self.task,
            "training": {**dataclasses.asdict(self.training), "seeds": self.seeds, "seed": seed},
        }

    def probe(self, loaded: Loaded, seed: int, depends: Mapping[str, Any]) -> LayerwiseProbe:
        """The probe of a model, which puts SAR on while it reads features and must not find it there."""
        model, processor, handle = loaded
        if handle is not None:
            handle.remove()
        return LayerwiseProbe(
            model,
            processor,
            task=self.task,
            training=self.training,
            seeds=range(seed, seed + self.seeds),
            split_seed=seed,
            batch_size=self.batch_size,
            config=None if handle is None else handle.config,
            depends=depends,
        )


def run(
    subject: Subject,
    dataset: GroundingDataset,
    probing: Probing,
    session: Session,
    path: str | Path,
    words: Mapping[str, str] = WORDS,
) -> None:
    """Reads features that are not in the folder ``path`` yet, trains and scores the heads; every process of a launch
    calls it. ``words`` are a front end's, for warnings; :func:`~.results.read_results` reads what was found.
    """
    of_features = {**dataset.settings(), **subject.settings()}
    settings = {"analysis": "layerwise_probe", **of_features, **probing.settings(session.seed)}
    # features are no product: they know what they are of, and another training of the heads takes them as they are
    folder = session.open(path, settings, products=[RESULTS, DETAILS, FIGURE], work=f"{FEATURES}/{DONE}")
    with subject.opened() as loaded:
        probe = probing.probe(loaded, session.seed, of_features)
        kept, skipped = probe.usable(dataset.samples)
        probe.check(kept, skipped)
        session.begin(f"probe, {probing.task}", len(dataset.samples), len(kept))
        store, passes = _features(probe, kept, folder.path / FEATURES, session)
    if not session.worked():
        return
    results = dataclasses.replace(
        probe.fit(kept, store),
        skipped=skipped,
        forward_passes=passes,
        metadata={"settings": settings, **session.metadata},
    )
    folder.merge(results.records())
    write_files(results, folder.path, words)
    results.plot(folder.path / FIGURE)
    session.finish()


def _features(probe: LayerwiseProbe, samples: Any, folder: Path, session: Session) -> tuple[FeatureStore, int]:
    """(features of all samples, forward passes of this process)."""
    state = session.state
    if state.is_main_process:
        probe.open_store(samples, folder, overwrite=session.overwrite)  # one process makes the files
    state.wait_for_everyone()
    return probe.extract(samples, folder, state.process_index, state.num_processes, progress=state.is_main_process)
