"""Flags and YAML of ``experiments/evaluate.py``: the research code's names, and what they leave open."""
# ruff: noqa: RUF009  (a field made by a function is still a field)

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sar_fast.base.errors import ArgumentError, arguments_named
from sar_fast.cli.evaluate.task_flags import parse_with_task
from sar_fast.config import DecodeMode, Normalize, PriorSource, SARConfig
from sar_fast.lab.benchmark.tasks import Task
from sar_fast.lab.benchmark.tasks.base import SCORINGS
from sar_fast.lab.io.chat_template import read_template
from sar_fast.lab.io.datasets import is_file_name
from sar_fast.lab.io.original_checkpoints import SAM_WIDTHS, is_original
from sar_fast.lab.io.output_dir import check_output_dir
from sar_fast.lab.run.flags import above, at_least, need, refuse
from sar_fast.lab.run.sar_flags import RULE_HELP, check_sar_flags, sar_config

BENCHMARK_FLAGS = ("data_dir", "split", "scoring", "max_new_tokens", "dataloader_num_workers")


def _flag(default: Any, help: str, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def _list_flag(default: list[Any], help: str) -> Any:
    return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})


@dataclasses.dataclass
class EvaluationArguments:
    """Everything that ``experiments/evaluate.py`` can be told. Exactly one of task, SFS/FI and probe is asked for."""

    model_name_or_path: str = dataclasses.field(
        metadata={
            "help": "Folder or hub id of an image-text-to-text model, or of an adapter; 'miniature' is the one shipped."
        }
    )
    output_dir: str = dataclasses.field(metadata={"help": "Results, per-sample records and metadata."})
    overwrite_output_dir: bool = _flag(False, "Delete the results of an earlier evaluation in output_dir.")
    seed: int = _flag(42, "Of everything that is random.")

    # the model
    base_model: str | None = _flag(None, "The model that an adapter is for. Default: the one that the adapter names.")
    bf16: bool = _flag(False, "Run the model in bfloat16.")
    fp16: bool = _flag(False, "Run the model in float16.")
    device: str = _flag("auto", "auto (the GPU if there is one), cpu, cuda, cuda:1; set by `accelerate launch`.")
    template: str | None = _flag(None, "A Jinja file to use instead of the model's own chat template.")
    use_sar: bool = _flag(False, "Re-weight attention heads.")
    sar_activation_layer_k: int = _flag(10, "Last K attention layers.")
    sar_beta: float | None = _flag(None, "Temperature of the softmax over heads. Default: 0.5.")
    sar_normalize: Normalize | None = _flag(None, "none (default), or standardize: SAV standardised over heads.")
    sar_weighting: str | None = _flag(None, RULE_HELP)
    sar_decode: DecodeMode = _flag("running", "Weights while generating: running, step or prompt.")
    sar_prior_source: PriorSource = _flag("vision_layer", "vision_layer or projected.")
    sar_backend: str = _flag("auto", "auto, triton, composed, composed:LIBRARY, torch, or a package's.")

    # benchmarks
    task: str | None = _flag(None, "Benchmark: mme, pope, refcoco, ... (docs/evaluation.md).")
    data_dir: str | None = _flag(None, "Folder of the benchmark's parquet files. Default: from the hub.")
    split: str | None = _flag(None, "Split of the benchmark. Default: the one that papers report.")
    scoring: str | None = _flag(
        None, "generate, or first_token: log-probabilities of the answers, no decoding.", choices=[*SCORINGS, None]
    )
    predict_with_generate: bool = _flag(False, "The same as --scoring generate, which is the default.")
    max_new_tokens: int | None = _flag(None, "Longest generated answer. Default: the task's.")
    per_device_eval_batch_size: int = _flag(8, "Samples per batch and device.")
    dataloader_num_workers: int | None = _flag(None, "Processes that prepare batches. Default: 4 on a GPU, else 0.")
    max_samples: int | None = _flag(None, "Use the first samples alone; pictures that belong together stay together.")
    task_options: Task.Options | None = dataclasses.field(default=None, init=False)  # of flags of their own

    # a dataset with columns image, query, object_prompt, bbox, for the analyses
    dataset: str | None = _flag(None, "Name in dataset_info.json, or a file: refcoco_val_sar.")
    dataset_dir: str | None = _flag(
        None,
        "Where dataset_info.json is, and relative paths of files start. Default: experiments/data, and the working "
        "directory.",
    )
    media_dir: str | None = _flag(None, "Where image paths start. Default: dataset_dir, or a file's own folder.")

    # section 4.3
    do_sfs_fi_eval: bool = _flag(False, "Semantic Focus Score and Focus Instability.")
    gd_config_path: str | None = _flag(None, "Grounding DINO's config file, for a .pth checkpoint.")
    gd_checkpoint_path: str | None = _flag(None, "Grounding DINO: .pth, folder or hub id.")
    sam_checkpoint_path: str | None = _flag(None, "SAM or SAM 2: .pth, folder or hub id.")
    sam_model_type: str = _flag("vit_h", "Size of a .pth SAM checkpoint: vit_b, vit_l or vit_h.")
    gd_box_threshold: float = _flag(0.35, "Least score of a grounded box.")
    gd_text_threshold: float = _flag(0.25, "Least score of a word of its phrase.")
    gd_text_encoder: str | None = _flag(None, "BERT's folder, where the hub cannot be reached. Default: the config's.")
    sam_mask_cache: str | None = _flag(None, "Folder of masks by picture and phrase. Default: output_dir/masks.")
    focus_layers: list[int] = _list_flag([-1], "Attention layers whose maps are averaged; -1 is the last.")
    focus_templates: list[str] = _list_flag([], "Paraphrases with {} for the object. Default: the paper's five.")
    focus_overlays: bool = _flag(False, "Also draw every query's map over its picture.")

    # section 6.3
    do_layerwise_probe: bool = _flag(False, "Linear probes on every layer.")
    layerwise_probe_task: str = _flag("grounding", "What the probes learn.", choices=["grounding", "classification"])
    probe_lr: float = _flag(1e-3, "Learning rate of the probes.")
    probe_epochs: int = _flag(5, "Epochs of the probes.")
    probe_batch_size: int = _flag(32, "Batch size of the probes.")
    probe_feature_scale: str = _flag(
        "standardize", "standardize features over the training set, or none: raw.", choices=["standardize", "none"]
    )
    probe_seeds: int = _flag(3, "How often heads are trained, from different initial weights and orders.")

    def __post_init__(self) -> None:
        wanted = [n for n in ("task", "do_sfs_fi_eval", "do_layerwise_probe") if getattr(self, n)]
        if len(wanted) != 1:
            came = " and ".join(f"--{name}" for name in wanted) or "none"
            raise ValueError(f"needed one of --task, --do_sfs_fi_eval, --do_layerwise_probe; got {came}")
        need(self, "use_sar", True, sar_flags_given(self))
        need(self, "do_sfs_fi_eval", True, [n for n in vars(self) if n.startswith(("gd_", "sam_", "focus_"))])
        need(self, "do_layerwise_probe", True, [n for n in vars(self) if n.startswith(("probe_", "layerwise_"))])
        if self.task and self.dataset:
            raise ArgumentError("dataset", self.dataset, "be left out with {task}, which takes {data_dir}")
        if self.task:
            refuse(self, ("dataset_dir", "media_dir"), "with {task}, which takes {data_dir}")
        else:
            refuse(self, BENCHMARK_FLAGS, "without {task}")
            if not self.dataset:
                raise ArgumentError("dataset", self.dataset, f"be given with {{{wanted[0]}}}")
            if self.dataset_dir is not None and is_file_name(self.dataset) and Path(self.dataset).is_absolute():
                raise ArgumentError("dataset_dir", self.dataset_dir, "be left out for a file with an absolute path")
        self._check_grounding()
        if self.bf16 and self.fp16:
            raise ArgumentError("bf16", True, "be False with {fp16}")
        if self.predict_with_generate and self.scoring == "first_token":
            raise ArgumentError("predict_with_generate", True, "be False with {scoring} first_token")
        if self.scoring == "first_token":
            refuse(self, ("max_new_tokens",), "with {scoring} first_token, which decodes nothing")
        at_least(self, 0, "dataloader_num_workers", "seed", "gd_box_threshold", "gd_text_threshold")
        at_least(self, 1, "per_device_eval_batch_size", "max_new_tokens", "max_samples")
        at_least(self, 1, "probe_epochs", "probe_batch_size", "probe_seeds")
        above(self, 0, "probe_lr")
        if self.use_sar:
            check_sar_flags(self)
        if self.template is not None:
            read_template(self.template)

    def _check_grounding(self) -> None:
        """``ValueError`` for flags of grounding models that are not asked for, or that theirs do not use."""
        names = [n for n in vars(self) if n.startswith(("gd_", "sam_")) and not n.endswith("_checkpoint_path")]
        if self.gd_checkpoint_path is None and self.sam_checkpoint_path is None:
            refuse(self, names, "without {gd_checkpoint_path} and {sam_checkpoint_path}")
        elif self.gd_checkpoint_path is None or self.sam_checkpoint_path is None:
            missing = "gd_checkpoint_path" if self.gd_checkpoint_path is None else "sam_checkpoint_path"
            raise ArgumentError(missing, None, "be given: masks by grounding need a detector and a segmenter")
        else:
            if not is_original(self.gd_checkpoint_path):
                refuse(self, ("gd_config_path", "gd_text_encoder"), "for a {gd_checkpoint_path} that is no .pth")
            if not is_original(self.sam_checkpoint_path):
                refuse(self, ("sam_model_type",), "for a {sam_checkpoint_path} that is no .pth")
            if self.sam_model_type not in SAM_WIDTHS:
                raise ArgumentError("sam_model_type", repr(self.sam_model_type), f"be {', '.join(SAM_WIDTHS)}")

    def sar_config(self, model_config: Any = None) -> SARConfig:
        """The options of SAR, with a rule for the model of a configuration; ``ValueError`` names a bad flag."""
        return sar_config(self, model_config)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored beside the results."""
        values = dataclasses.asdict(self)
        return values | (values.pop("task_options") or {})


def sar_flags_given(group: Any) -> list[str]:
    """SAR's flags that say something else than ``SARConfig`` does by itself: 0.5, its beta, is as good as none."""
    own = SARConfig().to_dict()
    names = [name for name in vars(group) if name.startswith("sar_")]
    return [name for name in names if getattr(group, name) not in (None, own.get(name.removeprefix("sar_")))]


def parse(argv: Sequence[str]) -> EvaluationArguments:
    """Arguments from a command line: YAML files, then flags; ``ValueError`` for a bad one."""
    arguments = parse_with_task(EvaluationArguments, argv)
    with arguments_named({"output_dir": "--output_dir"}):
        check_output_dir(arguments.output_dir)
    return arguments
