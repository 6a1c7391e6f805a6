"""Resuming: a resumed run is the run that was stopped, or an error that names what differs.

Every checkpoint holds the settings of its run (``run_settings.json``) and what has been added up until then
(``run_totals.json``), so that figures at the end are those of the whole run.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.io.chat_template import read_template
from sar_fast.lab.io.datasets import DatasetInfo
from sar_fast.lab.io.stamps import content_stamp
from sar_fast.lab.training.arguments import Arguments
from sar_fast.lab.training.checkpoints import SETTINGS, checkpoints, last_complete
from sar_fast.lab.training.output_folder import earlier_run

logger = logging.getLogger(__name__)

# Flags that a resumed run may change, as docs/training.md says; any other must be what it was.
# fmt: off
MAY_CHANGE = frozenset((
    # where it goes, and under which name
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name", "project", "report_to",
    "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "push_to_hub", "hub_token",
    "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
    # what is measured on the way
    "do_train", "do_eval", "do_predict", "eval_dataset", "eval_strategy", "eval_steps", "eval_delay",
    "per_device_eval_batch_size", "eval_batch_size", "prediction_loss_only", "eval_on_start", "eval_do_concat_batches",
    "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics",
    "bf16_full_eval", "fp16_full_eval", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    # what is kept and told
    "save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit",
    "enable_jit_checkpoint", "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node",
    "logging_nan_inf_filter", "include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm",
    "plot_loss", "gradient_analysis", "gradient_analysis_steps", "log_throughput", "peak_flops",
    "skip_memory_metrics", "debug",
    # where data lies, and who reads it
    "dataset_dir", "media_dir", "cache_dir", "preprocessing_num_workers", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order",
    # how it is computed
    "use_cpu", "local_rank", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "activation_checkpointing", "activation_checkpointing_kwargs",
    "use_liger_kernel", "liger_kernel_config", "attn_implementation", "sar_backend", "trust_remote_code",
    "use_cache",
    # of no consequence here
    "restore_callback_states_from_checkpoint", "label_names", "remove_unused_columns", "cutoff_len", "stage",
))
# fmt: on
# The product of these with the number of ranks counts.
BY_PRODUCT = ("per_device_train_batch_size", "train_batch_size", "gradient_accumulation_steps")
IN_DEEPSPEED = ("optimizer", "scheduler", "gradient_clipping", "train_batch_size")


def find_checkpoint(arguments: Arguments, places: Sequence[str]) -> str | None:
    """Where ``resume_from_checkpoint`` says: a folder, or with ``true`` the newest whole one of the output folder.

    Nothing is changed. ``ValueError`` if the output folder holds an earlier run and neither resume nor overwriting is
    asked, or the model itself (``places`` that it is read from), or if the checkpoint is no whole one that a run can
    be resumed from.
    """
    training = arguments.training
    wanted, output = training.resume_from_checkpoint, Path(training.output_dir)
    asked = wanted is not None and str(wanted).lower() != "false"
    found = Path(wanted) if asked and str(wanted).lower() != "true" else last_complete(output) if asked else None
    if found is not None and (inside := checkpoints(found)):
        raise ArgumentError(
            "resume_from_checkpoint", f"{wanted}, a run's folder", f"be a checkpoint, as {inside[-1].name} in it"
        )
    if found is not None and not (found / "trainer_state.json").is_file():
        raise ArgumentError("resume_from_checkpoint", wanted, "be a whole checkpoint")
    if found is None or found.resolve().parent != output.resolve():
        _refuse_earlier_run(arguments, places, asked)
    if found is None:
        if asked:
            logger.info("resuming from nothing: no whole checkpoint yet")
        return None
    if not any(found.glob("optimizer*")) and not any(found.glob("global_step*")):
        raise ArgumentError(
            "resume_from_checkpoint",
            found,
            (
                "go on from a checkpoint with optimizer state, as learning rate and moments would start anew "
                "without ({save_only_model}); or begin a new run with its weights as {model_name_or_path} and "
                "another {output_dir}"
            ),
        )
    logger.info("resuming from %s", found)
    return str(found)


def _refuse_earlier_run(arguments: Arguments, places: Sequence[str], asked: bool) -> None:
    training, output = arguments.training, Path(arguments.training.output_dir)
    if not (training.do_train and (old := earlier_run(output))):
        return
    for read in (Path(place).resolve() for place in places):
        if output.resolve() in (read, *read.parents):
            raise ArgumentError(
                "output_dir", f"{output}, which holds the model that is trained, {read}", "be another folder"
            )
    if training.overwrite_output_dir:
        return
    if asked and not old.startswith("checkpoint-"):
        raise ArgumentError(
            "output_dir",
            f"{output}, which holds {old} of an earlier run and no whole checkpoint to resume from",
            "be another folder, or come with {overwrite_output_dir}",
        )
    if not asked or str(training.resume_from_checkpoint).lower() != "true":
        raise ArgumentError(
            "output_dir",
            f"{output}, which holds {old} of an earlier run",
            "be another folder, or come with {resume_from_checkpoint} true or {overwrite_output_dir}",
        )


def run_settings(arguments: Arguments, infos: Sequence[DatasetInfo], model: Mapping[str, Any]) -> dict[str, Any]:
    """What decides which weights a run ends with, as plain values by flag; files by content, wherever they lie.

    ``model``: settings of the model, and of SAR on it.
    """
    training, data = arguments.training, arguments.data
    groups = (dataclasses.asdict(group) for group in (data, arguments.control))
    given = {name: value for group in (model, *groups, training.to_sanitized_dict()) for name, value in group.items()}
    settings = {name: value for name, value in given.items() if name not in MAY_CHANGE and name not in BY_PRODUCT}
    micro_batch = training.train_batch_size * training.world_size
    settings["total_train_batch_size"] = micro_batch * training.gradient_accumulation_steps
    if arguments.control.custom_trainer is not None:  # its negatives are those of a micro-batch on all ranks
        settings["samples_per_micro_batch"] = micro_batch
    if data.streaming:  # which worker reads what decides the order; records are known by their files and entries
        settings["dataloader_num_workers"] = training.dataloader_num_workers
        settings["dataset_info"] = [_entry(info) for info in infos]
    settings["dataset"] = [f"{i.name} (content {', '.join(i.content)})" if i.files else i.name for i in infos]
    settings["template"] = content_stamp(read_template(data.template).encode()) if data.template else None
    settings["deepspeed"] = _deepspeed(training.deepspeed)
    return json.loads(json.dumps(settings, default=str))


def _entry(info: DatasetInfo) -> dict[str, Any]:
    """What the registry says of a dataset's rows, wherever they lie."""
    values = dataclasses.asdict(info)
    return {name: values[name] for name in ("layout", "hub_id", "subset", "split", "num_samples")}


def _deepspeed(config: Any) -> dict[str, Any] | None:
    if not config:
        return None
    values = config if isinstance(config, Mapping) else json.loads(Path(config).read_text(encoding="utf-8"))
    return {name: values.get(name) for name in IN_DEEPSPEED}


def check_same_run(settings: Mapping[str, Any], checkpoint: str | Path) -> None:
    """``ArgumentError`` if settings differ from those of the run that wrote the checkpoint.

    A setting that only one of the two knows (another version wrote the checkpoint) is not compared; a checkpoint
    without settings is resumed after a warning.
    """
    path = Path(checkpoint) / SETTINGS
    if not path.is_file():
        logger.warning("%s has no %s: whether this is the run that wrote it is not known", checkpoint, SETTINGS)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    differing = [
        f"{name} is {_short(value)}, was {_short(before[name])}"
        for name, value in settings.items()
        if name in before and before[name] != value
    ]
    if differing:
        raise ArgumentError(
            "resume_from_checkpoint",
            f"{checkpoint}, from which these differ: {'; '.join(differing)}",
            (
                "go on with the same run; or begin a new one with its weights as {model_name_or_path} and another "
                "{output_dir}"
            ),
        )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else text[:197] + "..."


def is_finished(checkpoint: str | None, output: Path) -> bool:
    """Whether the run of a checkpoint took its last step, and left its model and results in ``output``."""
    if checkpoint is None or not (output / "train_results.json").is_file():
        return False
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    return state["global_step"] >= state["max_steps"] > 0
