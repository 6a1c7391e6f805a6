"""Datasets for the Trainer: records read once into Arrow, checked, and encoded when a batch asks for them."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, interleave_datasets, load_dataset
from datasets import List as ListOf
from datasets.exceptions import DatasetGenerationError
from torch import Tensor

from sar_fast.training.encoding import IGNORED, Encoder, TooLong
from sar_fast.training.records import RecordError, id_in_messages, read_rows, to_record
from sar_fast.training.registry import DatasetInfo

logger = logging.getLogger(__name__)

FEATURES = Features(
    {
        "source": Value("string"),  # where the record is from, for messages: "file, record 12 (id)"
        "id": Value("string"),
        "messages": ListOf({"role": Value("string"), "content": Value("string")}),
        "images": ListOf({"path": Value("string"), "bytes": Value("binary")}),
    }
)


def read_records(info: DatasetInfo, stamps: Sequence[tuple[str, int, int]] = ()) -> Iterator[dict[str, Any]]:
    """Records of one dataset; ``ValueError`` names the file and the record that is bad.

    ``stamps`` (file, size, time) are not read: they are in the arguments so that the cache notices a changed file.
    """
    for place, index, row in itertools.islice(_rows(info), info.num_samples):
        source = f"{place}, record {index}"
        if name := id_in_messages(row):
            source += f" (id {name})"
        try:
            record = to_record(row, info.layout, info.media_dir)
        except RecordError as error:
            raise ValueError(f"{source}: {error}") from error
        yield {"source": source, **record}


def _rows(info: DatasetInfo) -> Iterator[tuple[str, int, Any]]:
    if info.hub_id is not None:
        rows = load_dataset(info.hub_id, info.subset, split=info.split, streaming=True)
        yield from ((info.hub_id, index, row) for index, row in enumerate(rows))
        return
    for path in info.files:
        yield from ((str(path), index, row) for index, row in read_rows(path))


def load_records(infos: Sequence[DatasetInfo], streaming: bool = False, cache_dir: str | None = None) -> Any:
    """All datasets one after the other as one ``datasets.Dataset``, or as an ``IterableDataset`` when streaming.

    ``ValueError`` if there is no record at all (streaming finds out later).
    """
    stamps = [[(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in info.files] for info in infos]
    if streaming:
        streams = [
            IterableDataset.from_generator(read_records, features=FEATURES, gen_kwargs={"info": i}) for i in infos
        ]
        return streams[0] if len(streams) == 1 else interleave_datasets(streams, stopping_strategy="all_exhausted")
    parts = []
    for info, stamp in zip(infos, stamps):
        if next(read_records(info), None) is None:
            raise ValueError(
                f"dataset {info.name!r} is empty: no record in {info.hub_id or ', '.join(map(str, info.files))}"
            )
        arguments = {"info": info, "stamps": stamp}
        try:
            part = Dataset.from_generator(read_records, features=FEATURES, gen_kwargs=arguments, cache_dir=cache_dir)
        except DatasetGenerationError as error:
            raise error.__cause__ or error from error  # the record's own error, not "an error occurred"
        parts.append(part)
    return concatenate_datasets(parts)


def encode_dataset(records: Any, encoder: Encoder, num_proc: int | None = None) -> Any:
    """The records as a dataset of model inputs.

    A ``Dataset`` is encoded once in full to check every record and its length, then again, with pixels, when a batch
    asks for it: pixels are never stored. An ``IterableDataset`` is encoded as it comes. A record that is too long is
    left out, counted and logged, or with ``too_long="error"`` an error; any other bad record is an error that names it.
    """
    if isinstance(records, IterableDataset):
        names = list(FEATURES)
        return records.map(_StreamEncoder(encoder), remove_columns=names).filter(lambda row: row["kept"])
    verdicts = records.map(
        _Measure(encoder), remove_columns=records.column_names, num_proc=num_proc, desc="Checking records"
    )
    reasons = verdicts["dropped"]
    kept = [index for index, reason in enumerate(reasons) if not reason]
    dropped = [reason for reason in reasons if reason]
    if dropped:
        logger.warning("%d of %d records dropped, the first: %s", len(dropped), len(reasons), dropped[0])
    if not kept:
        raise ValueError(f"dataset is empty: all {len(reasons)} records are longer than max_length")
    encoded = records.select(kept).with_transform(_BatchEncoder(encoder))
    return encoded


class _Measure:
    """(row) -> its length, and why it is dropped; picklable, for several processes."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return {"length": len(_encode(self.encoder, row)["input_ids"]), "dropped": ""}
        except TooLong as error:
            return {"length": 0, "dropped": f"{row['source']}: {error}"}


class _BatchEncoder:
    """Transform of a ``Dataset``: a batch of columns of records to a batch of columns of model inputs."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
        return {"features": [_encode(self.encoder, row) for row in rows]}


class _StreamEncoder:
    """(row) -> its model inputs, or ``kept`` False for one that is too long; counts and logs those."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.count: Counter[str] = Counter()

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        self.count["seen"] += 1
        try:
            return {"features": _encode(self.encoder, row), "kept": True}
        except TooLong as error:
            self.count["dropped"] += 1
            logger.warning("%d of %d records dropped so far: %s", self.count["dropped"], self.count["seen"], error)
            return {"features": None, "kept": False}


def _encode(encoder: Encoder, row: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return encoder(row)
    except TooLong as error:
        if encoder.too_long == "error":
            raise ValueError(f"{row['source']}: {error}") from error
        raise
    except RecordError as error:
        raise ValueError(f"{row['source']}: {error}") from error


class Collator:
    """Pads token lists on the right and joins the vision inputs of a batch.

    Vision tensors of all samples are concatenated along their first dimension (images, patches or samples, as the
    family's processor has it); where later dimensions differ (number of tiles, of images) they are padded with zeros.
    Samples without images may stand anywhere in the batch.

    Args:
        pad_token_id: fills ``input_ids``.
        pad_to_multiple_of: rounds the length of the batch up.
        packing: put the samples of a batch into one row, one after the other, without padding. ``position_ids`` start
            again with every sample, and there is no ``attention_mask``: that is how transformers, and SAR, tell the
            samples apart.
        blank: encoded sample of a blank image whose tokens are appended, masked out, to the first row of a batch
            without any image. ZeRO-3 needs it: a rank that skips the vision encoder would leave the others waiting.
    """

    def __init__(
        self,
        pad_token_id: int,
        pad_to_multiple_of: int | None = None,
        packing: bool = False,
        blank: Mapping[str, Any] | None = None,
    ) -> None:
        if packing and (blank is not None or pad_to_multiple_of is not None):
            raise ValueError("packing leaves no padding: it goes with neither blank nor pad_to_multiple_of")
        self.pad_token_id, self.multiple, self.blank = pad_token_id, pad_to_multiple_of or 1, blank
        self.packing = packing

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """``{"input_ids", "attention_mask", "labels"}`` (B, S) int64, and the vision inputs."""
        rows = [dict(sample.get("features", sample)) for sample in samples]
        vision_names = [n for n in dict.fromkeys(n for row in rows for n in row) if not _per_token(rows, n)]
        if self.blank is not None and not vision_names:
            rows[0], vision_names = self._with_blank(rows[0])
        per_token = [n for n in dict.fromkeys(n for row in rows for n in row) if n not in vision_names]
        length = -(-max(len(row["input_ids"]) for row in rows) // self.multiple) * self.multiple
        if self.packing:
            rows = [_packed(rows, per_token), *({n: row[n] for n in vision_names if n in row} for row in rows)]
            per_token = [*(n for n in per_token if n != "attention_mask"), "position_ids"]
            batch = {name: torch.tensor([rows[0][name]]) for name in per_token}
            return batch | self._vision(rows[1:], vision_names)
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED}
        batch = {
            name: torch.tensor([list(row[name]) + [fill.get(name, 0)] * (length - len(row[name])) for row in rows])
            for name in per_token
        }
        return batch | self._vision(rows, vision_names)

    def _vision(self, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Tensor]:
        return {name: join_padded([torch.as_tensor(row[name]) for row in rows if name in row]) for name in names}

    def _with_blank(self, row: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        vision_names = [n for n in self.blank if not _per_token([self.blank], n)]
        count = len(self.blank["input_ids"])
        hidden = {"labels": [IGNORED] * count, "attention_mask": [0] * count}
        longer = {n: list(row[n]) + list(hidden[n] if n in hidden else self.blank[n]) for n in row}
        return {**longer, **{n: self.blank[n] for n in vision_names}}, vision_names


def _packed(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[int]]:
    """The token lists of all samples joined, and the positions of each."""
    joined = {name: [x for row in rows for x in row[name]] for name in names}
    return {**joined, "position_ids": [n for row in rows for n in range(len(row["input_ids"]))]}


def _per_token(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return all(isinstance(row[name], list) and len(row[name]) == len(row["input_ids"]) for row in rows if name in row)


def join_padded(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one rank joined along dimension 0, the others padded at the end with zeros to the largest."""
    sizes = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors))]
    joined = tensors[0].new_zeros(sum(t.shape[0] for t in tensors), *sizes)
    start = 0
    for tensor in tensors:
        joined[(slice(start, start + tensor.shape[0]), *(slice(0, n) for n in tensor.shape[1:]))] = tensor
        start += tensor.shape[0]
    return joined
