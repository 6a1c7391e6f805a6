"""What every evaluation does around its work: processes, folders of results, metadata."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.io.output_dir import unwritable
from sar_fast.lab.run.results import ResultFolder
from sar_fast.lab.run.run_metadata import commit, versions

logger = logging.getLogger(__name__)


class Session:
    """One run of an experiment, on all its processes: each makes one and calls its methods in this order.

    Attributes:
        configuration: what was asked for, as plain values. seed: of everything that is random.
        overwrite: delete the results of an earlier experiment in the folders.
        state: this process's place among the others. metadata: of this session, once it has begun.
        folders: where results go.
    """

    def __init__(self, configuration: Mapping[str, Any], state: PartialState, *, seed: int, overwrite: bool) -> None:
        self.configuration, self.state, self.seed, self.overwrite = configuration, state, seed, overwrite
        self._clock = time.time()
        self.folders: list[ResultFolder] = []
        self.metadata: dict[str, Any] = {}

    def open(
        self, path: str | Path, settings: Mapping[str, Any], products: Sequence[str] = (), work: str | None = None
    ) -> ResultFolder:
        """A folder for results of these settings (:class:`ResultFolder`); nothing is written before :meth:`begin`.

        ``ValueError`` if it holds results of other settings.
        """
        folder = ResultFolder(Path(path), settings, self.overwrite, products, work)
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
            "seed": self.seed,
            "world_size": self.state.num_processes,
            "device": device,
            "configuration": dict(self.configuration),
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


def start_processes(device: str) -> PartialState:
    """This process's place among those of ``accelerate launch`` or ``torchrun``; alone without one of them."""
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=True) if on_cpu else PartialState()  # without cpu=True it ignores the launcher there
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != started:
        raise ValueError(f"WORLD_SIZE is {started}, but {state.num_processes} process(es) found each other")
    if state.num_processes > 1 and device not in ("auto", "cpu"):
        raise ArgumentError(
            "device", f"{device!r} for {state.num_processes} processes", "be auto: each process needs its own"
        )
    return state


def processes_of(model: nn.Module) -> PartialState:
    """:func:`start_processes` for a model that is on its device already."""
    return start_processes("cpu" if model.device.type == "cpu" else "auto")


@contextlib.contextmanager
def folder_or_none(folder: str | Path | None, overwrite: bool, state: PartialState) -> Iterator[Path]:
    """Where an experiment works: the caller's folder, or without one a folder that is gone afterwards.

    ``ArgumentError``: nothing can be written there; ``overwrite``, or several processes, without a folder.
    """
    if folder is None:
        if overwrite:
            raise ArgumentError("overwrite", overwrite, "be left out without {folder}")
        if state.num_processes > 1:
            raise ArgumentError("folder", folder, "be given where several processes share the work")
        with tempfile.TemporaryDirectory() as place:
            yield Path(place)
        return
    if (why := unwritable(folder)) is not None:
        raise ArgumentError("folder", f"{str(folder)!r}: {why}", "be a folder to write into")
    yield Path(folder).expanduser()


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
