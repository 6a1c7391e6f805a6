"""Questions put to a model, batch by batch; those about one picture share what they have in common."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import transformers
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset

from sar_fast.base.errors import ArgumentError, check_choice
from sar_fast.base.scalars import is_integer
from sar_fast.config import SARConfig
from sar_fast.hf import apply_sar
from sar_fast.hf.branching import run_branches
from sar_fast.hf.shared_prefix import PromptGroups, SharedPrefix, sharing_of
from sar_fast.lab.benchmark.tables import Table
from sar_fast.lab.benchmark.tasks import Record, Sample, Task
from sar_fast.lab.benchmark.tasks.base import SCORINGS
from sar_fast.lab.io.answering import frames, generate, option_log_probabilities
from sar_fast.lab.io.chat_template import placeholder_in
from sar_fast.lab.io.processors import ProcessorRefusal
from sar_fast.lab.io.prompts import PromptFormat
from sar_fast.lab.io.records import RecordError
from sar_fast.lab.io.skips import PLACEHOLDER, REFUSED, UNREADABLE
from sar_fast.lab.run.progress import progress_bar
from sar_fast.lab.run.subject import Loaded

logger = logging.getLogger(__name__)

Replies = list[dict[str, Any]]
Prepared = tuple[list[Sample], list[Record], PromptGroups | None, list[Record]]


@dataclasses.dataclass(frozen=True)
class Asking:
    """How questions are put to a model.

    Args:
        scoring: ``"generate"``, greedy answers; or ``"first_token"``, the answer whose first token is most probable,
            without decoding.
        max_new_tokens: the longest answer; None = the task's. Only with ``"generate"``.
        batch_size: samples per batch.
        workers: processes that prepare batches; None = 4 for a model on a GPU, else 0.
        seed: of everything that is random.

    Raises:
        ArgumentError: a value out of range.
    """

    scoring: str = "generate"
    max_new_tokens: int | None = None
    batch_size: int = 8
    workers: int | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        check_choice("scoring", self.scoring, SCORINGS)
        for name, least in (("batch_size", 1), ("max_new_tokens", 1), ("workers", 0), ("seed", 0)):
            value = getattr(self, name)
            optional = value is None and name in ("max_new_tokens", "workers")
            if not optional and (not is_integer(value) or value < least):
                raise ArgumentError(name, repr(value), f"be a whole number, at least {least}")
        if self.scoring == "first_token" and self.max_new_tokens is not None:
            raise ArgumentError("max_new_tokens", self.max_new_tokens, "be left out with {scoring} first_token")

    def length(self, task: Task) -> int | None:
        """The longest answer in tokens; None where nothing is decoded."""
        return (self.max_new_tokens or task.max_new_tokens) if self.scoring == "generate" else None


def cut_batches(samples: Sequence[Sample], table: Table, size: int) -> list[list[Sample]]:
    """Batches of at most ``size`` samples. Those about one picture are together, in as few batches as can be.

    The same in every run: cut before it is known which samples are answered already.
    """
    by_picture: dict[str, list[Sample]] = {}
    for sample in samples:
        by_picture.setdefault(table.picture_key(sample.row), []).append(sample)
    batches: list[list[Sample]] = []
    for about in by_picture.values():
        for start in range(0, len(about), size):
            part = about[start : start + size]
            if not batches or len(batches[-1]) + len(part) > size:
                batches.append([])
            batches[-1] += part
    return batches


def pending(batches: Sequence[list[Sample]], answered: Mapping[str, Any]) -> list[list[Sample]]:
    """Batches with a sample that has no record."""
    return [batch for batch in batches if any(sample.key not in answered for sample in batch)]


class Batches(Dataset):
    """Prepared batches: (samples to ask, their records so far, prompts or None, records of those not to ask)."""

    def __init__(
        self, batches: Sequence[Sequence[Sample]], task: Task, table: Table, form: PromptFormat, together: bool
    ) -> None:
        self.batches, self.task, self.table, self.form, self.together = batches, task, table, form, together

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Prepared:
        return self._prepare(self.batches[index], {})

    def _prepare(self, samples: Sequence[Sample], refused: Mapping[str, str]) -> Prepared:
        """The batch without the samples of which the processor makes no prompt, key -> why."""
        asked, facts, unreadable = [], [], []
        pictures: list[Any] = []
        questions: list[list[str]] = []
        key = None  # of the last picture
        places: list[int] = []  # of the samples asked: which picture
        for sample in samples:
            fact = {**sample.about, "key": sample.key, "group": sample.group, "prompt": sample.prompt}
            same = key == self.table.picture_key(sample.row)
            try:
                picture = pictures[-1] if same else self.table.picture(sample.row)
            except RecordError as error:
                problem = (UNREADABLE, str(error))
            else:
                problem = self._problem(sample, picture, refused)
            if problem is not None:
                kind, reason = problem
                unreadable.append({**fact, "skipped": f"row {sample.row}: {reason}", "skipped_kind": kind})
                continue
            key = self.table.picture_key(sample.row)
            if same and self.together:
                questions[-1].append(sample.prompt)
            else:
                pictures.append(picture)
                questions.append([sample.prompt])
            asked.append(sample)
            places.append(len(pictures) - 1)
            facts.append({**fact, "image_size": list(picture.size)})
        if not asked:
            return [], [], None, unreadable
        try:
            groups = self.form.encode_groups(pictures, questions)
        except ProcessorRefusal:
            found = {s.key: self.form.refusal(pictures[place], s.prompt) for s, place in zip(asked, places)}
            found = {key: reason for key, reason in found.items() if reason is not None}
            if not found:
                raise
            return self._prepare(samples, found)
        seen = frames(groups.inputs, self.form.processor, len(pictures))
        for fact, place in zip(facts, places):
            fact["frame"] = seen[place]
        return asked, facts, groups, unreadable

    def _problem(self, sample: Sample, picture: Any, refused: Mapping[str, str]) -> tuple[str, str] | None:
        """(kind, reason) of what speaks against asking a sample; None if nothing does."""
        if objection := self.task.objection(sample, picture.size):
            return self.task.objects_to, objection
        if marker := placeholder_in(self.form.processor, sample.prompt):
            return PLACEHOLDER, f"the prompt has {marker!r}, which stands for a picture"
        return (REFUSED, refused[sample.key]) if sample.key in refused else None


class Asker:
    """A model that answers batches, under one setting of SAR or under several at once.

    Args:
        task, asking: what is asked, and how.
        loaded: a model of a family that SAR knows, or any other without SAR. Where prompts can share a prefix, one
            without SAR gets SAR with K = 0, which changes nothing: whoever opened it takes that off.

    Attributes:
        sharing: what prompts about one picture share on this model, as plain values for the run's metadata.
    """

    def __init__(self, task: Task, asking: Asking, loaded: Loaded) -> None:
        self.task, self.asking = task, asking
        self.model, self.processor, handle = loaded
        sharing = sharing_of(self.model)
        self.together = not sharing.pictures
        if handle is None and self.together:
            handle = apply_sar(self.model, SARConfig(activation_layer_k=0))
        self.handle, self.sharing = handle, sharing.describe()
        for what, how in self.sharing.items():
            logger.info("%s: %s", what, how)
        self._told = bool(sharing.prefix)

    def loader(self, batches: Sequence[Sequence[Sample]], table: Table) -> DataLoader:
        """The batches, prepared by ``asking.workers`` processes."""
        workers = self.asking.workers
        workers = (4 if self.model.device.type == "cuda" else 0) if workers is None else workers
        form = PromptFormat.of(self.model, self.processor)
        return DataLoader(Batches(batches, self.task, table, form, self.together), batch_size=None, num_workers=workers)

    def replies(self, asked: Sequence[Sample], groups: PromptGroups) -> Replies:
        """Answers under the setting that is in force."""
        if self.handle is None:
            return self._answer(asked, groups.to(self.model.device, self.model.dtype).inputs)
        return self.branched([self.handle.config], asked, groups)[0]

    def branched(self, configs: Sequence[SARConfig], asked: Sequence[Sample], groups: PromptGroups) -> list[Replies]:
        """Answers under each of several settings, which share their common layers."""
        groups = groups.to(self.model.device, self.model.dtype)
        prefix = SharedPrefix(self.handle, groups) if max(groups.counts) > 1 else None
        if prefix is not None and not prefix.shares and not self._told:
            logger.info("common prefix: once per prompt where %s", prefix.why_whole)
            self._told = True
        call: Callable[[], Replies] = lambda: self._answer(asked, groups.inputs if prefix is None else prefix.inputs())
        if len(configs) == 1 and (prefix is None or not prefix.shares):
            self.handle.reconfigure(configs[0])
            return [call()]
        return [replies for _, replies in run_branches(self.handle, configs, call, prefix)]

    def _answer(self, asked: Sequence[Sample], inputs: Any) -> Replies:
        """``reply`` of every sample, and ``log_probabilities`` where scoring compares first tokens."""
        length = self.asking.length(self.task)
        if length is not None:
            return [{"reply": reply} for reply in generate(self.model, self.processor, inputs, length)]
        options = [sample.options for sample in asked]
        found = []
        for option, log_p in zip(options, option_log_probabilities(self.model, self.processor, inputs, options)):
            names = [wordings[0] for wordings in option]
            best = names[max(range(len(log_p)), key=log_p.__getitem__)]
            found.append({"reply": best, "log_probabilities": dict(zip(names, log_p))})
        return found


def share_of_process(batches: Sequence[list[Sample]], state: PartialState) -> list[list[Sample]]:
    """This process's batches: neighbours, so that every process reads its own part of the files."""
    per_process = -(-len(batches) // state.num_processes)
    return list(batches[state.process_index * per_process : (state.process_index + 1) * per_process])


def ask_all(
    ask: Asker,
    state: PartialState,
    table: Table,
    batches: Sequence[list[Sample]],
    keep: Callable[[list[Sample], list[Record], PromptGroups | None, list[Record]], None],
) -> None:
    """Hand this process's share of the batches, prepared, to ``keep``, with a progress bar."""
    transformers.set_seed(ask.asking.seed)
    mine = share_of_process(batches, state)
    bar = progress_bar(sum(map(len, mine)), ask.task.name, here=state.is_main_process)
    with bar:
        for asked, facts, groups, unreadable in ask.loader(mine, table):
            keep(asked, facts, groups, unreadable)
            bar.update(len(facts) + len(unreadable))
