"""What a benchmark gave, as a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sar_fast.lab.benchmark.figures import draw_scores
from sar_fast.lab.benchmark.tasks import Task
from sar_fast.lab.run.exports import data_frame, new_folder
from sar_fast.lab.run.results import METADATA, RESULTS, SAMPLES, read_json, read_lines, to_line, write_json, write_text
from sar_fast.lab.show.figures import written

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class BenchmarkResults:
    """The scores of one model on one benchmark, and the records behind them.

    Attributes:
        task: the benchmark's name.
        headline: its main scores by name, in its own units (percent, MME's points); None where one is not defined.
        scores: everything that ``all_results.json`` of the command has.
        records: a dictionary per sample, in the order of the data: prompt, reply, what it was read as, whether it is
            right; or why it was skipped.
        metadata: the settings that the records depend on, and the sessions that made them.
    """

    task: str
    headline: Mapping[str, Any]
    scores: Mapping[str, Any] = dataclasses.field(repr=False)
    records: list[dict[str, Any]] = dataclasses.field(repr=False)
    metadata: Mapping[str, Any] = dataclasses.field(repr=False)

    @property
    def skipped(self) -> list[dict[str, str]]:
        """``key`` and ``reason`` of every row, question or sample that is not scored."""
        return self.scores["skipped"]

    @property
    def warnings(self) -> list[str]:
        """What a reader of the scores has to know."""
        return self.scores["warnings"]

    def to_pandas(self) -> Any:
        """The records as a ``pandas.DataFrame``."""
        return data_frame(self.records)

    def save(self, folder: str | Path) -> Path:
        """Write ``samples.jsonl``, ``all_results.json`` and ``run_metadata.json``, which ``folder=`` of a later call
        continues; the folder. ``ArgumentError`` if anything lies there."""
        path = new_folder(folder)
        write_text(path / SAMPLES, "".join(map(to_line, self.records)))
        write_json(path / RESULTS, self.scores)
        write_json(path / METADATA, self.metadata)
        return path

    def plot(self, path: str | Path | None = None) -> Figure:
        """The headline as bars; written as a picture if a path is given."""
        return written(draw_scores(self.headline, self.task), path)


def read_results(task: Task, folder: Path) -> BenchmarkResults:
    """What a finished folder of results holds."""
    scores = read_json(folder / RESULTS)
    return BenchmarkResults(
        task=task.name,
        headline=dict(task.headline(scores)),
        scores=scores,
        records=read_lines(folder / SAMPLES),
        metadata=read_json(folder / METADATA),
    )
