from typing import Any

from llamafactory.hparams import get_train_args
from llamafactory.train.sft.workflow import run_sft

EXPORTED: list[Any] = []


def run_exp(args: Any = None, callbacks: Any = None) -> None:
    run_sft(*get_train_args(args), callbacks=callbacks)


def export_model(args: Any = None) -> None:
    EXPORTED.append(args)
