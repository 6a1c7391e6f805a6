"""What ``llamafactory.py`` runs in LLaMA-Factory's environment: ``python -m tests.acceptance.llamafactory_inside ...``

checkpoint FOLDER                       writes the tiny Qwen2.5-VL
record BATCHES FILE.yaml [key=value ...]  trains as ``sar-fast llamafactory train``, and keeps the batches
ours BATCHES FLAGS ...                  trains on them with our own Trainer, by the flags of experiments/train.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from sar_fast.lab.training.arguments import parse
from sar_fast.lab.training.gradients import GradientSparsityCallback
from sar_fast.lab.training.models import load_model
from sar_fast.lab.training.trainers import ControlSFTTrainer, SFTTrainer
from tests.training.qwen_checkpoint import write_qwen


class Recorder(TrainerCallback):
    """Keeps the batches of a run that does not shuffle."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.save([dict(batch) for _, batch in zip(range(args.max_steps), kwargs["train_dataloader"])], self.path)


def record(path: str, *words: str) -> None:
    from sar_fast.integrations.llamafactory.run import Run

    run = Run(words)
    run.callbacks.append(Recorder(path))
    run()


def ours(path: str, *flags: str) -> None:
    arguments = parse(flags)
    control = {name: value for name, value in vars(arguments.control).items() if name != "custom_trainer"}
    trainer = (ControlSFTTrainer if arguments.control.custom_trainer else SFTTrainer)(
        model=load_model(arguments),
        args=arguments.training,
        train_dataset=torch.load(path),
        data_collator=lambda batches: batches[0],
        **(control if arguments.control.custom_trainer else {}),
    )
    trainer.add_callback(GradientSparsityCallback(every=1))
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    {"checkpoint": lambda folder: write_qwen(Path(folder)), "record": record, "ours": ours}[sys.argv[1]](*sys.argv[2:])
