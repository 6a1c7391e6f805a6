"""What a training left in its folder, as a value."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sar_fast.lab.run.exports import data_frame, new_folder
from sar_fast.lab.run.results import METADATA, RESULTS, read_json, read_lines
from sar_fast.lab.show.figures import new_figure, written
from sar_fast.lab.training.gradients import FILE_NAME
from sar_fast.lab.training.plots import NORM, draw_ginis, draw_loss, draw_norms

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

STATE = "trainer_state.json"


@dataclasses.dataclass(frozen=True)
class TrainingResults:
    """A run that has ended; the model that it trained is the caller's.

    Attributes:
        folder: where it is: the saved model, its checkpoints, logs and metadata.
        metrics: ``train_loss``, ``train_runtime`` (seconds), ...; with ``eval_dataset`` also ``eval_loss``.
        log_history: what the Trainer logged, step by step.
        gradient_sparsity: a measurement per line, ``step`` and the names of
            :class:`~.gradients.GradientSparsityCallback`; empty where none was asked for.
        metadata: versions, seed, configuration, and the sessions that resumed it.
    """

    folder: Path
    metrics: Mapping[str, float]
    log_history: Sequence[Mapping[str, Any]] = dataclasses.field(repr=False)
    gradient_sparsity: Sequence[Mapping[str, Any]] = dataclasses.field(repr=False)
    metadata: Mapping[str, Any] = dataclasses.field(repr=False)

    def to_pandas(self) -> DataFrame:
        """A row per logged step: the Trainer's values, and those of gradient sparsity where they were measured."""
        rows: dict[int, dict[str, Any]] = {}
        for line in (*self.log_history, *self.gradient_sparsity):
            rows.setdefault(line["step"], {}).update(line)
        return data_frame(rows[step] for step in sorted(rows))

    def save(self, folder: str | Path) -> Path:
        """Copies the results, without weights, into a folder; ``ArgumentError`` if anything lies there."""
        path = new_folder(folder)
        for name in (RESULTS, STATE, FILE_NAME, METADATA):
            if (self.folder / name).is_file():
                shutil.copy(self.folder / name, path)
        return path

    def plot(self, path: str | Path | None = None) -> Figure:
        """The losses against the step; where gradients were measured also their L1 norms and Gini coefficients."""
        panels = 3 if self.gradient_sparsity else 1
        figure = new_figure(5 * panels, 4)
        axes = figure.subplots(1, panels, squeeze=False)[0]
        draw_loss(axes[0], self.log_history)
        if self.gradient_sparsity:
            draw_norms(axes[1], self.gradient_sparsity, "gradient of the loss at embeddings")
            axes[1].set_ylabel(NORM)
            draw_ginis(axes[2], self.gradient_sparsity, "by depth")
        return written(figure, path)


def read_results(folder: str | Path) -> TrainingResults:
    """What a run that has ended left in a folder."""
    path = Path(folder)
    measured = path / FILE_NAME
    return TrainingResults(
        folder=path,
        metrics=read_json(path / RESULTS),
        log_history=read_json(path / STATE)["log_history"],
        gradient_sparsity=read_lines(measured) if measured.is_file() else [],
        metadata=read_json(path / METADATA),
    )
