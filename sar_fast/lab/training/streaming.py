"""Datasets that are read as they come: mixed, shuffled within a buffer, and encoded one record at a time."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from sar_fast.lab.training.checking import encode
from sar_fast.lab.training.encoding import Encoder, TooLong
from sar_fast.lab.training.mixing import Mix, mixed, shuffled

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]


class RecordStream(IterableDataset):
    """Records of several datasets, each read from its start whenever it is needed.

    Passes are in an order that depends on ``seed`` and the pass alone, so a run that is resumed goes on exactly. Each
    worker of a DataLoader reads everything and keeps every so manyth record: one file keeps all workers busy.

    Args:
        sources: (name, function that reads the dataset's records); none is empty.
        mix: how several are mixed.
        buffer_size: of the shuffling; 1 keeps the order.
        endless: begin again after the last record, in another order. Otherwise one pass.
        announce: log when a dataset begins again.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, Callable[[], Iterator[Record]]]],
        mix: Mix = Mix(),  # noqa: B008  (frozen)
        buffer_size: int = 1,
        seed: int = 0,
        endless: bool = False,
        announce: bool = True,
    ) -> None:
        self.names, self.sources = zip(*sources)
        self.mix, self.buffer_size, self.seed = mix, buffer_size, seed
        self.endless, self.announce = endless, announce

    def __iter__(self) -> Iterator[Record]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        talks = self.announce and number == 0
        everything = itertools.chain.from_iterable(self._pass(turn, talks) for turn in self._turns(talks))
        return itertools.islice(everything, number, None, workers)

    def _turns(self, talks: bool) -> Iterator[int]:
        yield 0
        for turn in itertools.count(1) if self.endless else ():
            if talks:
                logger.info("stream: the data begin again, pass %d", turn + 1)
            yield turn

    def _pass(self, turn: int, talks: bool) -> Iterator[Record]:
        rng = random.Random(f"{self.seed}/{turn}")
        repeats = [0] * len(self.sources)

        def again(n: int) -> None:
            repeats[n] += 1
            if talks:
                logger.info("stream: dataset %r is repeated, time %d in this pass", self.names[n], repeats[n] + 1)

        return shuffled(mixed(self.sources, self.mix, rng, again), self.buffer_size, rng)


class EncodedStream(IterableDataset):
    """``{"features": model inputs}`` of a stream's records; too long ones are counted, logged and left out."""

    def __init__(self, records: RecordStream, encoder: Encoder) -> None:
        self.records, self.encoder = records, encoder

    def __iter__(self) -> Iterator[dict[str, Any]]:
        dropped = 0
        for seen, record in enumerate(self.records, start=1):
            try:
                yield {"features": encode(self.encoder, record)}
            except TooLong as error:
                dropped += 1
                if dropped & (dropped - 1) == 0:  # 1, 2, 4, 8, ...: a stream may have millions
                    logger.warning("%d of %d records dropped so far: %s: %s", dropped, seen, record["source"], error)

    def check(self) -> None:
        """Encode records in the order of their files up to the first that fits; ``ValueError`` if none does."""
        count = 0
        for source in self.records.sources:
            for record in source():
                try:
                    encode(self.encoder, record)
                    return
                except TooLong:
                    count += 1
        raise ValueError(f"dataset is empty: all {count} records are longer than max_length")
