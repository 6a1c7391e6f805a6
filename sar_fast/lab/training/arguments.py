"""Flags and YAML of ``experiments/train.py``: the research code's names, on top of the Trainer's own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from sar_fast.base.errors import ArgumentError, arguments_named
from sar_fast.config import Normalize, SARConfig
from sar_fast.lab.io.chat_template import read_template
from sar_fast.lab.io.datasets import is_file_name, split_names
from sar_fast.lab.io.output_dir import check_output_dir
from sar_fast.lab.run.flags import above, arguments_of_process, at_least, below_one, need, parse_groups
from sar_fast.lab.run.sar_flags import RULE_HELP, check_sar_flags, sar_config
from sar_fast.lab.training.checking import LENGTH
from sar_fast.lab.training.distributed import refuse_split_models
from sar_fast.lab.training.mixing import STRATEGIES, Mix

EVAL_METRICS = ("eval_loss", "eval_loss_text_gen", "eval_loss_contrastive")  # the last two of the control group
BY_LENGTH = ("group_by_length", "batch_rebalance")


@dataclasses.dataclass
class SARArguments:
    """SAR, in whatever trains."""

    use_sar: bool = dataclasses.field(default=False, metadata={"help": "Re-weight attention heads while training."})
    sar_activation_layer_k: int = dataclasses.field(default=10, metadata={"help": "Last K attention layers."})
    sar_beta: float = dataclasses.field(default=0.5, metadata={"help": "Temperature of the softmax over heads."})
    sar_normalize: Normalize = dataclasses.field(default="none")
    sar_weighting: str | None = dataclasses.field(default=None, metadata={"help": RULE_HELP + " It is trained."})
    sar_backend: str = dataclasses.field(
        default="auto", metadata={"help": "auto, triton, composed, composed:LIBRARY, torch, or a package's."}
    )
    sav_grad: bool = dataclasses.field(default=False, metadata={"help": "Let gradients flow through SAR's weights."})

    def __post_init__(self) -> None:
        sar_fields = ("sar_activation_layer_k", "sar_beta", "sar_normalize", "sar_weighting", "sar_backend", "sav_grad")
        need(self, "use_sar", True, sar_fields)

    def sar_config(self, model_config: Any = None) -> SARConfig:
        """The options of SAR, with a rule for the model of a configuration; ``ValueError`` names a bad flag."""
        return sar_config(self, model_config)


@dataclasses.dataclass(kw_only=True)
class ModelArguments(SARArguments):
    """The model, what of it is trained, and SAR."""

    model_name_or_path: str = dataclasses.field(
        metadata={
            "help": "Folder or hub id of an image-text-to-text model, or of an adapter; 'miniature' is the one shipped."
        }
    )
    base_model: str | None = dataclasses.field(
        default=None, metadata={"help": "The model that an adapter is for. Default: the one that the adapter names."}
    )
    torch_dtype: str = dataclasses.field(
        default="auto",
        metadata={
            "help": "Of the loaded weights: auto (bfloat16 with --bf16 under DeepSpeed, else float32), or a name."
        },
    )
    attn_implementation: str | None = dataclasses.field(default=None, metadata={"help": "Without SAR: sdpa, ..."})
    trust_remote_code: bool = dataclasses.field(default=False)
    stage: str = dataclasses.field(
        default="sft", metadata={"choices": ["sft"], "help": "LLaMA-Factory's name for what this command does."}
    )
    finetuning_type: str = dataclasses.field(
        default="full",
        metadata={
            "choices": ["full", "lora", "freeze", "rule"],
            "help": "full, lora, freeze (last layers), or rule (the parameters of --sar_weighting alone).",
        },
    )
    freeze_vision_tower: bool = dataclasses.field(
        default=True, metadata={"help": "full and freeze: leave it as it is."}
    )
    freeze_multi_modal_projector: bool = dataclasses.field(default=True, metadata={"help": "The same."})
    freeze_trainable_layers: int = dataclasses.field(
        default=2, metadata={"help": "freeze: number of decoder layers that are trained, the last ones."}
    )
    lora_rank: int | None = dataclasses.field(default=None, metadata={"help": "Default: 8, or that of the adapter."})
    lora_alpha: int | None = dataclasses.field(
        default=None, metadata={"help": "Default: twice the rank, or that of the adapter."}
    )
    lora_dropout: float | None = dataclasses.field(
        default=None, metadata={"help": "Default: 0, or that of the adapter."}
    )
    lora_target: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Module names with commas; all: every linear layer of the decoder. Default: all, or the adapter's."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.finetuning_type == "rule" and self.sar_weighting is None:
            raise ArgumentError(
                "sar_weighting",
                None,
                "be given, with {use_sar}, for {finetuning_type} rule, which trains its parameters",
            )
        need(self, "finetuning_type", "lora", ("lora_rank", "lora_alpha", "lora_dropout", "lora_target"))
        need(self, "finetuning_type", "freeze", ("freeze_trainable_layers",))
        at_least(self, 1, "lora_rank", "lora_alpha", "freeze_trainable_layers")
        below_one(self, "lora_dropout")


@dataclasses.dataclass
class DataArguments:
    """Datasets and how samples are made of them."""

    dataset: str | None = dataclasses.field(
        default=None, metadata={"help": "Comma-separated names of dataset_info.json, or files."}
    )
    eval_dataset: str | None = dataclasses.field(default=None, metadata={"help": "The same, for --do_eval."})
    dataset_dir: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Where dataset_info.json is, and relative paths of files start. Default: experiments/data, and the "
            "working directory."
        },
    )
    media_dir: str | None = dataclasses.field(
        default=None, metadata={"help": "Where image paths start. Default: dataset_dir, or a file's own folder."}
    )
    template: str | None = dataclasses.field(
        default=None, metadata={"help": "A Jinja file to use instead of the model's own chat template."}
    )
    max_length: int | None = dataclasses.field(
        default=None, metadata={"help": "Most tokens of a sample, image tokens included."}
    )
    cutoff_len: int | None = dataclasses.field(default=None, metadata={"help": "LLaMA-Factory's name for max_length."})
    too_long: str = dataclasses.field(
        default="drop",
        metadata={"choices": ["drop", "error", "truncate"], "help": "Beyond max_length. No image is ever cut."},
    )
    packing: bool = dataclasses.field(
        default=False, metadata={"help": "The samples of a micro-batch in one row, without padding."}
    )
    max_samples: int | None = dataclasses.field(
        default=None, metadata={"help": "Use at most that many records of each dataset, the first ones."}
    )
    streaming: bool = dataclasses.field(default=False, metadata={"help": "Read as it comes; needs --max_steps."})
    buffer_size: int = dataclasses.field(
        default=1024, metadata={"help": "streaming: records among which the next is drawn; 1 keeps their order."}
    )
    mix_strategy: str = dataclasses.field(
        default="concat",
        metadata={
            "choices": list(STRATEGIES),
            "help": "Several datasets: every record once; in turn until one ends; in turn until each was read once.",
        },
    )
    interleave_probs: str | None = dataclasses.field(
        default=None, metadata={"help": "interleave: shares of the datasets, 0.7,0.3. Default: in turn."}
    )
    preprocessing_num_workers: int | None = dataclasses.field(default=None)
    cache_dir: str | None = dataclasses.field(default=None, metadata={"help": "Of prepared datasets."})

    def __post_init__(self) -> None:
        if self.max_length is not None and self.cutoff_len is not None and self.max_length != self.cutoff_len:
            raise ArgumentError(
                "cutoff_len", self.cutoff_len, f"be {self.max_length}, as {{max_length}}, whose other name it is"
            )
        at_least(self, 1, "max_length", "cutoff_len", "max_samples", "buffer_size", "preprocessing_num_workers")
        self.max_length = self.max_length if self.max_length is not None else self.cutoff_len
        if self.template is not None:
            read_template(self.template)
        need(self, "streaming", True, ("buffer_size",))
        names = split_names(self.dataset)
        self.mix().check(len(names) or 1)
        names += split_names(self.eval_dataset)
        if self.dataset_dir is not None and names and all(is_file_name(n) and Path(n).is_absolute() for n in names):
            raise ArgumentError("dataset_dir", self.dataset_dir, "be left out for files with absolute paths")

    def mix(self) -> Mix:
        """How the training datasets are mixed; ``ValueError`` for flags that make no mix."""
        return Mix.of(self.mix_strategy, self.interleave_probs)


@dataclasses.dataclass
class ControlArguments:
    """The control group of section 3.3."""

    custom_trainer: str | None = dataclasses.field(
        default=None, metadata={"choices": ["control_sft"], "help": "control_sft: add the contrastive loss."}
    )
    visual_contrastive_loss_weight: float = dataclasses.field(default=0.1)
    visual_contrastive_temperature: float = dataclasses.field(default=1.0)
    learnable_temperature: bool = dataclasses.field(default=False)
    visual_contrastive_text_pool: str = dataclasses.field(
        default="all", metadata={"choices": ["all", "prompt", "answer"]}
    )

    def __post_init__(self) -> None:
        names = ("visual_contrastive_loss_weight", "visual_contrastive_temperature", "learnable_temperature")
        need(self, "custom_trainer", "control_sft", (*names, "visual_contrastive_text_pool"))
        if not 0 <= self.visual_contrastive_loss_weight < math.inf:
            raise ArgumentError(
                "visual_contrastive_loss_weight", self.visual_contrastive_loss_weight, "be >= 0 and finite"
            )
        above(self, 0, "visual_contrastive_temperature")


@dataclasses.dataclass
class AnalysisArguments:
    """The gradient analysis of section 3.2."""

    gradient_analysis: bool = dataclasses.field(
        default=True, metadata={"help": "Log gradient sparsity (gradient_sparsity.jsonl)."}
    )
    gradient_analysis_steps: int | None = dataclasses.field(
        default=None, metadata={"help": "Steps between measurements. Default: logging_steps."}
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "gradient_analysis_steps")

    def steps_between(self, logging_steps: float) -> int:
        """Optimizer steps between measurements, in a run that logs every ``logging_steps``."""
        return self.gradient_analysis_steps or max(1, int(logging_steps))


@dataclasses.dataclass
class SFTArguments(AnalysisArguments, TrainingArguments):
    """The Trainer's arguments, with defaults for multimodal models, and those of the research code it no longer has."""

    remove_unused_columns: bool = dataclasses.field(default=False)
    warmup_ratio: float = dataclasses.field(default=0.0, metadata={"help": "Share of the steps, for the warm-up."})
    overwrite_output_dir: bool = dataclasses.field(
        default=False, metadata={"help": "Delete the checkpoints and logs of an earlier run in output_dir."}
    )
    plot_loss: bool = dataclasses.field(default=False, metadata={"help": "Draw training_loss.png."})
    log_throughput: bool = dataclasses.field(default=False, metadata={"help": "Log tokens/s, MFU and memory."})
    peak_flops: float | None = dataclasses.field(
        default=None, metadata={"help": "Of one device, per second, for the MFU. Default: known GPUs' data sheets."}
    )

    def __post_init__(self) -> None:
        self._check_numbers()
        if str(self.deepspeed).endswith(".json") and not Path(self.deepspeed).is_file():
            raise ArgumentError("deepspeed", self.deepspeed, "be a file that exists")
        if not (torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available()):
            self.use_cpu = True  # otherwise --bf16 is refused on such a machine
            self.dataloader_pin_memory = False
        if self.fp16 and self.use_cpu:
            raise ArgumentError(
                "fp16",
                True,
                "be False without a GPU: on the CPU accelerate trains in fp32 without a word; {bf16} works",
            )
        if (
            self.accelerator_config is None
        ):  # a streamed batch cannot be dealt out by rows: images have rows of their own
            self.accelerator_config = {"dispatch_batches": False}
        if self.gradient_checkpointing and not self.gradient_checkpointing_kwargs:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        if self.warmup_ratio:
            if not 0 <= self.warmup_ratio < 1:
                raise ArgumentError("warmup_ratio", self.warmup_ratio, "be in [0, 1)")
            if self.warmup_steps:
                raise ArgumentError("warmup_steps", self.warmup_steps, "be 0 with {warmup_ratio}")
            self.warmup_steps = self.warmup_ratio  # below 1, the Trainer takes it for a ratio
        metric = self.metric_for_best_model
        if self.save_strategy == "best" and metric is None:
            raise ArgumentError("metric_for_best_model", None, "be eval_loss with {save_strategy} best")
        TrainingArguments.__post_init__(self)  # sets the metric itself for flags that need one
        if self.metric_for_best_model is not None and self.eval_strategy == "no":
            wanted_by = "metric_for_best_model" if metric else "load_best_model_at_end"
            raise ArgumentError("eval_strategy", "no", f"be steps or epoch with {{{wanted_by}}}")

    def _check_numbers(self) -> None:
        """``ValueError`` for a number that makes no sense, which the Trainer would find late, or take for another."""
        at_least(self, 1, "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        at_least(self, 1, "save_total_limit", "eval_accumulation_steps", "dataloader_prefetch_factor", "ddp_timeout")
        AnalysisArguments.__post_init__(self)
        at_least(self, 0, "seed", "data_seed", "dataloader_num_workers", "warmup_steps", "eval_delay")
        at_least(self, 0, "learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "neftune_noise_alpha")
        above(self, 0, "num_train_epochs", "logging_steps", "save_steps", "eval_steps", "peak_flops")
        below_one(self, "adam_beta1", "adam_beta2", "label_smoothing_factor")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ArgumentError("max_steps", self.max_steps, "be at least 1, or -1 for {num_train_epochs}")


@dataclasses.dataclass
class Arguments:
    """All of a run's arguments; ``model`` is None where the caller has it."""

    model: ModelArguments | None
    data: DataArguments
    control: ControlArguments
    training: SFTArguments

    def to_dict(self) -> dict[str, Any]:
        """Plain values by group, as stored beside the results."""
        given = {n: getattr(self, n) for n in ("model", "data", "control")}
        groups = {n: dataclasses.asdict(group) for n, group in given.items() if group is not None}
        return {**groups, "training": self.training.to_sanitized_dict()}


GROUPS = (ModelArguments, DataArguments, ControlArguments, SFTArguments)
FLAGS = {field.name: f"--{field.name}" for group in GROUPS for field in dataclasses.fields(group)}


def parse(argv: Sequence[str]) -> Arguments:
    """Arguments from a command line: YAML or JSON files, then flags; a later value replaces an earlier one.

    ``ValueError`` for a bad flag, or for flags that do not go together.
    """
    arguments = Arguments(*parse_groups(GROUPS, argv))
    with arguments_named(FLAGS):
        check(arguments)
        check_output_dir(arguments.training.output_dir)
    return arguments


def check(arguments: Arguments) -> None:
    """``ArgumentError`` for arguments that do not go together."""
    model, data, training = arguments.model, arguments.data, arguments.training
    if training.do_predict:
        raise ArgumentError("do_predict", True, "be False here: experiments/evaluate.py generates and scores answers")
    metrics = EVAL_METRICS if arguments.control.custom_trainer else EVAL_METRICS[:1]
    metric = training.metric_for_best_model
    if metric is not None and f"eval_{metric.removeprefix('eval_')}" not in metrics:
        raise ArgumentError(
            "metric_for_best_model", metric, f"be {', '.join(metrics)}, all that an evaluation measures"
        )
    if not (training.do_train or training.do_eval):
        raise ArgumentError("do_train", False, "be True, or {do_eval}, or both: there is nothing to do")
    if training.do_train and not data.dataset:
        raise ArgumentError("dataset", None, "be given with {do_train}")
    if training.do_eval and not data.eval_dataset:
        raise ArgumentError("eval_dataset", None, "be given with {do_eval}")
    if data.streaming and training.do_train and training.max_steps <= 0:
        raise ArgumentError("max_steps", training.max_steps, "be at least 1 with {streaming}, which has no length")
    if data.streaming and training.train_sampling_strategy in BY_LENGTH:
        raise ArgumentError(
            "train_sampling_strategy",
            training.train_sampling_strategy,
            "be another with {streaming}, which does not know the lengths of all records",
        )
    if training.train_sampling_strategy in BY_LENGTH and training.length_column_name != LENGTH:
        raise ArgumentError("length_column_name", repr(training.length_column_name), f"be {LENGTH!r}")
    if data.packing and arguments.control.custom_trainer == "control_sft":
        raise ArgumentError(
            "packing", True, "be False with {custom_trainer} control_sft, which tells samples apart by rows"
        )
    deepspeed = getattr(training, "hf_deepspeed_config", None)
    refuse_split_models(deepspeed.config if deepspeed else None, training.parallelism_config)
    if model is not None and model.use_sar:
        check_sar_flags(model)
        if model.attn_implementation is not None:
            raise ArgumentError(
                "attn_implementation",
                model.attn_implementation,
                "be left out with {use_sar}, which sets the attention itself",
            )


def main_arguments() -> Arguments:
    """The arguments of this process; a bad one ends it with one line on stderr and exit code 2."""
    return arguments_of_process(parse)
