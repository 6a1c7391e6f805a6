"""What the study asks: groups of models, sets of questions, settings of SAR and the rules beside them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sar_fast.base.errors import ArgumentError
from sar_fast.config import SARConfig
from sar_fast.lab.miniature.places.checkpoint import SIDES
from sar_fast.lab.miniature.places.scenes import SIDE
from sar_fast.lab.paper.study.rules import ObjectHeads, RandomHeads, ShuffledHeads
from sar_fast.method.weighting import Equal, SoftmaxOverHeads

GROUPS = ("base", "sft", "control", "unbiased")
TREATED = "sft"  # the group that SAR is tried on
LAYERS = 8
BETAS = {"none": (0.01, 0.05, 0.1, 0.5), "standardize": (0.5, 1.0, 2.0, 5.0)}
PAPER = {"activation_layer_k": 3, "beta": 0.5}  # a third of the layers, as 10 of 28 to 32 in the paper
CHANCE_SEEDS = (0, 1, 2)  # of shuffled and random weights
VALIDATION, TEST = 1, 2  # first words of the seeds of the sets


@dataclasses.dataclass(frozen=True)
class Study:
    """What is run, and where.

    Args:
        models: folder with ``seed_N/GROUP`` for every seed and every one of ``GROUPS``.
        out: folder of the answers, ``study.json`` and the tables.
        validation, test: questions of every kind in each set of the two parts.
        pictures: pictures of which SFS and FI are measured, with one object each.
        sides: pictures' sides in pixels.

    ``ArgumentError`` names what does not fit, ``FileNotFoundError`` a model that is not there.
    """

    models: Path
    out: Path
    validation: int = 100
    test: int = 300
    pictures: int = 100
    sides: tuple[int, ...] = tuple(SIDES)

    def __post_init__(self) -> None:
        for name in ("validation", "test", "pictures"):
            if getattr(self, name) < 8:
                raise ArgumentError(name, getattr(self, name), "be at least 8")
        if SIDE not in self.sides or not set(self.sides) <= set(SIDES):
            raise ArgumentError("sides", self.sides, f"be {SIDE} and others of {', '.join(map(str, SIDES))}")
        if not self.seeds:
            raise FileNotFoundError(f"models is {self.models}, needed a folder with seed_0, seed_1, ...")
        for seed, group in itertools.product(self.seeds, GROUPS):
            if not (self.model(seed, group) / "config.json").is_file():
                raise FileNotFoundError(f"{self.model(seed, group)} has no model; train it, or remove {seed}")

    @property
    def seeds(self) -> list[str]:
        """Names of the folders of the training seeds."""
        return sorted(path.name for path in self.models.glob("seed_*") if path.is_dir())

    def model(self, seed: str, group: str) -> Path:
        return self.models / seed / group


def grid() -> dict[str, SARConfig]:
    """Settings that are compared on the validation questions, by name; all with running means at decode steps."""
    found = {}
    for k, (normalize, betas), prior in itertools.product(
        (2, 4, 6, LAYERS), BETAS.items(), ("vision_layer", "projected")
    ):
        for beta in betas:
            config = SARConfig(activation_layer_k=k, beta=beta, normalize=normalize, prior_source=prior)
            found[name_of(config)] = config
    return found


def name_of(config: SARConfig) -> str:
    """A setting of the paper's rule in words that a file can be called by."""
    parts = (f"k{config.activation_layer_k}", f"beta{config.beta:g}", config.normalize, config.prior_source)
    return "_".join([*parts, *([] if config.decode == "running" else [config.decode])])


def decodes(chosen: SARConfig) -> dict[str, SARConfig]:
    """A setting with each treatment of decode steps, which only answers of several tokens can tell apart."""
    return {name_of(c): c for c in (chosen.replace(decode=decode) for decode in ("running", "step", "prompt"))}


def rules(chosen: SARConfig) -> dict[str, SARConfig]:
    """What a setting is compared with on the test questions: the same spread of weights by chance, and by an oracle."""
    rule = SoftmaxOverHeads(chosen.beta, chosen.protect_first_head, chosen.normalize)
    others: Mapping[str, Any] = {
        "equal": Equal(),
        **{f"shuffled_{seed}": ShuffledHeads(rule, seed) for seed in CHANCE_SEEDS},
        **{f"random_{seed}": RandomHeads(rule, seed) for seed in CHANCE_SEEDS},
        "oracle": ObjectHeads(rule),
        "oracle_standardized": ObjectHeads(SoftmaxOverHeads(1.0, False, "standardize")),
    }
    return {name: chosen.replace(weighting=other) for name, other in others.items()}
