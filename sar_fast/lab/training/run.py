"""A training from its arguments, data and model to what is kept beside its results."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import Trainer, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from sar_fast.base import json_text
from sar_fast.base.errors import ArgumentError, arguments_named
from sar_fast.hf.families import packable_model_types
from sar_fast.hf.structure import unwrap
from sar_fast.lab.io.datasets import DatasetInfo, find_datasets
from sar_fast.lab.run.run_metadata import commit, versions
from sar_fast.lab.training.arguments import Arguments
from sar_fast.lab.training.checkpoints import forget_replaced
from sar_fast.lab.training.data import (
    CONCAT,
    Collator,
    encode_dataset,
    load_records,
    training_dataset,
    training_stream,
)
from sar_fast.lab.training.encoding import Encoder
from sar_fast.lab.training.gradients import GradientSparsityCallback
from sar_fast.lab.training.learner import Learner
from sar_fast.lab.training.output_folder import move_aside
from sar_fast.lab.training.plots import plot_loss
from sar_fast.lab.training.resume import check_same_run, find_checkpoint, is_finished, run_settings
from sar_fast.lab.training.rules import learns_from_statistics
from sar_fast.lab.training.run_config import RunConfigCallback
from sar_fast.lab.training.throughput import ThroughputCallback
from sar_fast.lab.training.trainer_checks import check_optimizer, check_packages, check_trackers
from sar_fast.lab.training.trainers import ControlSFTTrainer, SFTTrainer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The model and the datasets of a run: those that flags name, or the caller's own.

    Attributes:
        learner: the model. train, evaluation: find the datasets.
    """

    learner: Learner
    train: Callable[[], list[DatasetInfo]]
    evaluation: Callable[[], list[DatasetInfo]]

    @classmethod
    def named(cls, arguments: Arguments) -> Inputs:
        """Those that the flags name."""
        data = arguments.data
        folder, media = (Path(path) if path else None for path in (data.dataset_dir, data.media_dir))

        def find(name: str) -> list[DatasetInfo]:
            with arguments_named({"dataset": name}):
                return find_datasets(getattr(data, name), folder, media, data.max_samples)

        return cls(Learner.named(arguments), lambda: find("dataset"), lambda: find("eval_dataset"))


def build(arguments: Arguments, inputs: Inputs | None = None) -> tuple[Trainer, str | None]:
    """The Trainer, and the checkpoint to resume from. Everything that can be wrong with the input is found here.

    ``inputs``: model and data; by default those that the arguments name.
    """
    inputs = Inputs.named(arguments) if inputs is None else inputs
    training, data, learner = arguments.training, arguments.data, inputs.learner
    check_packages(arguments)
    check_trackers(training)
    learner.check()
    checkpoint = find_checkpoint(arguments, learner.places()) if training.do_train else None
    infos = inputs.train() if training.do_train else []
    settings = run_settings(arguments, infos, learner.settings()) if training.do_train else None
    if checkpoint is not None:
        check_same_run(settings, checkpoint)
    set_seed(training.seed)
    processor = learner.processor()
    encoder = Encoder(processor, data.max_length, data.too_long)
    train = _dataset(arguments, infos, encoder) if training.do_train else None
    if settings is not None:
        content = getattr(train, "stamps", {})  # a stream is not read yet
        settings |= {f"content of the {what}": stamps for what, stamps in content.items()}
        if checkpoint is not None:
            check_same_run(settings, checkpoint)
    evaluation = None
    if training.do_eval:
        evaluation = _dataset(arguments, inputs.evaluation(), encoder, evaluation=True)
    model = learner.model()
    needs_blank = needs_pictures(model)
    if data.packing:
        check_packing(model, needs_blank)
    tokenizer = encoder.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options: dict[str, Any] = {
        "model": model,
        "args": training,
        "run_settings": settings,
        "train_dataset": train,
        "eval_dataset": evaluation,
        "processing_class": processor,
        "data_collator": Collator(pad, packing=data.packing, blank=encoder.blank_image() if needs_blank else None),
    }
    if arguments.control.custom_trainer == "control_sft":
        control = {k: v for k, v in vars(arguments.control).items() if k != "custom_trainer"}
        trainer: Trainer = ControlSFTTrainer(**options, **control)
    else:
        trainer = SFTTrainer(**options)
    if training.do_train:
        check_optimizer(trainer)
    trainer.add_callback(RunConfigCallback(trainer, arguments.to_dict()))
    if training.do_train and training.gradient_analysis:
        trainer.add_callback(GradientSparsityCallback(trainer, training.steps_between(training.logging_steps)))
    if training.log_throughput:
        trainer.add_callback(ThroughputCallback(trainer, training.peak_flops))
    return trainer, checkpoint


def run(trainer: Trainer, arguments: Arguments, checkpoint: str | None, want_weights: bool = False) -> None:
    """Train and evaluate, as asked; write model, metrics, figures and metadata into the output folder.

    A run that had finished is not run again: its model and results stay as they are, and its weights are read where
    they are wanted.
    """
    training = arguments.training
    output = Path(training.output_dir)
    finished = is_finished(checkpoint, output)
    prepare_folder(trainer, arguments, checkpoint)
    if finished:
        logger.info("the run had finished at %s: its model and results stay as they are", checkpoint)
    if training.do_train and (not finished or training.do_eval or want_weights):
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if not finished:
            save_run(trainer, result.metrics)
    if training.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


def prepare_folder(trainer: Trainer, arguments: Arguments, checkpoint: str | None) -> None:
    """Make room in the output folder, if that is asked, and write ``run_metadata.json``; ranks wait for each other."""
    training = arguments.training
    output = Path(training.output_dir)
    if training.should_save and training.do_train and training.overwrite_output_dir and checkpoint is None:
        aside = move_aside(output)
        if aside is not None:
            logger.info("an earlier run was moved to %s, and is deleted after the first whole save of this one", aside)
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        write_metadata(output / "run_metadata.json", run_metadata(arguments), checkpoint)
    if dist.is_initialized():
        dist.barrier()


def write_metadata(path: Path, metadata: dict[str, Any], checkpoint: str | None) -> None:
    """A new run's metadata, or, after a resume, one more of the list ``resumed`` in what the run began with."""
    if checkpoint is not None and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        before.setdefault("resumed", []).append({"checkpoint": checkpoint, **metadata})
        metadata = before
    path.write_text(json_text.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def save_run(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Model, state, results and figure of a run that has ended."""
    training = trainer.args
    output = Path(training.output_dir)
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    if training.should_save:
        forget_replaced(output)
    if training.plot_loss and trainer.is_world_process_zero():
        draw_loss(trainer, output / "training_loss.png")


def draw_loss(trainer: Trainer, path: Path) -> None:
    """``training_loss.png``; a run that logged no loss has none, and the log says so."""
    if not plot_loss(trainer.state.log_history, path):
        path.unlink(missing_ok=True)  # an earlier run's would pass for this one's
        logger.warning(
            "plot_loss: no loss to plot: %d steps, and one is logged every %g (logging_steps)",
            trainer.state.global_step,
            trainer.args.logging_steps,
        )


def needs_pictures(model: nn.Module) -> str:
    """Why every batch must have a picture, or ''."""
    if is_deepspeed_zero3_enabled():
        return "with ZeRO-3"
    return "with a rule whose parameters learn from statistics" if learns_from_statistics(model) else ""


def check_packing(model: nn.Module, needs_blank: str = "") -> None:
    """``ValueError`` for a model whose rows must not hold several samples."""
    kind, packable = unwrap(model).config.model_type, packable_model_types()
    if kind not in packable:
        raise ArgumentError("packing", True, f"be False for {kind}; it is known to be right for {', '.join(packable)}")
    if needs_blank:
        instead = "; or use ZeRO-2" if "ZeRO" in needs_blank else ""
        raise ArgumentError(
            "packing",
            True,
            f"be False {needs_blank}: it has no place for the blank image of a batch without any{instead}",
        )


def run_metadata(arguments: Arguments) -> dict[str, Any]:
    """Versions, command, seed and configuration, as stored in run_metadata.json."""
    return {
        "command": sys.argv,
        "versions": versions(),
        "commit": commit(),
        "seed": arguments.training.seed,
        "world_size": arguments.training.world_size,
        "configuration": arguments.to_dict(),
    }


def _dataset(arguments: Arguments, infos: Sequence[DatasetInfo], encoder: Encoder, evaluation: bool = False) -> Any:
    """The datasets as one; records of an evaluation come once each, in order."""
    data, training = arguments.data, arguments.training
    with training.main_process_first(desc="preparing data"):
        if evaluation and data.streaming:
            return encode_dataset(load_records(infos, streaming=True), encoder)
        seed = training.data_seed if training.data_seed is not None else training.seed
        mix = CONCAT if evaluation else data.mix()
        if data.streaming:
            return training_stream(infos, encoder, mix, seed, data.buffer_size, announce=training.process_index == 0)
        return training_dataset(infos, encoder, mix, seed, data.preprocessing_num_workers, data.cache_dir)
