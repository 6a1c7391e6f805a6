"""What every evaluation does around its work: processes, folders of results, metadata."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from sar_fast.lab.io.stamps import file_stamp
from sar_fast.lab.io.weights import model_facts
from sar_fast.lab.run.arguments import EvaluationArguments
from sar_fast.lab.run.loading import dtype_name, sar_config_of, source_of, start_processes
from sar_fast.lab.run.results import ResultFolder
from sar_fast.lab.run.rules import rule_settings
from sar_fast.lab.run.run_metadata import commit, versions

logger = logging.getLogger(__name__)


class Session:
    """One run of a command, on all its processes: each makes one and calls its methods in this order.

    Attributes:
        state: this process's place among the others. metadata: of this session, once it has begun.
        folders: where results go.
    """

    def __init__(self, arguments: EvaluationArguments) -> None:
        self.arguments, self._clock = arguments, time.time()
        if arguments.use_sar:
            sar_config_of(arguments)
        self.state: PartialState = start_processes(arguments.device)
        self.folders: list[ResultFolder] = []
        self.metadata: dict[str, Any] = {}

    def open(
        self, path: str | Path, settings: Mapping[str, Any], products: Sequence[str] = (), work: str | None = None
    ) -> ResultFolder:
        """A folder for results of these settings (:class:`ResultFolder`); nothing is written before :meth:`begin`.

        ``ValueError`` if it holds results of other settings.
        """
        folder = ResultFolder(Path(path), settings, self.arguments.overwrite_output_dir, products, work)
        self.folders.append(folder)
        return folder

    def begin(self, what: str, total: int, pending: int) -> None:
        """Make the folders and write the session's metadata. All that can be wrong with the input has been found by
        then, the model loaded where one is needed, and everything that is read from the folders has been read."""
        device = "cpu" if self.state.device.type == "cpu" else torch.cuda.get_device_name(self.state.device)
        self.metadata = {
            "command": sys.argv,
            "versions": versions(),
            "commit": commit(),
            "seed": self.arguments.seed,
            "world_size": self.state.num_processes,
            "device": device,
            "configuration": self.arguments.to_dict(),
            "samples": pending,
            "started": now(),
        }
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            for folder in self.folders:
                folder.prepare()
        self._write()
        self.state.wait_for_everyone()
        for folder in self.folders:
            folder.begin()
        if self.state.is_main_process:
            logger.info("%s: %d samples, %d done already", what, total, total - pending)

    def note(self, **facts: Any) -> None:
        """Add to the metadata what is known only now."""
        self.metadata |= facts
        self._write()

    def worked(self) -> bool:
        """Wait until every process is done with its share; whether this is the one that puts them together."""
        self.state.wait_for_everyone()
        return self.state.is_main_process

    def finish(self) -> None:
        """The results are there."""
        self.note(finished=now(), seconds=round(time.time() - self._clock, 3))

    def _write(self) -> None:
        if self.state.is_main_process:
            for folder in self.folders:
                folder.write_session(self.metadata)


def model_settings(arguments: EvaluationArguments) -> dict[str, Any]:
    """What records of any evaluation depend on: the model, how it runs and what it is asked in."""
    return {
        **model_facts(source_of(arguments)),
        "dtype": dtype_name(arguments),
        "sar": sar_settings(arguments) if arguments.use_sar else None,
        "template": file_stamp(Path(arguments.template)) if arguments.template else None,  # None: the model's own
        "max_samples": arguments.max_samples,
    }


def sar_settings(arguments: EvaluationArguments) -> dict[str, Any]:
    """SAR's options, and of a rule what tells it from others of its name."""
    if arguments.sar_weighting is None:
        return arguments.sar_config().to_dict()
    return rule_settings(arguments.sar_weighting, sar_config_of(arguments))


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
