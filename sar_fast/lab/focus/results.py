"""SFS and FI of a model on a dataset, as a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sar_fast.lab.focus.evaluator import FI, SFS
from sar_fast.lab.run.exports import data_frame, new_folder
from sar_fast.lab.run.results import SAMPLES, read_json, read_lines, to_line, write_json, write_text
from sar_fast.lab.show.figures import new_figure, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

RESULTS = "focus_metrics_results.json"


@dataclasses.dataclass(frozen=True)
class FocusResults:
    """Where a model looks, over a dataset (section 4 of the paper).

    Attributes:
        sfs: semantic focus score, 0 to 1: the mean share of the map inside the object's mask. sfs_interval: its 95 %
            bootstrap interval over pictures.
        fi: focus instability, 0 to 2: 1 - the mean SSIM of the query's map to those of the paraphrases. fi_interval.
        uniform_sfs: the SFS of a map that is the same everywhere, the masks' mean share of the picture.
        summary: what ``focus_metrics_results.json`` holds, less ``metadata``; with SAR also ``c_weighted``, the same
            scores of maps in which heads count by their factor c.
        records: one per sample, in their order, with its scores, or why it was skipped.
        metadata: settings, versions, seed, device, times.
    """

    sfs: float
    sfs_interval: tuple[float, float]
    fi: float
    fi_interval: tuple[float, float]
    uniform_sfs: float
    summary: Mapping[str, Any] = dataclasses.field(repr=False)
    records: Sequence[Mapping[str, Any]] = dataclasses.field(repr=False)
    metadata: Mapping[str, Any] = dataclasses.field(repr=False)

    @property
    def skipped(self) -> Mapping[str, list[str]]:
        """Ids by the reason why they have no score."""
        return self.summary["skipped"]

    @property
    def notes(self) -> Mapping[str, list[str]]:
        """Ids by what is to be known of their masks."""
        return self.summary["notes"]

    def to_dict(self) -> dict[str, Any]:
        """What ``focus_metrics_results.json`` holds."""
        return {**self.summary, "metadata": self.metadata}

    def to_pandas(self) -> DataFrame:
        """A row per sample: its record, ``ssim`` and ``c_weighted`` as they are there."""
        return data_frame(self.records)

    def save(self, folder: str | Path) -> Path:
        """Writes ``focus_metrics_results.json`` and ``samples.jsonl``; the folder. ``ArgumentError`` if anything lies
        there."""
        path = new_folder(folder)
        write_text(path / SAMPLES, "".join(map(to_line, self.records)))
        write_json(path / RESULTS, self.to_dict())
        return path

    def plot(self, path: str | Path | None = None) -> Figure:
        """How SFS and FI are spread over the samples, with mean and interval."""
        scored = [record for record in self.records if "skipped" not in record]
        figure = new_figure(8, 3.4)
        for axes, key, name, mean, interval in zip(
            figure.subplots(1, 2),
            (SFS, FI),
            ("semantic focus score", "focus instability"),
            (self.sfs, self.fi),
            (self.sfs_interval, self.fi_interval),
        ):
            axes.hist([record[key] for record in scored], bins=20, alpha=0.6)
            axes.axvspan(*interval, alpha=0.25, color="C1", label="95 % interval over pictures")
            axes.axvline(mean, color="C1", label=f"mean {mean:.3f}")
            axes.set(xlabel=name, ylabel="samples")
            axes.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            if key == SFS:
                axes.axvline(self.uniform_sfs, color="grey", linestyle="--", label="a map that is the same everywhere")
            axes.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1))
        return written(figure, path)


def read_results(folder: str | Path) -> FocusResults:
    """What a finished folder of results holds."""
    found = read_json(Path(folder) / RESULTS)
    metadata = found.pop("metadata")
    return FocusResults(
        sfs=found[SFS],
        sfs_interval=tuple(found[f"{SFS}_ci95"]),
        fi=found[FI],
        fi_interval=tuple(found[f"{FI}_ci95"]),
        uniform_sfs=found["uniform_focus_score"],
        summary=found,
        records=read_lines(Path(folder) / SAMPLES),
        metadata=metadata,
    )
