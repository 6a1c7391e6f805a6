"""Datasets for the Trainer: records read once into Arrow, checked, and encoded when a batch asks for them."""

from __future__ import annotations

import functools
import itertools
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset
from datasets import List as ListOf
from datasets.exceptions import DatasetGenerationError
from torch import Tensor

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.io.datasets import DatasetInfo
from sar_fast.lab.io.records import RecordError, id_in_messages, read_rows, to_record
from sar_fast.lab.training.checking import LENGTH, bad, check_records, encode, pictures_stamp, records_stamp
from sar_fast.lab.training.encoding import IGNORED, Encoder, TooLong
from sar_fast.lab.training.mixing import Mix, mixed
from sar_fast.lab.training.streaming import EncodedStream, RecordStream

logger = logging.getLogger(__name__)

FEATURES = Features(
    {
        "source": Value("string"),  # where the record is from, for messages: "file, record 12 (id)"
        "id": Value("string"),
        "messages": ListOf({"role": Value("string"), "content": Value("string")}),
        "images": ListOf({"path": Value("string"), "bytes": Value("binary")}),
    }
)
CONCAT = Mix()


def read_records(info: DatasetInfo, stamps: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Records of one dataset; ``ValueError`` names the file and the record that is bad.

    ``stamps``, hashes of the files, are not read: they are in the arguments so that the cache notices a changed file.
    """
    for place, index, row in itertools.islice(_rows(info), info.num_samples):
        source = f"{place}, record {index}"
        if name := id_in_messages(row):
            source += f" (id {name})"
        try:
            record = to_record(row, info.layout, info.media_dir)
        except RecordError as error:
            raise bad({"source": source}, error) from error
        yield {"source": source, **record}


def _rows(info: DatasetInfo) -> Iterator[tuple[str, int, Any]]:
    if info.hub_id is not None:
        rows = load_dataset(info.hub_id, info.subset, split=info.split, streaming=True)
        yield from ((info.hub_id, index, row) for index, row in enumerate(rows))
        return
    yield from ((info.name, index, row) for index, row in enumerate(info.rows))
    for path in info.files:
        yield from ((str(path), index, row) for index, row in read_rows(path))


def load_records(infos: Sequence[DatasetInfo], streaming: bool = False, cache_dir: str | None = None) -> Any:
    """All datasets one after the other as one ``datasets.Dataset``, or as a :class:`RecordStream` when streaming.

    ``ValueError`` for a dataset without any record.
    """
    if streaming:
        return _stream(infos)
    return concatenate_datasets([_load(info, cache_dir) for info in infos])


def _stream(infos: Sequence[DatasetInfo], **options: Any) -> RecordStream:
    for info in infos:
        _refuse_empty(info)
    return RecordStream([(info.name, functools.partial(read_records, info)) for info in infos], **options)


def _load(info: DatasetInfo, cache_dir: str | None) -> Dataset:
    _refuse_empty(info)
    arguments = {"info": info, "stamps": info.content}
    try:
        return Dataset.from_generator(read_records, features=FEATURES, gen_kwargs=arguments, cache_dir=cache_dir)
    except DatasetGenerationError as error:
        raise error.__cause__ or error from error  # the record's own error, not "an error occurred"


def _refuse_empty(info: DatasetInfo) -> None:
    if next(read_records(info), None) is None:
        raise ValueError(
            f"dataset {info.name!r} is empty: no record in {info.hub_id or ', '.join(map(str, info.files)) or 'it'}"
        )


def encode_dataset(records: Any, encoder: Encoder, num_proc: int | None = None) -> Any:
    """The records as a dataset of model inputs.

    A ``Dataset`` is encoded once in full to check every record and its length, then again, with pixels, when a batch
    asks for it: pixels are never stored. A :class:`RecordStream` is encoded as it comes. A record that is too long is
    left out, counted and logged, or with ``too_long="error"`` an error; any other bad record is an error that names it.
    """
    if isinstance(records, RecordStream):
        stream = EncodedStream(records, encoder)
        stream.check()
        return stream
    return EncodedDataset(check_records(records, encoder, num_proc), encoder)


def training_dataset(
    infos: Sequence[DatasetInfo],
    encoder: Encoder,
    mix: Mix = CONCAT,
    seed: int = 0,
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> EncodedDataset:
    """The datasets, each checked, as one of model inputs; the log says how they are mixed.

    ``interleave`` strategies choose records that fit, once for the whole run, by ``seed``.
    """
    mix.check(len(infos))
    loaded = [_load(info, cache_dir) for info in infos]
    stamps = {"records": list(map(records_stamp, loaded)), "pictures": list(map(pictures_stamp, loaded))}
    parts = [check_records(records, encoder, num_proc, stamp) for records, stamp in zip(loaded, stamps["pictures"])]
    records = concatenate_datasets(parts)
    if len(parts) > 1:
        ends = list(itertools.accumulate(map(len, parts)))
        spans = [range(end - len(part), end) for part, end in zip(parts, ends)]
        order = list(mixed([span.__iter__ for span in spans], mix, random.Random(seed), lambda n: None))
        records = records if mix.strategy == "concat" else records.select(order)
        _tell(mix, infos, spans, order)
    return EncodedDataset(records, encoder, stamps)


def training_stream(
    infos: Sequence[DatasetInfo],
    encoder: Encoder,
    mix: Mix = CONCAT,
    seed: int = 0,
    buffer_size: int = 1,
    announce: bool = True,
) -> EncodedStream:
    """The datasets as an endless stream of model inputs; arguments are those of :class:`RecordStream`."""
    mix.check(len(infos))
    if announce:
        names = ", ".join(info.name for info in infos)
        logger.info("stream of %s: %s, shuffled in a buffer of %d records", names, mix.describe(), buffer_size)
        if len(infos) > 1 and mix.strategy == "concat":
            logger.warning("stream: concat reads one dataset after the other; mix_strategy interleave_... mixes them")
    records = _stream(infos, mix=mix, seed=seed, buffer_size=buffer_size, endless=True, announce=announce)
    return encode_dataset(records, encoder)


def _tell(mix: Mix, infos: Sequence[DatasetInfo], spans: Sequence[range], order: Sequence[int]) -> None:
    """Log what an epoch of a mix takes of each dataset."""
    logger.info("mix of %d datasets: %s; %d records an epoch", len(infos), mix.describe(), len(order))
    taken = Counter(order)
    for info, span in zip(infos, spans):
        uses = [taken[index] for index in span]
        most = f", each up to {max(uses)} times" if max(uses) > 1 else ""
        logger.info("  %s: %d of %d records%s", info.name, sum(map(bool, uses)), len(span), most)


class EncodedDataset(Dataset):
    """Checked records, encoded when they are asked for: rows are ``{"features": model inputs}``.

    The column ``length`` is read without encoding anything: the Trainer sorts by it.
    ``stamps`` are hashes of what its parts hold, "records" and "pictures", where they were taken.
    """

    def __init__(
        self, records: Dataset, encoder: Encoder, stamps: Mapping[str, Sequence[str]] = MappingProxyType({})
    ) -> None:
        super().__init__(records.data, records.info, records.split, records._indices, records._fingerprint)
        self._lengths: list[int] = records[LENGTH][:]
        self.stamps = stamps
        self.set_transform(_BatchEncoder(encoder))

    def __getitem__(self, key: Any) -> Any:
        return self._lengths if key == LENGTH else super().__getitem__(key)


class _BatchEncoder:
    """Transform of a ``Dataset``: a batch of columns of records to a batch of columns of model inputs."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
        return {"features": [self._encode(row) for row in rows]}

    def _encode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return encode(self.encoder, row)
        except TooLong as error:
            raise bad(row, f"{error}: it fitted when the records were checked") from error


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
            So do SAR's rules that learn from statistics: a pass without pictures has none.
    """

    def __init__(
        self,
        pad_token_id: int,
        pad_to_multiple_of: int | None = None,
        packing: bool = False,
        blank: Mapping[str, Any] | None = None,
    ) -> None:
        if packing and (blank is not None or pad_to_multiple_of is not None):
            raise ArgumentError("packing", True, "be False with {blank} or {pad_to_multiple_of}: it leaves no padding")
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
