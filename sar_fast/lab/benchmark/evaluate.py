"""``evaluate``: a benchmark, asked of a model that the caller has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from sar_fast.config import SARConfig
from sar_fast.lab.benchmark import evaluation
from sar_fast.lab.benchmark.asking import Asking
from sar_fast.lab.benchmark.questions import open_questions, task_of
from sar_fast.lab.benchmark.results import BenchmarkResults, read_results
from sar_fast.lab.benchmark.tasks import Task
from sar_fast.lab.run.session import Session, folder_or_none, processes_of
from sar_fast.lab.run.subject import Subject


def evaluate(
    model: nn.Module,
    processor: Any,
    task: str | type[Task] | Task,
    *,
    sar: SARConfig | None = None,
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
) -> BenchmarkResults:
    """Score a model on a benchmark, with or without SAR, as ``experiments/evaluate.py --task`` does.

    Args:
        model: of transformers, PEFT-wrapped or not, on the device and in the dtype that it is to run in. It is lent:
            afterwards it is as before, training mode and SAR of its own included.
        processor: its processor, with a chat template; a copy of it pads on the left.
        task: a name ("mme", "pope", "refcoco", "refcoco+", "refcocog", "scienceqa", "mmbench", "textvqa", or one of
            ``register_task`` or of an installed package), a :class:`Task`, or a class of one.
        sar: SAR while the questions are asked. None: the model as it is, with the SAR that may be on it.
        data_dir: folder of the benchmark's parquet files; None = from the hub.
        split: None = the one that papers report.
        folder: where records go as they come; the same call continues it after an interruption. None: nothing is left
            on disk, except in the cache of ``datasets``. A rule needs a registered name in a folder alone.
        overwrite: delete the results of other settings in the folder.
        batch_size: samples per batch; those about one picture share its encoding.
        scoring: ``"generate"``, or ``"first_token"``: the most probable first token of the answers, nothing is decoded.
        max_new_tokens: the longest answer; None = the task's.
        max_samples: the first samples, and whatever is scored together with them.
        workers: processes that prepare batches; None = 4 for a model on a GPU, else 0.
        seed: of everything that is random, in all of this process.
        options: the task's own (``Task.Options``): ``prompt_suffix``; ``choice_format`` of ScienceQA and MMBench;
            ``box_format`` of RefCOCO.

    Returns:
        Scores, records and metadata; on every process of a launch, which share the samples between them.

    Raises:
        ArgumentError: an argument that does not fit, before anything is written or asked.
        FileNotFoundError, ConnectionError, ValueError: the data is not there, or not as the benchmark has it.
    """
    asking = Asking(scoring, max_new_tokens, batch_size, workers, seed)
    subject = Subject.of(model, processor, sar, lasting=folder is not None)
    asked = task_of(task, options, subject)
    state = processes_of(model)
    with folder_or_none(folder, overwrite, state) as place:
        questions = open_questions(asked, asking, data_dir=data_dir, split=split, max_samples=max_samples)
        configuration = {**questions.settings({}, asking), "batch_size": batch_size, "workers": workers}
        session = Session(configuration, state, seed=seed, overwrite=overwrite)
        evaluation.run(subject, questions, asking, session, place)
        state.wait_for_everyone()
        return read_results(asked, place)
