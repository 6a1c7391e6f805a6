"""Every record is encoded once before training: bad ones are named, too long ones left out, lengths kept.

What is found depends on the records, on what their pictures hold and on the encoder. ``datasets`` keeps it in its cache
under a hash of all three, so a picture that was replaced, emptied or deleted since is looked at again, whatever its
size and times say.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset
from tqdm.auto import tqdm

from sar_fast.lab.io.records import RecordError
from sar_fast.lab.io.stamps import file_stamp, stamp
from sar_fast.lab.run.run_metadata import versions
from sar_fast.lab.training.encoding import Encoder, TooLong

logger = logging.getLogger(__name__)

MANY = 1000  # pictures, from which on reading them shows its progress
LENGTH = "length"  # column: tokens of the encoded record; the Trainer's name for it


class BadRecord(ValueError):
    """A record that cannot be trained on; one line, which begins with where the record is from."""

    @property
    def line(self) -> str:
        """The message; a worker of a DataLoader puts its traceback before it."""
        return str(self).strip().splitlines()[-1].removeprefix(f"{type(self).__module__}.{type(self).__name__}: ")


@contextlib.contextmanager
def ending_at_a_bad_record() -> Iterator[None]:
    """A record that went bad while a run was under way ends it with one line on stderr and exit code 2."""
    try:
        yield
    except BadRecord as error:
        sys.stderr.write(f"\nerror: {error.line}\n")  # a progress bar may stand on the line
        raise SystemExit(2) from error


def encode(encoder: Encoder, record: Mapping[str, Any]) -> dict[str, Any]:
    """Model inputs of a record; :class:`BadRecord` names it, :class:`TooLong` if it is to be left out."""
    try:
        return encoder(record)
    except TooLong as error:
        if encoder.too_long == "error":
            raise bad(record, error) from error
        raise
    except RecordError as error:
        raise bad(record, error) from error


def bad(record: Mapping[str, Any], reason: Exception | str) -> BadRecord:
    """The error that names a record."""
    return BadRecord(f"{record['source']}: {' '.join(str(reason).split())}")


def check_records(
    records: Dataset, encoder: Encoder, num_proc: int | None = None, pictures: str | None = None
) -> Dataset:
    """The records that fit, with a column ``length``; what is dropped is counted and logged.

    ``pictures`` is their :func:`pictures_stamp`, if it is known.
    ``ValueError`` if none is left; :class:`BadRecord` names one that cannot be encoded.
    """
    measure = _Measure(encoder, pictures_stamp(records) if pictures is None else pictures)
    verdicts = records.map(measure, remove_columns=records.column_names, num_proc=num_proc, desc="Checking records")
    reasons = verdicts["dropped"][:]
    dropped = [reason for reason in reasons if reason]
    if len(dropped) == len(reasons):
        raise ValueError(f"dataset is empty: all {len(reasons)} records are longer than max_length; {dropped[0]}")
    if dropped:
        logger.warning("%d of %d records dropped, the first: %s", len(dropped), len(reasons), dropped[0])
    measured = records.add_column(LENGTH, verdicts[LENGTH][:])
    return measured.select([index for index, reason in enumerate(reasons) if not reason]) if dropped else measured


def records_stamp(records: Dataset) -> str:
    """A hash of what is said in the records, in their order, whatever file and columns it is from."""
    turns = records.select_columns(["messages"])
    return stamp([stamp(batch["messages"]) for batch in turns.iter(batch_size=1000)])


def pictures_stamp(records: Dataset) -> str:
    """A hash of what the records' picture files hold; a missing one counts as such.

    Pictures inside the records are part of these and not read again. Files are read in threads: an epoch reads
    them all anyway.
    """
    paths = pc.struct_field(pc.list_flatten(records.data.column("images")), "path")
    files = paths.drop_null().unique().to_pylist()
    with ThreadPoolExecutor(8) as threads:
        read = tqdm(threads.map(_content, files), "Reading pictures", len(files), disable=len(files) < MANY)
        return stamp(list(read))


def _content(path: str) -> str | None:
    try:
        return file_stamp(Path(path))
    except OSError:  # missing, a folder, not ours to read: the check says which
        return None


class _Measure:
    """(record) -> its length, and why it is dropped. Its pickled state is what the cached verdicts depend on."""

    def __init__(self, encoder: Encoder, pictures: str) -> None:
        self.encoder, self.pictures, self.versions = encoder, pictures, versions()

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return {LENGTH: len(encode(self.encoder, record)["input_ids"]), "dropped": ""}
        except TooLong as error:
            return {LENGTH: 0, "dropped": f"{record['source']}: {error}"}
