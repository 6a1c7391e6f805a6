"""``train``: fine-tuning of a model that the caller has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from sar_fast.base.errors import ArgumentError, arguments_named
from sar_fast.config import SARConfig
from sar_fast.lab.io.datasets import DatasetInfo, check_media_dir, find_datasets
from sar_fast.lab.io.output_dir import unwritable
from sar_fast.lab.io.records import Layout
from sar_fast.lab.training.arguments import Arguments, ControlArguments, DataArguments, SFTArguments, check
from sar_fast.lab.training.checkpoints import last_complete
from sar_fast.lab.training.learner import Learner
from sar_fast.lab.training.lending import lent
from sar_fast.lab.training.output_folder import earlier_run
from sar_fast.lab.training.results import TrainingResults, read_results
from sar_fast.lab.training.run import Inputs, build, run

RECORDS = "records"  # the name of a dataset that the caller has in memory
OWN = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "do_train", "do_eval", "gradient_analysis")
NAMES = {  # by those of the command
    "custom_trainer": "control",
    "model_name_or_path": "model",
    "output_dir": "folder",
    "overwrite_output_dir": "overwrite",
    "resume_from_checkpoint": "resume",
}
SPLITTING = ("deepspeed", "fsdp", "fsdp_config", "parallelism_config")  # the caller's model would be in pieces after it


def train(
    model: nn.Module,
    processor: Any,
    dataset: str | Path | Sequence[Mapping[str, Any]],
    *,
    folder: str | Path,
    sar: SARConfig | None = None,
    eval_dataset: str | Path | Sequence[Mapping[str, Any]] | None = None,
    control: Mapping[str, Any] | None = None,
    gradient_sparsity: bool = False,
    arguments: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    packing: bool = False,
    dataset_dir: str | Path | None = None,
    media_dir: str | Path | None = None,
    max_samples: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> TrainingResults:
    """Fine-tune a model in place, with SAR or without, on the Hugging Face Trainer (docs/training.md).

    The same as ``experiments/train.py``. What requires gradients is trained: freeze parts, or wrap the model with PEFT,
    before the call. SAR is on it while it trains and is off afterwards, unless it was on before; a ``sar.weighting``
    with parameters is trained with the model, and is the caller's object. The model comes back on the Trainer's device,
    in the modes that it had.

    Args:
        model: of transformers, of a supported family, PEFT-wrapped or not. processor: its processor.
        dataset: chat records with images (docs/training.md#data) as dictionaries, whose pictures may be Pillow's;
            or names of a registry with commas, or files.
        folder: for the model, checkpoints, logs and metadata.
        sar: SAR while training. None: the model as it is, with the SAR that may be on it.
        eval_dataset: scored at the end, and while training as ``arguments`` say.
        control: the control group's contrastive loss (section 3.3): options of
            :class:`~.visual_supervision.VisualSupervision`, ``{}`` for its defaults. None: without it.
        gradient_sparsity: measure the gradients of queries and keys (section 3.2).
        arguments: fields of ``transformers.TrainingArguments``, ``{"learning_rate": 1e-5, "max_steps": 100}``, and of
            this package's: ``gradient_analysis_steps``, ``plot_loss``, ``log_throughput``.
        max_length: most tokens of a sample; longer ones are left out. packing: a micro-batch's samples in one row.
        dataset_dir, media_dir: where the registry is, and where pictures' paths start. max_samples: of each dataset.
        resume: go on from the newest whole checkpoint in the folder, if there is one. The run must be the same.
        overwrite: replace an earlier run in the folder, once this one has a whole save.

    Returns:
        Metrics, log, gradient sparsity, metadata, as the folder holds them; on every process of a launch.

    Raises:
        ArgumentError: an argument that cannot be, before anything is changed or written; a folder of another run.
        ValueError: fields that do not go together; a bad record, which is named.
        ImportError: a tracker that ``report_to`` names is not installed.
    """
    learner = Learner.of(model, processor, sar)
    _check_folder(folder, resume, overwrite)
    places = {"dataset_dir": dataset_dir, "media_dir": media_dir, "max_samples": max_samples}
    sets = {"dataset": dataset, "eval_dataset": eval_dataset}
    found = {name: _infos(name, given, **places) if given is not None else [] for name, given in sets.items()}
    training = _training_arguments(
        arguments or {},
        output_dir=str(Path(folder).expanduser()),
        do_train=True,
        do_eval=eval_dataset is not None,
        gradient_analysis=gradient_sparsity,
        overwrite_output_dir=overwrite,
        resume_from_checkpoint="true" if resume else None,
    )
    options = Arguments(None, _data_arguments(found, max_length, packing, max_samples), _control(control), training)
    inputs = Inputs(learner, lambda: found["dataset"], lambda: found["eval_dataset"])
    with lent(model, training.gradient_checkpointing):
        with arguments_named(NAMES):
            check(options)
            trainer, checkpoint = build(options, inputs)
        run(trainer, options, checkpoint, want_weights=True)
    if dist.is_initialized():
        dist.barrier()
    return read_results(training.output_dir)


def _check_folder(folder: str | Path, resume: bool, overwrite: bool) -> None:
    """``ArgumentError`` for a folder that cannot be written into, or that holds a run that is not to be touched."""
    path = Path(folder).expanduser()
    if (why := unwritable(path)) is not None:
        raise ArgumentError("folder", f"{str(folder)!r}: {why}", "be a folder to write into")
    if resume and overwrite:
        raise ArgumentError("overwrite", overwrite, "be False with {resume}")
    old = earlier_run(path)
    if old and not (resume or overwrite):
        raise ArgumentError(
            "folder", f"{str(folder)!r} with {old} of an earlier run", "be without one, or {resume} or {overwrite} True"
        )
    if old and resume and last_complete(path) is None:
        raise ArgumentError("resume", resume, f"be False: {folder} holds {old} of an earlier run, no whole checkpoint")


def _infos(
    name: str,
    given: Any,
    dataset_dir: str | Path | None,
    media_dir: str | Path | None,
    max_samples: int | None,
) -> list[DatasetInfo]:
    """Datasets by their names, or records as one; ``ArgumentError`` for what is neither."""
    folder, media = (None if path is None else Path(path) for path in (dataset_dir, media_dir))
    if max_samples is not None and max_samples < 1:
        raise ArgumentError("max_samples", max_samples, "be at least 1")
    if isinstance(given, (str, Path)):
        with arguments_named({"dataset": name}):
            return find_datasets(str(given), folder, media, max_samples)
    if not isinstance(given, Sequence) or not all(isinstance(row, Mapping) for row in given):
        raise ArgumentError(name, type(given).__name__, "be records as dictionaries, or names or files of datasets")
    if not given:
        raise ArgumentError(name, "none", "be at least one record")
    check_media_dir(media)
    rows = tuple(dict(row) for row in given)
    return [DatasetInfo(RECORDS, (), Layout(), media or Path(), num_samples=max_samples, rows=rows)]


def _training_arguments(given: Mapping[str, Any], **own: Any) -> SFTArguments:
    known = {field.name for field in dataclasses.fields(SFTArguments) if field.init}
    for name in given:
        if name in OWN:
            raise ArgumentError("arguments", name, f"be without {', '.join(OWN)}, which train sets itself")
        if name in SPLITTING:
            raise ArgumentError("arguments", name, "be without what splits a model; experiments/train.py loads its own")
        if name not in known:
            raise ArgumentError("arguments", name, "be fields of transformers.TrainingArguments")
    return SFTArguments(**given, **own)


def _data_arguments(
    found: Mapping[str, Sequence[DatasetInfo]], max_length: int | None, packing: bool, max_samples: int | None
) -> DataArguments:
    if max_length is not None and max_length < 1:
        raise ArgumentError("max_length", max_length, "be at least 1")
    names = {name: ",".join(info.name for info in infos) or None for name, infos in found.items()}
    return DataArguments(**names, max_length=max_length, packing=packing, max_samples=max_samples)


def _control(given: Mapping[str, Any] | None) -> ControlArguments:
    if given is None:
        return ControlArguments()
    known = [field.name for field in dataclasses.fields(ControlArguments) if field.name != "custom_trainer"]
    for name in given:
        if name not in known:
            raise ArgumentError("control", name, f"be a dictionary of {', '.join(known)}")
    return ControlArguments("control_sft", **given)
