"""A resumed run goes on with SAR as it began: LLaMA-Factory resumes whatever checkpoint is in the output folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sar_fast.base.errors import ArgumentError
from sar_fast.integrations.llamafactory.options import PLAIN, Options

FILE = "sar_options.json"


class KeptOptions(TrainerCallback):
    """Every checkpoint keeps the options that it was trained with (``sar_options.json``)."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            (folder / FILE).write_text(json.dumps(_kept(self.options), indent=2) + "\n", encoding="utf-8")


def check_resume(options: Options, checkpoint: str | None) -> None:
    """``ValueError`` names an option that differs from the checkpoint's; one without the file had none of them."""
    if checkpoint is None:
        return
    file, was = Path(checkpoint, FILE), _kept(PLAIN)
    if file.is_file():
        was |= json.loads(file.read_text(encoding="utf-8"))
    for name, value in _kept(options).items():
        if value != was[name]:
            raise ArgumentError(
                f"--{name}",
                value,
                (
                    f"be {was[name]} as in {checkpoint}, since a run goes on as it began; or give another "
                    "--output_dir, or --overwrite_output_dir"
                ),
            )


def _kept(options: Options) -> dict[str, Any]:
    """What changes how a model is trained; how it is measured may change."""
    return vars(options.sar) | vars(options.control)
