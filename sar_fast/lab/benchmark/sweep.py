"""One benchmark under many settings of SAR, sharing what the settings share.

Every setting gets a folder like the one that a separate evaluation makes of it, with the same records, so that either
can continue the other's work. Only the time differs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from torch import nn

from sar_fast.config import SARConfig
from sar_fast.hf.branching import layer_passes
from sar_fast.lab.benchmark import evaluation
from sar_fast.lab.benchmark.asking import Asker, Asking, ask_all, cut_batches, pending
from sar_fast.lab.benchmark.figures import draw_figure_6
from sar_fast.lab.benchmark.questions import Questions, open_questions, task_of
from sar_fast.lab.benchmark.results import BenchmarkResults, read_results
from sar_fast.lab.benchmark.settings import Setting, grid, refuse_grid, settings_of, strongest
from sar_fast.lab.benchmark.tables import Table
from sar_fast.lab.benchmark.tasks import Record, Sample, Task
from sar_fast.lab.measure.timing import seconds_now
from sar_fast.lab.run.exports import data_frame, new_folder
from sar_fast.lab.run.results import ResultFolder, read_json, write_json
from sar_fast.lab.run.session import Session, folder_or_none, processes_of
from sar_fast.lab.run.subject import Subject
from sar_fast.lab.show.figures import written
from sar_fast.method.weighting import Weighting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUMMARY = "sweep.json"
COST = ("layer_passes", "seconds_per_batch", "speed_up", "compared_batches")


@dataclasses.dataclass(frozen=True)
class SweepResults:
    """The scores of one model on one benchmark under several settings of SAR.

    Attributes:
        summary: what ``sweep.json`` of the command has: ``settings``, a row of each (K, beta or rule, its scores), and
            what the sweep cost.
        results: setting -> its results, by the names of their folders.
    """

    summary: Mapping[str, Any] = dataclasses.field(repr=False)
    results: Mapping[str, BenchmarkResults]

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with a row per setting and its scores in columns."""
        rows = self.summary["settings"]
        inner = ("scores", "partial")
        return data_frame({**{n: v for n, v in row.items() if n not in inner}, **row["scores"]} for row in rows)

    def save(self, folder: str | Path) -> Path:
        """Write ``sweep.json`` and a folder per setting; the folder. ``ArgumentError`` if anything lies there."""
        path = new_folder(folder)
        for name, results in self.results.items():
            results.save(path / name)
        write_json(path / SUMMARY, self.summary)
        return path

    def plot(self, path: str | Path | None = None) -> Figure:
        """Figure 6: each score against K, a line per beta and rule; written as a picture if a path is given."""
        return written(draw_figure_6(self.summary["settings"]), path)


def sweep(
    model: nn.Module,
    processor: Any,
    task: str | type[Task] | Task,
    *,
    configs: Sequence[SARConfig | None] | None = None,
    k: Sequence[int] | None = None,
    beta: Sequence[float] | None = None,
    weightings: Sequence[str | Mapping[str, Any] | Weighting] | None = None,
    compare_batches: int = 0,
    data_dir: str | Path | None = None,
    split: str | None = None,
    folder: str | Path | None = None,
    overwrite: bool = False,
    batch_size: int = 8,
    scoring: str = "generate",
    max_new_tokens: int | None = None,
    max_samples: int | None = None,
    workers: int | None = None,
    seed: int = 42,
    **options: Any,
) -> SweepResults:
    """Score a model on a benchmark under several settings of SAR, as ``sar-fast sweep``; what they share runs once.

    Args:
        model, processor, task: as of :func:`~.evaluate.evaluate`. The SAR that may be on the model is back afterwards.
        configs: the settings; None among them is the model without SAR. They have one ``prior_source``.
        k, beta, weightings: every K with every beta and every rule, in place of ``configs``; 0 is the model without
            SAR. Rules as ``SARConfig`` takes them, or as ``find_weighting`` finds them. Without both beta is 0.5.
        compare_batches: also answer so many batches setting by setting, and keep how long both take.
        data_dir, split, folder, overwrite, batch_size, scoring, max_new_tokens, max_samples, workers, seed, options:
            as of ``evaluate``; ``folder`` gets a folder per setting, and ``sweep.json``.

    Returns:
        Every setting's results, equal to those of ``evaluate``, on every process of a launch.

    Raises:
        ArgumentError: an argument that does not fit, before anything is written or asked.
        UnsupportedModelError: of a family that SAR does not know.
    """
    asking = Asking(scoring, max_new_tokens, batch_size, workers, seed)
    if configs is None:
        configs = grid(model, k, beta, weightings)
    else:
        refuse_grid(k=k, beta=beta, weightings=weightings)
    settings = settings_of(configs, compare_batches)
    subject = Subject.of(model, processor, strongest(model, settings))
    asked = task_of(task, options, subject)
    state = processes_of(model)
    with folder_or_none(folder, overwrite, state) as place:
        questions = open_questions(asked, asking, data_dir=data_dir, split=split, max_samples=max_samples)
        configuration = {**questions.settings({}, asking), "batch_size": batch_size, "workers": workers}
        session = Session(configuration, state, seed=seed, overwrite=overwrite)
        run(subject, settings, questions, asking, session, place, compare_batches)
        state.wait_for_everyone()
        results = {setting.folder: read_results(asked, place / setting.folder) for setting in settings}
        return SweepResults(read_json(place / SUMMARY), results)


def run(
    subject: Subject,
    settings: Sequence[Setting],
    questions: Questions,
    asking: Asking,
    session: Session,
    path: Path,
    compare_batches: int = 0,
) -> dict[str, Any]:
    """Answer, score and compare all settings; what ``sweep.json`` holds, on the main process, ``{}`` on the others.

    Args:
        subject: the model, with SAR on it when it is opened, whatever K.
        path: the folder in which every setting has one.
    """
    task, table, model = questions.task, questions.table, subject.settings()
    folders = [session.open(path / s.folder, questions.settings({**model, "sar": s.sar}, asking)) for s in settings]
    answered = [folder.records() for folder in folders]
    in_all = {key: True for key in answered[0] if all(key in records for records in answered)}
    all_batches = cut_batches(questions.samples, table, asking.batch_size)
    batches = pending(all_batches, in_all)
    cost = known_cost(path, settings)
    with contextlib.ExitStack() as stack:
        ask, configs = None, [setting.config for setting in settings]
        if batches or compare_batches:
            ask = Asker(task, asking, stack.enter_context(subject.opened()))
            for config in configs:
                ask.handle.check_options(config)
        session.begin(f"{task.name}, {len(folders)} settings", len(questions.samples), sum(map(len, batches)))
        if ask is not None:
            session.note(sharing=ask.sharing)
            answer_batches(ask, configs, session.state, table, batches, folders, answered)
            if compare_batches and session.state.is_main_process:
                cost |= compare(ask, configs, table, all_batches[:compare_batches])
            branched, separate = layer_passes(ask.handle, configs)
            cost["layer_passes"] = {"branched": branched, "separate": separate}
    if not session.worked():
        return {}
    rows = []
    for setting, folder in zip(settings, folders):
        scores = evaluation.finish(questions, folder)
        rows.append(setting.row() | {"scores": dict(task.headline(scores)), "partial": scores["partial"]})
    session.finish()
    summary = {"task": task.name, "settings": rows, **cost, "session": session.metadata}
    write_json(path / SUMMARY, summary)
    return summary


def known_cost(path: Path, settings: Sequence[Setting]) -> dict[str, Any]:
    """What an earlier session over the same settings measured."""
    known = path / SUMMARY
    before = read_json(known) if known.is_file() else {}
    same = [row["folder"] for row in before.get("settings", ())] == [setting.folder for setting in settings]
    return {name: before[name] for name in COST if same and name in before}


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
            began = seconds_now(ask.model.device)
            replies[name] = ways[name]()
            seconds[name].append(seconds_now(ask.model.device) - began)
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
