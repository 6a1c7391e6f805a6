import dataclasses
import sys
from typing import Any

import torch
import transformers
import yaml
from transformers import HfArgumentParser


@dataclasses.dataclass
class ModelArguments:
    model_name_or_path: str | None = None
    flash_attn: str = "auto"
    shift_attn: bool = False
    mixture_of_depths: str | None = None
    use_unsloth: bool = False
    use_kt: bool = False
    export_dir: str | None = None
    compute_dtype: torch.dtype | None = dataclasses.field(default=None, init=False)


@dataclasses.dataclass
class DataArguments:
    dataset: str | None = None
    packing: bool | None = None
    neat_packing: bool = False


@dataclasses.dataclass
class FinetuningArguments:
    stage: str = "sft"
    finetuning_type: str = "full"
    use_mca: bool = False
    use_hyper_parallel: bool = False
    use_dft_loss: bool = False
    use_eaft_loss: bool = False
    use_asft_loss: bool = False


@dataclasses.dataclass
class GeneratingArguments:
    max_new_tokens: int = 16


@dataclasses.dataclass
class TrainingArguments(transformers.Seq2SeqTrainingArguments):
    use_ray: bool = False


def read_args(args: Any = None) -> Any:
    if not sys.argv[1].endswith(".yaml"):
        return sys.argv[1:]
    with open(sys.argv[1]) as file:
        values = yaml.safe_load(file)
    return values | {name: yaml.safe_load(text) for name, text in (word.split("=", 1) for word in sys.argv[2:])}


def get_train_args(args: Any) -> tuple:
    parser = HfArgumentParser(
        [ModelArguments, DataArguments, TrainingArguments, FinetuningArguments, GeneratingArguments]
    )
    return parser.parse_dict(args) if isinstance(args, dict) else parser.parse_args_into_dataclasses(args)
