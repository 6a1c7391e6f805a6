"""What the paper in miniature runs: benchmarks, analyses, trainings, and where their results go."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from sar_fast.base.errors import ArgumentError
from sar_fast.config import SARConfig
from sar_fast.lab.io.model_source import MINIATURE, MINIATURE_PATH
from sar_fast.lab.run.results import read_json

LETTERLESS = ["--scoring", "first_token", "--choice_format", "cloze"]  # the miniature has never seen option letters
TASKS = {
    "mme": [],
    "pope": [],
    "refcoco": ["--box_format", "miniature"],
    "scienceqa": LETTERLESS,
    "mmbench": LETTERLESS,
    "textvqa": [],
}
MAIN = {  # the one score, in percent of right answers, that stands for a benchmark in a mean over them
    "pope": "mean accuracy",
    "refcoco": "accuracy at IoU 0.5",
    "scienceqa": "accuracy",
    "mmbench": "accuracy, circular",
    "textvqa": "accuracy",
}
ANALYSES = {
    "focus": ("SFS and FI", "sar_paper/analysis_sec4.3_sfs_fi_eval_mini.yaml"),
    "probe": ("Layer-wise probe", "sar_paper/analysis_sec6.3_layerwise_probe_mini.yaml"),
}
DATA = (".parquet", ".json", ".yaml")
FEWEST = 4  # samples of shapes_grounding with two pictures among them
TRAININGS = {
    "sft": "sar_paper/exp_sec3.2_grad_sparsity_sft_mini.yaml",
    "control": "sar_paper/exp_sec3.3_grad_sparsity_control_mini.yaml",
}


@dataclasses.dataclass(frozen=True)
class Paper:
    """What is run, and where its results go.

    Args:
        out: folder of all results.
        k, beta: SAR's setting in the tables.
        swept_k, swept_beta: the settings of the ablation.
        max_samples: first samples of every benchmark and analysis; None = all.
        epochs: of both trainings; None = the configurations' own.

    ``ValueError`` names an option that does not fit.
    """

    out: Path
    k: int = 2
    beta: float = 0.5
    swept_k: tuple[int, ...] = (0, 1, 2, 3, 4)
    swept_beta: tuple[float, ...] = (0.1, 0.5)
    max_samples: int | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        layers = read_json(MINIATURE_PATH / "config.json")["text_config"]["num_hidden_layers"]
        if not 1 <= self.k <= layers:
            raise ArgumentError("k", self.k, f"be 1 to {layers}, as many layers as the miniature has")
        if any(not 0 <= k <= layers for k in self.swept_k):
            raise ArgumentError("swept_k", self.swept_k, f"be 0 to {layers}, as many layers as the miniature has")
        for beta in (self.beta, *self.swept_beta):
            SARConfig(beta=beta)
        if self.max_samples is not None and self.max_samples < FEWEST:
            raise ArgumentError(
                "max_samples",
                self.max_samples,
                f"be at least {FEWEST}: the probe needs two pictures, which have several samples",
            )
        if self.epochs is not None and not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise ArgumentError("epochs", self.epochs, "be more than 0")

    @property
    def groups(self) -> dict[str, tuple[str, list[str]]]:
        """The compared models: name -> (weights, further flags)."""
        sar = ["--use_sar", "--sar_activation_layer_k", str(self.k), "--sar_beta", str(self.beta)]
        sft, control = str(self.out / "sft"), str(self.out / "control")
        return {
            "Base": (MINIATURE, []),
            "SFT": (sft, []),
            "SFT + SAR": (sft, sar),
            "Control": (control, []),
        }

    def folder(self, kind: str, group: str, *more: str) -> Path:
        """Where one group's results of one kind lie."""
        return self.out.joinpath(kind, group.lower().replace(" + ", "_"), *more)

    def limits(self) -> list[str]:
        """Flags that shorten an evaluation."""
        return [] if self.max_samples is None else ["--max_samples", str(self.max_samples)]
