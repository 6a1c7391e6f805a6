"""What a layer-wise probe found, as a value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from sar_fast.lab.probe.heads import HeadTraining
from sar_fast.lab.run.exports import data_frame, new_folder
from sar_fast.lab.run.results import SAMPLES, read_json, read_lines, to_line, write_json, write_text
from sar_fast.lab.show.figures import new_figure, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

RESULTS = "layerwise_probe_results.json"
DETAILS = "layerwise_probe_details.json"
RIGHT_IOU = 0.5
ENOUGH_STEPS = 1000  # in which heads on standardised features learn at the research code's learning rate
WORDS: Mapping[str, str] = MappingProxyType({name: name for name in ("lr", "epochs", "feature_scale")})


@dataclasses.dataclass(frozen=True)
class ProbeResults:
    """Scores of a probe.

    Attributes:
        task: ``"grounding"`` or ``"classification"``. training: of the heads. seeds: of its repetitions.
        scores: (L,) share of right answers on the validation pictures, mean over seeds.
        intervals: (L, 2) 95 % bootstrap interval over validation pictures.
        by_seed: (seeds, L).
        by_sample: id of each validation sample -> (L,) share of seeds whose head was right.
        baseline: score of the best answer that ignores the features: the median box, or the most frequent class.
        skipped: reason -> ids. forward_passes: how many were made; features on disk need none.
        sizes: numbers of training and validation samples and pictures.
        train_loss: (L,) mean loss of the trained heads over the training samples, mean over seeds.
        constant_loss: the same of the baseline's answer. steps: optimizer steps of each training.
        feature_rms: (L,) root mean square of the training samples' features, before they are scaled.
        metadata: settings, versions, seed, device, times; empty of a probe that ran by itself.
    """

    task: str
    training: HeadTraining
    seeds: tuple[int, ...]
    scores: np.ndarray
    intervals: np.ndarray
    by_seed: np.ndarray = dataclasses.field(repr=False)
    by_sample: dict[str, np.ndarray] = dataclasses.field(repr=False)
    baseline: float
    skipped: dict[str, list[str]]
    forward_passes: int
    sizes: dict[str, int]
    train_loss: np.ndarray
    constant_loss: float
    steps: int
    feature_rms: np.ndarray = dataclasses.field(repr=False)
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def unlearned(self) -> list[int]:
        """Layers whose heads are no better on the training samples than the baseline's answer."""
        return np.flatnonzero(self.train_loss >= self.constant_loss).tolist()

    @property
    def warnings(self) -> list[str]:
        """What a reader of the scores has to know, in sentences: heads that have not learned, and what helps."""
        return self.warned(WORDS)

    def warned(self, words: Mapping[str, str]) -> list[str]:
        """:attr:`warnings` in a front end's words for ``lr``, ``epochs``, ``feature_scale``, and ``overwrite`` where
        features are kept."""
        if not (layers := self.unlearned):
            return []
        which = "every layer" if len(layers) == len(self.scores) else f"layers {', '.join(map(str, layers))}"
        span = lambda values: f"{min(values[i] for i in layers):.3g} to {max(values[i] for i in layers):.3g}"
        found = (
            f"heads of {which} have not learned, and their scores say nothing of the layers: after {self.steps} steps "
            f"with {words['lr']} {self.training.lr:g} the training loss is {span(self.train_loss)}, that of a constant "
            f"answer {self.constant_loss:.3g}; "
        )
        if self.training.feature_scale == "none":
            remedy = f"raw features are {span(self.feature_rms)} large (rms): give {words['feature_scale']} standardize"
        elif self.steps < ENOUGH_STEPS:
            epochs = math.ceil(ENOUGH_STEPS * self.training.epochs / self.steps)
            remedy = f"give more {words['epochs']} ({epochs} make {ENOUGH_STEPS} steps) or a larger {words['lr']}"
        else:
            remedy = f"give another {words['lr']}; if none helps, the features hold nothing that a linear head can read"
        kept = f" ({words['overwrite']} keeps the features)" if "overwrite" in words else ""
        return [found + remedy + kept]

    def by_layer(self) -> dict[str, float]:
        """Layer -> score, as ``layerwise_probe_results.json`` has it."""
        return {str(i): float(score) for i, score in enumerate(self.scores)}

    def to_dict(self, words: Mapping[str, str] = WORDS) -> dict[str, Any]:
        """What ``layerwise_probe_details.json`` holds; ``words`` are those of :meth:`warned`."""
        return {
            "task": self.task,
            "scores": self.by_layer(),
            "scores_ci95": {str(i): [float(v) for v in pair] for i, pair in enumerate(self.intervals)},
            "scores_by_seed": {str(seed): row.tolist() for seed, row in zip(self.seeds, self.by_seed)},
            "baseline": self.baseline,
            "training": {**dataclasses.asdict(self.training), "steps": self.steps},
            "train_loss": {str(i): float(loss) for i, loss in enumerate(self.train_loss)},
            "constant_loss": self.constant_loss,
            "feature_rms": {str(i): float(size) for i, size in enumerate(self.feature_rms)},
            "warnings": self.warned(words),
            "forward_passes": self.forward_passes,
            "num_samples_skipped": sum(map(len, self.skipped.values())),
            "skipped": self.skipped,
            **self.sizes,
            "metadata": dict(self.metadata),
        }

    def records(self) -> list[dict[str, Any]]:
        """A record per validation sample: ``key``, its id, and ``right``, the share of seeds by layer."""
        return [{"key": name, "right": row.tolist()} for name, row in self.by_sample.items()]

    def to_pandas(self) -> DataFrame:
        """A row per layer: score, ends of its interval, losses, size of its features, whether its head has learned."""
        rows = zip(self.scores, self.intervals, self.train_loss, self.feature_rms)
        return data_frame(
            {
                "layer": layer,
                "score": score,
                "low": low,
                "high": high,
                "train_loss": loss,
                "constant_loss": self.constant_loss,
                "feature_rms": rms,
                "learned": layer not in self.unlearned,
            }
            for layer, (score, (low, high), loss, rms) in enumerate(rows)
        )

    def save(self, folder: str | Path) -> Path:
        """Writes ``layerwise_probe_results.json``, ``layerwise_probe_details.json`` and ``samples.jsonl``; the folder.
        ``ArgumentError`` if anything lies there."""
        path = new_folder(folder)
        write_files(self, path, WORDS)
        write_text(path / SAMPLES, "".join(map(to_line, self.records())))
        return path

    def plot(self, path: str | Path | None = None) -> Figure:
        """Figure 5: scores by layer with their intervals, and the baseline."""
        layers = range(len(self.scores))
        figure = new_figure(6.4, 3.6)
        axes = figure.add_subplot()
        axes.fill_between(layers, *self.intervals.T, alpha=0.2, label="95 % interval over pictures")
        axes.plot(layers, self.scores, marker="o", markersize=3, label=f"mean of {len(self.by_seed)} seeds")
        if self.unlearned:
            axes.plot(self.unlearned, self.scores[self.unlearned], "rx", label="head has not learned")
        constant = "median box" if self.task == "grounding" else "most frequent class"
        axes.axhline(self.baseline, color="grey", linestyle="--", linewidth=1, label=f"{constant}, no features")
        axes.set_xlabel("decoder layer")
        axes.set_ylabel(f"share with IoU ≥ {RIGHT_IOU}" if self.task == "grounding" else "accuracy")
        axes.set_ylim(0, 1)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.legend(frameon=False)
        return written(figure, path)


def write_files(results: ProbeResults, folder: Path, words: Mapping[str, str]) -> None:
    """Layer -> score, and the details, beside the records."""
    write_json(folder / RESULTS, results.by_layer())
    write_json(folder / DETAILS, results.to_dict(words))


def read_results(folder: str | Path) -> ProbeResults:
    """What a finished folder of results holds."""
    found = read_json(Path(folder) / DETAILS)
    by_layer = lambda name: np.array(list(found[name].values()))
    training = dict(found["training"])
    steps = training.pop("steps")
    sizes = {f"{side}_{what}" for side in ("train", "validation") for what in ("samples", "pictures")}
    return ProbeResults(
        task=found["task"],
        training=HeadTraining(**training),
        seeds=tuple(map(int, found["scores_by_seed"])),
        scores=by_layer("scores"),
        intervals=by_layer("scores_ci95"),
        by_seed=by_layer("scores_by_seed"),
        by_sample={record["key"]: np.array(record["right"]) for record in read_lines(Path(folder) / SAMPLES)},
        baseline=found["baseline"],
        skipped=found["skipped"],
        forward_passes=found["forward_passes"],
        sizes={name: value for name, value in found.items() if name in sizes},
        train_loss=by_layer("train_loss"),
        constant_loss=found["constant_loss"],
        steps=steps,
        feature_rms=by_layer("feature_rms"),
        metadata=found["metadata"],
    )
