from typing import Any

from transformers import AutoConfig


def load_config(model_args: Any) -> Any:
    return AutoConfig.from_pretrained(model_args.model_name_or_path)
