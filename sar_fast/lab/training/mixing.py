"""Several datasets as one: in which order their records come, which are repeated, and how they are shuffled."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from sar_fast.base.errors import ArgumentError

Item = TypeVar("Item")
STRATEGIES = ("concat", "interleave_under", "interleave_over")
_END = object()


@dataclasses.dataclass(frozen=True)
class Mix:
    """How datasets are mixed, in LLaMA-Factory's words.

    Args:
        strategy: ``"concat"`` takes every record once. ``"interleave_under"`` takes records of the datasets in turn and
            ends when one has no more; ``"interleave_over"`` begins that one again and ends when each was read once.
        probabilities: of the dataset that the next record is from, one for each, adding up to 1; None takes turns.
    """

    strategy: str = "concat"
    probabilities: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ArgumentError("mix_strategy", repr(self.strategy), f"be one of {', '.join(STRATEGIES)}")
        shares = self.probabilities
        if shares is None:
            return
        if self.strategy == "concat":
            raise ArgumentError("mix_strategy", "concat", "be an interleave one with {interleave_probs}")
        if not all(share > 0 for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
            raise ArgumentError("interleave_probs", self._shares(), "be above 0 and add up to 1")

    @classmethod
    def of(cls, strategy: str, probabilities: str | None) -> Mix:
        """From the flags: ``probabilities`` are numbers separated by commas."""
        try:
            shares = None if probabilities is None else tuple(map(float, probabilities.split(",")))
        except ValueError as error:
            raise ArgumentError("interleave_probs", repr(probabilities), "be numbers like 0.7,0.3") from error
        return cls(strategy, shares)

    def check(self, datasets: int) -> None:
        """``ValueError`` unless this is a way to mix so many datasets."""
        if self.strategy != "concat" and datasets == 1:
            raise ArgumentError("mix_strategy", self.strategy, "be left out for one dataset, on which it has no effect")
        if self.probabilities is not None and len(self.probabilities) != datasets:
            raise ArgumentError("interleave_probs", self._shares(), f"be {datasets} numbers, one a dataset")

    def describe(self) -> str:
        """For the log."""
        if self.strategy == "concat":
            return "concat, every record once"
        return f"{self.strategy}, {'in turn' if self.probabilities is None else f'shares {self._shares()}'}"

    def _shares(self) -> str:
        return ",".join(f"{share:g}" for share in self.probabilities or ())


def mixed(
    sources: Sequence[Callable[[], Iterator[Item]]], mix: Mix, rng: random.Random, again: Callable[[int], None]
) -> Iterator[Item]:
    """Items of all sources, each a function that reads it from its start; ``again(n)`` is told when n begins again.

    No source is empty.
    """
    if mix.strategy == "concat":
        yield from itertools.chain.from_iterable(source() for source in sources)
        return
    readers = [source() for source in sources]
    ahead = [next(reader) for reader in readers]  # a source is known to end when its last item is taken
    finished: set[int] = set()
    enough = 1 if mix.strategy == "interleave_under" else len(sources)
    for n in _turns(len(sources), mix.probabilities, rng):
        if ahead[n] is _END:
            again(n)
            readers[n] = sources[n]()
            ahead[n] = next(readers[n])
        yield ahead[n]
        ahead[n] = next(readers[n], _END)
        if ahead[n] is _END:
            finished.add(n)
            if len(finished) == enough:
                return


def _turns(count: int, probabilities: Sequence[float] | None, rng: random.Random) -> Iterator[int]:
    if probabilities is None:
        yield from itertools.cycle(range(count))
    while True:
        yield from rng.choices(range(count), probabilities)


def shuffled(items: Iterator[Item], buffer_size: int, rng: random.Random) -> Iterator[Item]:
    """The items in random order, as far as a buffer of ``buffer_size`` of them reaches; 1 leaves the order."""
    buffer: list[Item] = []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
            continue
        place = rng.randrange(buffer_size)
        yield buffer[place]
        buffer[place] = item
    rng.shuffle(buffer)
    yield from buffer
