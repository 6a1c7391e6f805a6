"""``sar-fast sweep``: one benchmark under many settings of K and beta or rule, sharing what the settings share.

Every setting gets a folder like the one that ``experiments/evaluate.py`` makes of it, with the same records, so that
either can continue the other's work. Only the time differs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from torch import nn

from sar_fast.cli.evaluate.arguments import EvaluationArguments, sar_flags_given
from sar_fast.cli.evaluate.loading import load, session_of
from sar_fast.config import SARConfig
from sar_fast.hf.branching import layer_passes
from sar_fast.lab.benchmark import evaluation as benchmark
from sar_fast.lab.benchmark.asking import Asker, ask_all, cut_batches, pending
from sar_fast.lab.benchmark.tables import Table
from sar_fast.lab.benchmark.tasks import Record, Sample
from sar_fast.lab.io.output_dir import check_output_dir
from sar_fast.lab.run.flags import parse_groups
from sar_fast.lab.run.results import ResultFolder, read_json, write_json
from sar_fast.lab.run.rules import canonical, rule_label, rule_slug
from sar_fast.lab.run.sar_flags import check_rule, naming_flags

logger = logging.getLogger(__name__)

_DEFAULTS = {
    f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    for f in dataclasses.fields(EvaluationArguments)
}

_DEFAULT_BETA = 0.5
_VARIED = ("use_sar", "sar_activation_layer_k", "sar_beta", "sar_weighting")
_FLAGS = {"activation_layer_k": "k", "beta": "beta", "weighting": "weighting"}  # that vary them
SUMMARY = "sweep.json"
COST = ("layer_passes", "seconds_per_batch", "speed_up", "compared_batches")
FIGURE = "figure6.png"
PANELS_IN_A_ROW = 4


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
            raise ValueError("a sweep needs --task")
        given = [*(["use_sar"] if self.use_sar else []), *sar_flags_given(self)]
        for name in _VARIED:
            if name in given:
                raise ValueError(f"--{name} is what a sweep varies; give --k and --beta or --weighting")
        self.sar_beta = None
        self._check_values()
        self.use_sar, self.sar_activation_layer_k = True, max(self.k)
        super().__post_init__()
        self.settings()

    def _check_values(self) -> None:
        """``ValueError`` for values that are none, come twice or change nothing."""
        for name in ("weighting", "beta"):
            if not any(self.k) and getattr(self, name) not in ([], [_DEFAULT_BETA]):
                raise ValueError(f"--{name} has no effect on --k 0, which is the model without SAR; leave it out")
        self.beta = self.beta or ([] if self.weighting else [_DEFAULT_BETA])
        for name, needed in (("k", True), ("beta", not self.weighting)):
            values = getattr(self, name)
            if (needed and not values) or len(set(values)) != len(values):
                raise ValueError(f"--{name} must be one or more different values; got {values}")
        if self.compare_batches < 0:
            raise ValueError(f"compare_batches must be at least 0; got {self.compare_batches}")
        with naming_flags(self.sar_flag_names):
            for k, beta in itertools.product(self.k, self.beta or [None]):
                SARConfig(activation_layer_k=k, beta=beta)
            for spec in self.weighting:
                SARConfig(weighting=check_rule(spec)).to_dict()
        if len(set(map(canonical, self.weighting))) != len(self.weighting):
            raise ValueError(f"--weighting must be different rules; got {', '.join(self.weighting)}")
        if not self.beta and "sar_normalize" in sar_flags_given(self):
            raise ValueError("--sar_normalize has no effect on --weighting alone; leave it out, or add --beta")

    def settings(self) -> list[EvaluationArguments]:
        """The arguments of a separate run of every setting, in order of K, then beta, then the rules as given."""
        papers = {n: v for n, v in _DEFAULTS.items() if n in ("sar_beta", "sar_normalize")}
        rules = [(f"beta{_shortest(beta)}", {"sar_beta": beta}) for beta in sorted(self.beta)]
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

    def configs(self, model: nn.Module) -> list[SARConfig]:
        """The settings as SAR's options on a model; K = 0 is the model without SAR."""
        plain = self.sar_config().replace(activation_layer_k=0)
        return [setting.sar_config(model.config) if setting.use_sar else plain for setting in self.settings()]


def _shortest(value: float) -> str:
    """The fewest digits that tell a number from all others: 0.5, 1, 0.50000001."""
    return repr(float(value)).removesuffix(".0")


def rule_of(row: Mapping[str, Any]) -> str:
    """A setting's rule as tables and figures name it, of a row of ``sweep.json``; empty without SAR."""
    if row.get("weighting") is not None:
        return rule_label(row["weighting"])
    return "" if row["beta"] is None else f"beta {_shortest(row['beta'])}"


def flags() -> list[tuple[str, str]]:
    """(name, what it does) of every flag that a sweep takes, its own first."""
    unfit = (*_VARIED, "dataset", "dataset_dir", "media_dir")
    fields = sorted(dataclasses.fields(SweepArguments), key=lambda field: field.name in _DEFAULTS)
    other = ("do_", "gd_", "sam_", "focus_", "layerwise_", "probe_")  # of the analyses
    return [(f.name, f.metadata["help"]) for f in fields if f.name not in unfit and not f.name.startswith(other)]


def parse(argv: Sequence[str]) -> SweepArguments:
    """Arguments from a command line; ``ValueError`` for a bad one."""
    (arguments,) = parse_groups((SweepArguments,), argv)
    check_output_dir(arguments.output_dir)
    return arguments


def run(arguments: SweepArguments) -> dict[str, Any]:
    """Answer, score and compare all settings; what ``sweep.json`` holds, on the main process, ``{}`` on the others."""
    session = session_of(arguments)
    task, scoring, table, samples, skips = benchmark.questions(arguments)
    settings = arguments.settings()
    folders = [session.open(s.output_dir, benchmark.settings_of(s, task, table, scoring)) for s in settings]
    answered = [folder.records() for folder in folders]
    in_all = {key: True for key in answered[0] if all(key in records for records in answered)}
    all_batches = cut_batches(samples, table, arguments.per_device_eval_batch_size)
    batches = pending(all_batches, in_all)
    known = Path(arguments.output_dir) / SUMMARY
    before = read_json(known) if known.is_file() else {}
    same = [row["folder"] for row in before.get("settings", ())] == [folder.path.name for folder in folders]
    timing = {name: before[name] for name in COST if same and name in before}
    ask, configs = None, []
    if batches or arguments.compare_batches:
        ask = Asker(arguments, task, scoring, *load(arguments, session.state))
        configs = arguments.configs(ask.model)
        for config in configs:
            ask.handle.check_options(config)
    session.begin(f"{task.name}, {len(folders)} settings", len(samples), sum(map(len, batches)))
    if ask is not None:
        session.note(sharing=ask.sharing)
        answer_batches(ask, configs, session.state, table, batches, folders, answered)
        if arguments.compare_batches and session.state.is_main_process:
            timing |= compare(ask, configs, table, all_batches[: arguments.compare_batches])
        passes = layer_passes(ask.handle, configs)
        timing["layer_passes"] = {"branched": passes[0], "separate": passes[1]}
    if not session.worked():
        return {}
    rows = []
    for setting, folder in zip(settings, folders):
        scores = benchmark.finish(task, samples, skips, folder)
        k = setting.sar_activation_layer_k if setting.use_sar else 0
        row = {"k": k, "beta": setting.sar_beta, "weighting": setting.sar_weighting, "folder": folder.path.name}
        rows.append(row | {"scores": dict(task.headline(scores)), "partial": scores["partial"]})
    session.finish()
    summary = {"task": task.name, "settings": rows, **timing, "session": session.metadata}
    write_json(Path(arguments.output_dir) / SUMMARY, summary)
    plot(summary, Path(arguments.output_dir) / FIGURE)
    return summary


def answer_batches(
    ask: Asker,
    configs: Sequence[SARConfig],
    state: PartialState,
    table: Table,
    batches: list[list[Sample]],
    folders: Sequence[ResultFolder],
    answered: Sequence[Mapping[str, Any]],
) -> None:
    """This process's share of the batches under every setting that misses one of their records."""
    with contextlib.ExitStack() as stack:
        parts = [stack.enter_context(folder.open_part(state.process_index)) for folder in folders]

        def keep(asked: list[Sample], facts: list[Record], groups: Any, unreadable: list[Record]) -> None:
            keys = [fact["key"] for fact in (*facts, *unreadable)]
            which = [i for i, records in enumerate(answered) if any(key not in records for key in keys)]
            found = ask.branched([configs[i] for i in which], asked, groups) if asked else [[] for _ in which]
            for index, replies in zip(which, found):
                parts[index].append([*({**fact, **reply} for fact, reply in zip(facts, replies)), *unreadable])

        ask_all(ask, state, table, batches, keep)


def compare(ask: Asker, configs: Sequence[SARConfig], table: Table, batches: list[list[Sample]]) -> dict[str, Any]:
    """Seconds for some batches, branched and setting by setting, taken in turns; their replies must agree."""
    seconds: dict[str, list[float]] = {"branched": [], "separate": []}
    for number, (asked, _, groups, _) in enumerate(ask.loader(batches, table)):
        if not asked:
            continue
        ways = {
            "branched": lambda: ask.branched(configs, asked, groups),  # noqa: B023
            "separate": lambda: [ask.branched([config], asked, groups)[0] for config in configs],  # noqa: B023
        }
        replies = {}
        for name in sorted(ways, reverse=bool(number % 2)):
            began = _clock(ask.model)
            replies[name] = ways[name]()
            seconds[name].append(_clock(ask.model) - began)
        if replies["branched"] != replies["separate"]:
            raise RuntimeError(
                f"batch {number}: branched settings answer otherwise than separate runs; please report it"
            )
    if not seconds["branched"]:
        raise ValueError("compare_batches: no batch has a readable picture")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds_per_batch": medians,
        "speed_up": medians["separate"] / medians["branched"],
        "compared_batches": len(seconds["branched"]),
    }


def _clock(model: nn.Module) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def plot(summary: Mapping[str, Any], path: Path) -> None:
    """Figure 6: each headline score against K, a line per beta and per rule; K = 0 is the model without SAR."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = summary["settings"]
    names = [n for n in rows[0]["scores"] if all(isinstance(row["scores"].get(n), int | float) for row in rows)]
    if not names:
        logger.warning("%s: no score is known under every setting; nothing is drawn", path.name)
        return
    columns = min(PANELS_IN_A_ROW, len(names))
    count = -(-len(names) // columns)
    figure, panels = plt.subplots(
        count, columns, figsize=(3.4 * columns, 3 * count), layout="constrained", squeeze=False, sharex=True
    )
    for axes in panels.flat[len(names) :]:
        axes.remove()
    base = next((row for row in rows if row["k"] == 0), None)
    for axes, name in zip(panels.flat, names):
        for rule in dict.fromkeys((row["beta"], row.get("weighting")) for row in rows if row["k"]):
            line = [row for row in rows if (row["beta"], row.get("weighting")) == rule]
            label, line = rule_of(line[0]), ([base] if base else []) + line
            axes.plot([row["k"] for row in line], [row["scores"][name] for row in line], "o-", label=label)
        if base:
            axes.axhline(base["scores"][name], color="grey", linewidth=0.8, linestyle="--", label="without SAR")
        part = rows[0].get("partial", {}).get(name)
        axes.set(title=f"{name}\n{part}" if part else name, xlabel="K, re-weighted layers")
        axes.tick_params(labelbottom=True)  # the panel below may be an empty place
    panels[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
