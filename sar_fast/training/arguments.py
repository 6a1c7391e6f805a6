"""Flags and YAML of ``experiments/train.py``: the research code's names, on top of the Trainer's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from sar_fast.config import BackendName, Normalize, SARConfig
from sar_fast.experiment_arguments import arguments_of_process, need, parse_groups
from sar_fast.training.distributed import refuse_split_models


@dataclasses.dataclass
class ModelArguments:
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
    finetuning_type: str = dataclasses.field(
        default="full", metadata={"choices": ["full", "lora", "freeze"], "help": "full, lora, or freeze (last layers)."}
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
    use_sar: bool = dataclasses.field(default=False, metadata={"help": "Re-weight attention heads while training."})
    sar_activation_layer_k: int = dataclasses.field(default=10, metadata={"help": "Last K attention layers."})
    sar_beta: float = dataclasses.field(default=0.5, metadata={"help": "Temperature of the softmax over heads."})
    sar_normalize: Normalize = dataclasses.field(default="none")
    sar_backend: BackendName = dataclasses.field(default="auto")
    sav_grad: bool = dataclasses.field(default=False, metadata={"help": "Let gradients flow through SAR's weights."})

    def __post_init__(self) -> None:
        sar_fields = ("sar_activation_layer_k", "sar_beta", "sar_normalize", "sar_backend", "sav_grad")
        need(self, "use_sar", True, sar_fields)
        need(self, "finetuning_type", "lora", ("lora_rank", "lora_alpha", "lora_dropout", "lora_target"))
        need(self, "finetuning_type", "freeze", ("freeze_trainable_layers",))

    def sar_config(self) -> SARConfig:
        """The options of SAR; ``ValueError`` for a bad one."""
        return SARConfig(
            activation_layer_k=self.sar_activation_layer_k,
            beta=self.sar_beta,
            normalize=self.sar_normalize,
            backend=self.sar_backend,
            sav_grad=self.sav_grad,
        )


@dataclasses.dataclass
class DataArguments:
    """Datasets and how samples are made of them."""

    dataset: str | None = dataclasses.field(
        default=None, metadata={"help": "Comma-separated names of dataset_info.json, or files."}
    )
    eval_dataset: str | None = dataclasses.field(default=None, metadata={"help": "The same, for --do_eval."})
    dataset_dir: str = dataclasses.field(
        default=str(Path(__file__).parents[2] / "experiments" / "data"),
        metadata={"help": "Where dataset_info.json is."},
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
    max_samples: int | None = dataclasses.field(default=None, metadata={"help": "Use at most that many records."})
    streaming: bool = dataclasses.field(default=False, metadata={"help": "Read as it comes; needs --max_steps."})
    preprocessing_num_workers: int | None = dataclasses.field(default=None)
    cache_dir: str | None = dataclasses.field(default=None, metadata={"help": "Of prepared datasets."})

    def __post_init__(self) -> None:
        if self.max_length is not None and self.cutoff_len is not None and self.max_length != self.cutoff_len:
            raise ValueError(f"max_length is {self.max_length} and cutoff_len {self.cutoff_len}: give one")
        self.max_length = self.max_length if self.max_length is not None else self.cutoff_len


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


@dataclasses.dataclass
class SFTArguments(TrainingArguments):
    """The Trainer's arguments, with defaults for multimodal models, and those of the research code it no longer has."""

    remove_unused_columns: bool = dataclasses.field(default=False)
    warmup_ratio: float = dataclasses.field(default=0.0, metadata={"help": "Share of the steps, for the warm-up."})
    overwrite_output_dir: bool = dataclasses.field(
        default=False, metadata={"help": "Delete the checkpoints and logs of an earlier run in output_dir."}
    )
    plot_loss: bool = dataclasses.field(default=False, metadata={"help": "Draw training_loss.png."})
    gradient_analysis: bool = dataclasses.field(
        default=True, metadata={"help": "Log gradient sparsity (gradient_sparsity.jsonl)."}
    )
    gradient_analysis_steps: int | None = dataclasses.field(
        default=None, metadata={"help": "Steps between measurements. Default: logging_steps."}
    )
    log_throughput: bool = dataclasses.field(default=False, metadata={"help": "Log tokens/s, MFU and memory."})
    peak_flops: float | None = dataclasses.field(
        default=None, metadata={"help": "Of one device, per second, for the MFU. Default: known GPUs' data sheets."}
    )

    def __post_init__(self) -> None:
        if not (torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available()):
            self.use_cpu = True  # otherwise --bf16 is refused on such a machine
            self.dataloader_pin_memory = False
        if self.fp16 and self.use_cpu:
            raise ValueError("--fp16 needs a GPU: on the CPU accelerate trains in fp32 without a word; --bf16 works")
        if (
            self.accelerator_config is None
        ):  # a streamed batch cannot be dealt out by rows: images have rows of their own
            self.accelerator_config = {"dispatch_batches": False}
        if self.gradient_checkpointing and not self.gradient_checkpointing_kwargs:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        if self.warmup_ratio:
            if not 0 <= self.warmup_ratio < 1:
                raise ValueError(f"warmup_ratio must be in [0, 1); got {self.warmup_ratio}")
            if self.warmup_steps:
                raise ValueError("warmup_ratio and warmup_steps exclude each other; give one")
            self.warmup_steps = self.warmup_ratio  # below 1, the Trainer takes it for a ratio
        super().__post_init__()


@dataclasses.dataclass
class Arguments:
    """All of a run's arguments."""

    model: ModelArguments
    data: DataArguments
    control: ControlArguments
    training: SFTArguments

    def to_dict(self) -> dict[str, Any]:
        """Plain values by group, as stored beside the results."""
        groups = {n: dataclasses.asdict(getattr(self, n)) for n in ("model", "data", "control")}
        return {**groups, "training": self.training.to_sanitized_dict()}


def parse(argv: Sequence[str]) -> Arguments:
    """Arguments from a command line: YAML or JSON files, then flags; a later value replaces an earlier one.

    ``ValueError`` for a bad flag, or for flags that do not go together.
    """
    groups = (ModelArguments, DataArguments, ControlArguments, SFTArguments)
    arguments = Arguments(*parse_groups(groups, argv))
    check(arguments)
    return arguments


def check(arguments: Arguments) -> None:
    """``ValueError`` for flags that do not go together."""
    model, data, training = arguments.model, arguments.data, arguments.training
    if not (training.do_train or training.do_eval):
        raise ValueError("nothing to do: give --do_train, --do_eval or both")
    if training.do_train and not data.dataset:
        raise ValueError("--do_train needs --dataset")
    if training.do_eval and not data.eval_dataset:
        raise ValueError("--do_eval needs --eval_dataset")
    if data.streaming and training.do_train and training.max_steps <= 0:
        raise ValueError("--streaming has no length: it needs --max_steps")
    if data.packing and arguments.control.custom_trainer == "control_sft":
        raise ValueError("--packing puts samples into one row, --custom_trainer control_sft tells them apart by rows")
    deepspeed = getattr(training, "hf_deepspeed_config", None)
    refuse_split_models(deepspeed.config if deepspeed else None, training.parallelism_config)
    if model.use_sar:
        model.sar_config()
        if model.attn_implementation is not None:
            raise ValueError("--use_sar sets the attention itself; leave out --attn_implementation")


def main_arguments() -> Arguments:
    """The arguments of this process; a bad one ends it with one line on stderr and exit code 2."""
    return arguments_of_process(parse)
