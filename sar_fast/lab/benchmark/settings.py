"""The settings of a sweep: SAR's options, with the names of their folders and the rows of their tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sar_fast.base.errors import ArgumentError
from sar_fast.base.scalars import is_integer
from sar_fast.config import PAPER_OPTIONS, SARConfig
from sar_fast.hf.features import handle_of
from sar_fast.hf.structure import unwrap
from sar_fast.lab.benchmark.figures import shortest
from sar_fast.lab.run.rules import config_settings, rule_slug
from sar_fast.lab.run.sar_flags import find_rule
from sar_fast.method.weighting import Weighting

SHOWN = ("activation_layer_k", "beta", "weighting")  # in every row; the others where the settings differ in them


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of a sweep.

    Attributes:
        folder: the name of its folder.
        config: SAR's options; K = 0 is the model without SAR.
        sar: what its results keep of them; None without SAR.
        beta, weighting: as its row names them, None without SAR.
        options: further ones, where the settings differ in them.
    """

    folder: str
    config: SARConfig
    sar: Mapping[str, Any] | None
    beta: float | None = None
    weighting: str | Mapping[str, Any] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Its part of ``sweep.json``, less the scores."""
        row = {"k": self.config.activation_layer_k, "beta": self.beta, "weighting": self.weighting}
        return {**row, **({"options": dict(self.options)} if self.options else {}), "folder": self.folder}


def grid(
    model: nn.Module,
    k: Sequence[int] | None,
    beta: Sequence[float] | None,
    weightings: Sequence[str | Mapping[str, Any] | Weighting] | None,
) -> list[SARConfig | None]:
    """Every K with every beta, then every rule; without both, with beta 0.5. K = 0 is None. In order of K, then beta.

    ``ArgumentError``: K is missing, a value comes twice, or nothing but K = 0 is there beside a beta or a rule.
    """
    counts, betas, specs = ([] if values is None else [*values] for values in (k, beta, weightings))
    if not counts or len(set(counts)) != len(counts):
        raise ArgumentError("k", k, "be one or more different numbers of layers; or give {configs}")
    if not any(counts) and (betas or specs):
        raise ArgumentError("k", k, "be more than 0 somewhere beside {beta} or {weightings}")
    if beta is None and weightings is None:
        betas = [PAPER_OPTIONS["beta"]]
    rules: list[dict[str, Any]] = [{"beta": value} for value in sorted(betas)]
    for spec in specs:
        named = isinstance(spec, str | Mapping)
        rules.append({"weighting": find_rule(spec, unwrap(model).config) if named else spec})
    found: list[SARConfig | None] = [None] if 0 in counts else []
    return found + [SARConfig(activation_layer_k=n, **rule) for n in sorted(counts) if n for rule in rules]


def refuse_grid(**values: Any) -> None:
    """``ArgumentError`` for a value of a grid beside the settings themselves."""
    for name, value in values.items():
        if value is not None:
            raise ArgumentError(name, value, "be left out with {configs}")


def settings_of(configs: Sequence[SARConfig | None], compare_batches: int = 0) -> list[Setting]:
    """The settings of a sweep over ``configs``; None, like K = 0, is the model without SAR.

    ``ArgumentError``: none, something else than a config, two that are the same, or of several prior sources.
    """
    if not is_integer(compare_batches) or compare_batches < 0:
        raise ArgumentError("compare_batches", repr(compare_batches), "be a whole number, at least 0")
    for config in configs:
        if config is not None and not isinstance(config, SARConfig):
            raise ArgumentError("configs", type(config).__name__, "be SARConfigs, or None for the model without SAR")
    weighed = [config for config in configs if config is not None]
    if len({config.prior_source for config in weighed}) > 1:
        raise ArgumentError("configs", "several", "be of one prior_source")
    plain = (weighed[0] if weighed else SARConfig()).replace(activation_layer_k=0)
    varied = [f.name for f in dataclasses.fields(SARConfig) if f.name not in SHOWN and _differs(f.name, weighed)]
    settings = [_setting(config, plain, varied) for config in configs]
    if not settings or len({setting.folder for setting in settings}) != len(settings):
        raise ArgumentError("configs", [s.folder for s in settings], "be one or more different settings")
    return settings


def _differs(name: str, configs: Sequence[SARConfig]) -> bool:
    """Whether configs that have an option differ in it."""
    values = [getattr(config, name) for config in configs if config.activation_layer_k]
    return len({repr(value) for value in values if value is not None}) > 1


def _setting(config: SARConfig | None, plain: SARConfig, varied: Sequence[str]) -> Setting:
    if config is None or config.activation_layer_k == 0:
        return Setting("k0", plain, None)
    options = {name: getattr(config, name) for name in varied if getattr(config, name) is not None}
    sar = config_settings(config)
    rule = config.to_dict().get("weighting")
    name = f"beta{shortest(config.beta)}" if rule is None else rule_slug(rule)
    folder = "_".join([f"k{config.activation_layer_k}", name, *(f"{n}-{value}" for n, value in options.items())])
    return Setting(folder, config, sar, config.beta, rule, options)


def strongest(model: nn.Module, settings: Sequence[Setting]) -> SARConfig | None:
    """SAR for a model that is opened for a sweep: the largest K, which has to fit; None if the model has SAR on it."""
    if handle_of(unwrap(model).base_model) is not None:
        return None
    return max((setting.config for setting in settings), key=lambda config: config.activation_layer_k)
