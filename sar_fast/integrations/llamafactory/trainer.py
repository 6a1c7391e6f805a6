"""The control group's Trainer: LLaMA-Factory's own, with visual supervision."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

from llamafactory.train.sft import workflow
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

from sar_fast.lab.training.arguments import ControlArguments
from sar_fast.lab.training.visual_supervision import VisualSupervision


class ControlTrainer(VisualSupervision, CustomSeq2SeqTrainer):
    """LLaMA-Factory's Trainer of SFT with the control group's loss."""


@contextlib.contextmanager
def chosen_trainer(control: ControlArguments) -> Iterator[None]:
    """In here LLaMA-Factory's SFT makes a :class:`ControlTrainer`, if that is asked for: it has no option for one."""
    if control.custom_trainer is None:
        yield
        return
    options = dataclasses.asdict(control)
    del options["custom_trainer"]
    before = workflow.CustomSeq2SeqTrainer
    workflow.CustomSeq2SeqTrainer = functools.partial(ControlTrainer, **options)
    try:
        yield
    finally:
        workflow.CustomSeq2SeqTrainer = before
