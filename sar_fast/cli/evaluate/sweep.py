"""``sar-fast sweep``: flags of a sweep, and the settings that they stand for."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from sar_fast.base.errors import ArgumentError, arguments_named
from sar_fast.cli.evaluate.arguments import EvaluationArguments, sar_flags_given
from sar_fast.cli.evaluate.benchmark import asking_of, questions_of, report
from sar_fast.cli.evaluate.loading import FLAGS, sar_config_of, session_of, subject_of
from sar_fast.cli.evaluate.task_flags import parse_with_task, task_flags
from sar_fast.config import SARConfig
from sar_fast.lab.benchmark import sweep
from sar_fast.lab.benchmark.figures import FIGURE, draw_figure_6, shortest
from sar_fast.lab.benchmark.settings import Setting
from sar_fast.lab.io.output_dir import check_output_dir
from sar_fast.lab.run.results import RESULTS, read_json
from sar_fast.lab.run.rules import canonical, rule_settings, rule_slug
from sar_fast.lab.run.sar_flags import check_rule, naming_flags
from sar_fast.lab.show.figures import written

logger = logging.getLogger(__name__)

_DEFAULTS = {
    f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    for f in dataclasses.fields(EvaluationArguments)
    if f.init
}

_DEFAULT_BETA = 0.5
_VARIED = ("use_sar", "sar_activation_layer_k", "sar_beta", "sar_weighting")
_FLAGS = {"activation_layer_k": "k", "beta": "beta", "weighting": "weighting"}  # that vary them


class _Setting(EvaluationArguments):
    """One setting of a sweep, whose errors name the sweep's flags."""

    sar_flag_names: ClassVar[dict[str, str]] = _FLAGS


@dataclasses.dataclass
class SweepArguments(EvaluationArguments):
    """A benchmark's arguments, with several values of K, and of beta or the rule, in place of one."""

    sar_flag_names: ClassVar[dict[str, str]] = _FLAGS

    k: list[int] = dataclasses.field(
        default_factory=lambda: [0, 5, 10, 15], metadata={"help": "Values of K; 0 is the model without SAR."}
    )
    beta: list[float] = dataclasses.field(
        default_factory=list, metadata={"help": "Values of beta. Default: 0.5, or none with --weighting."}
    )
    weighting: list[str] = dataclasses.field(
        default_factory=list,
        metadata={
            "help": "Other rules (NAME, FILE.py:NAME, JSON, a folder): in place of --beta 0.5, or beside --beta."
        },
    )
    compare_batches: int = dataclasses.field(
        default=0, metadata={"help": "Also answer so many batches setting by setting, and print how long both take."}
    )

    def __post_init__(self) -> None:
        if not self.task:
            raise ArgumentError("task", self.task, "be given for a sweep")
        given = [*(["use_sar"] if self.use_sar else []), *sar_flags_given(self)]
        for name in _VARIED:
            if name in given:
                raise ArgumentError(
                    name, getattr(self, name), "be left out, as a sweep varies it: give {k} and {beta} or {weighting}"
                )
        self.sar_beta = None
        self._check_values()
        self.use_sar, self.sar_activation_layer_k = True, max(self.k)
        super().__post_init__()
        self.settings()

    def _check_values(self) -> None:
        """``ValueError`` for values that are none, come twice or change nothing."""
        for name in ("weighting", "beta"):
            if not any(self.k) and getattr(self, name) not in ([], [_DEFAULT_BETA]):
                raise ArgumentError(name, getattr(self, name), "be left out with {k} 0 alone, the model without SAR")
        self.beta = self.beta or ([] if self.weighting else [_DEFAULT_BETA])
        for name, needed in (("k", True), ("beta", not self.weighting)):
            values = getattr(self, name)
            if (needed and not values) or len(set(values)) != len(values):
                raise ArgumentError(name, values, "be one or more different values")
        if self.compare_batches < 0:
            raise ArgumentError("compare_batches", self.compare_batches, "be at least 0")
        with naming_flags(self.sar_flag_names):
            for k, beta in itertools.product(self.k, self.beta or [None]):
                SARConfig(activation_layer_k=k, beta=beta)
            for spec in self.weighting:
                SARConfig(weighting=check_rule(spec)).to_dict()
        if len(set(map(canonical, self.weighting))) != len(self.weighting):
            raise ArgumentError("weighting", ", ".join(self.weighting), "be different rules")
        if not self.beta and "sar_normalize" in sar_flags_given(self):
            raise ArgumentError(
                "sar_normalize", self.sar_normalize, "be left out with {weighting} alone; or add {beta}"
            )

    def settings(self) -> list[EvaluationArguments]:
        """The arguments of a separate run of every setting, in order of K, then beta, then the rules as given."""
        papers = {n: v for n, v in _DEFAULTS.items() if n in ("sar_beta", "sar_normalize")}
        rules = [(f"beta{shortest(beta)}", {"sar_beta": beta}) for beta in sorted(self.beta)]
        rules += [(rule_slug(spec), {**papers, "sar_weighting": spec}) for spec in self.weighting]
        plain = {"use_sar": False, **{n: v for n, v in _DEFAULTS.items() if n.startswith("sar_")}}
        found = [("k0", plain)] if 0 in self.k else []
        found += [
            (f"k{k}_{name}", {"sar_activation_layer_k": k, **rule}) for k in sorted(self.k) if k for name, rule in rules
        ]
        common = {name: getattr(self, name) for name in _DEFAULTS}
        return [
            _Setting(**{**common, **options, "output_dir": str(Path(self.output_dir) / folder)})
            for folder, options in found
        ]


def flags() -> list[tuple[str, str]]:
    """(name, what it does) of every flag that a sweep takes, its own first."""
    unfit = (*_VARIED, "dataset", "dataset_dir", "media_dir")
    fields = [field for field in dataclasses.fields(SweepArguments) if field.init and field.name not in unfit]
    other = ("do_", "gd_", "sam_", "focus_", "layerwise_", "probe_")  # of the analyses
    ours = sorted(fields, key=lambda field: field.name in _DEFAULTS)
    return [*((f.name, f.metadata["help"]) for f in ours if not f.name.startswith(other)), *task_flags().items()]


def parse(argv: Sequence[str]) -> SweepArguments:
    """Arguments from a command line; ``ValueError`` for a bad one."""
    arguments = parse_with_task(SweepArguments, argv)
    with arguments_named({"output_dir": "--output_dir"}):
        check_output_dir(arguments.output_dir)
    return arguments


@arguments_named({**FLAGS, "compare_batches": "--compare_batches"})
def run(arguments: SweepArguments) -> dict[str, Any]:
    """Answer, score and compare all settings, and draw ``figure6.png``; what ``sweep.json`` holds, on the main process,
    ``{}`` on the others."""
    session = session_of(arguments)
    subject = subject_of(arguments, session.state)
    asking = asking_of(arguments)
    questions = questions_of(arguments, subject, asking)
    settings, path = settings_of(arguments), Path(arguments.output_dir)
    summary = sweep.run(subject, settings, questions, asking, session, path, arguments.compare_batches)
    if not summary:
        return {}
    for setting in settings:
        report(questions.task, read_json(path / setting.folder / RESULTS), path / setting.folder)
    try:
        written(draw_figure_6(summary["settings"]), path / FIGURE)
    except ValueError as error:
        logger.warning("%s: %s", FIGURE, error)
    return summary


def settings_of(arguments: SweepArguments) -> list[Setting]:
    """The settings, a rule's for the model, which is not loaded; ``ValueError`` names a flag that does not fit it."""
    plain = arguments.sar_config().replace(activation_layer_k=0)
    found = []
    for one in arguments.settings():
        folder, spec = Path(one.output_dir).name, one.sar_weighting
        if not one.use_sar:
            found.append(Setting(folder, plain, None))
        elif spec is None:
            config = one.sar_config()
            found.append(Setting(folder, config, config.to_dict(), beta=one.sar_beta))
        else:
            config = sar_config_of(one)
            found.append(Setting(folder, config, rule_settings(spec, config), weighting=spec))
    return found
