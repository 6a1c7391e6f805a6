"""Statistics of attention rows over the visual keys, for rules that ask for more (docs/row_statistics.md).

A statistic is a differentiable function of one block of queries against the visual keys; no attention matrix is built.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import weakref

import torch
from torch import Tensor

from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.method.values import Call

QUERIES = ("text", "last")
_live: weakref.WeakValueDictionary[str, RowStatistic] = weakref.WeakValueDictionary()
_numbers = itertools.count()


@dataclasses.dataclass(eq=False)
class Rows:
    """Some counted queries of one sample, the heads of one group, against the visual keys. Not to be changed in place.

    Attributes:
        q: (h, r, D) queries in the accumulate dtype (fp32, fp64 for fp64 input).
        k: (n, D) the sample's visual keys that are not padding, of the head that the group reads.
        lse: (h, r) log-sum-exp over all keys that each query sees.
        visible: (r, n) bool, which keys each query sees, or None if each sees all; at least two.
        keys: (n,) int64 ascending, the keys' positions in the sequence.
        queries: (r,) int64 ascending, the queries' positions among the sequence's queries.
        sample: the row of the batch, or the number of the packed sequence.
        heads: the group's query heads.
        first_key: where the sequence begins among packed keys; 0 otherwise.
        scale, softcap: how scores are made; softcap 0.0 is off.
        bad: (h, r, n) bool, pairs whose query or key was not finite before 0 took its place, or None.
    """

    q: Tensor
    k: Tensor
    lse: Tensor
    visible: Tensor | None
    keys: Tensor
    queries: Tensor
    sample: int
    heads: range
    first_key: int
    scale: float
    softcap: float
    bad: Tensor | None = None

    @functools.cached_property
    def _parts(self) -> tuple[Tensor, Tensor]:
        """Scores as (h, r, n) + (h, r): what keys have in common is kept apart, so that it costs the rest no digits."""
        q, centre = self.q * self.scale, self.k.detach().mean(0)
        s, shift = q @ (self.k - centre).T, q @ centre
        if self.softcap > 0:  # acts on the sum, which leaves no shift
            s = self.softcap * torch.tanh((s + shift[..., None]) / self.softcap)
            shift = torch.zeros_like(shift)
        if self.bad is not None:
            s = s + torch.where(self.bad, torch.nan, 0)
        return s, shift

    def _shown(self, s: Tensor) -> Tensor:
        return s if self.visible is None else s.masked_fill(~self.visible, -torch.inf)

    @functools.cached_property
    def scores(self) -> Tensor:
        """(h, r, n) what softmax sees: scaled, soft-capped, -inf at keys that the query does not see."""
        s, shift = self._parts
        return self._shown(s + shift[..., None])

    @functools.cached_property
    def p(self) -> Tensor:
        """(h, r, n) attention, of a softmax over all keys that the query sees; 0 where it sees none."""
        s, shift = self._parts
        return self._shown(s + (shift - self.lse)[..., None]).exp()  # masked last: lse may be NaN

    @functools.cached_property
    def log_r(self) -> Tensor:
        """(h, r, n) logarithm of the attention within the visual keys, ``p_ij / sum_j p_ij``; -inf as in ``scores``.

        From the scores, so a row whose attention on pictures underflows has it too.
        """
        return torch.log_softmax(self._shown(self._parts[0]), dim=-1)


class RowStatistic(abc.ABC):
    """A number per head and query, from the query's row of attention over the visual keys. Subclass it.

    Attributes:
        name: the key of its values in ``StatisticsWithRows.rows``.
        queries: ``"text"``: its mean over the counted text queries; ``"last"``: its value at the last of them.
        tensors: what ``__call__`` needs beside the rows, such as a mask of keys; given to it after them. They are read
            when attention is called, so they may be replaced between calls, also of a compiled model. Nothing else of
            an instance may change between a call and its backward.
    """

    name: str
    queries: str = "text"
    tensors: tuple[Tensor, ...] = ()

    def __new__(cls, *args: object, **options: object) -> RowStatistic:
        statistic = super().__new__(cls)
        # operators take texts and tensors, so a text stands for it; a subclass may be a frozen dataclass
        object.__setattr__(statistic, "_id", f"{cls.__name__} {next(_numbers)}")
        _live[statistic._id] = statistic
        return statistic

    def __getstate__(self) -> dict[str, object]:
        """Without the id: a copy is a statistic of its own."""
        return {name: value for name, value in vars(self).items() if name != "_id"}

    def check(self, call: Call, *tensors: Tensor) -> None:
        """Raise if ``tensors`` do not fit a call: here, if they are elsewhere. Asked once per call, before its rows."""
        for x in tensors:
            if x.device != call.k.device:
                raise ArgumentError(f"tensors of {self.name!r}", x.device, f"be on {call.k.device}")

    @abc.abstractmethod
    def __call__(self, rows: Rows, *tensors: Tensor) -> Tensor:
        """(h, r) floating point, a differentiable function of ``rows.q``, ``rows.k`` and ``rows.lse``."""


class Mass(RowStatistic):
    """Attention on the visual keys, or on some of them: ``sum_j p_ij``.

    Args:
        keys: the chosen ones, such as those in a box: bool, aligned to the call's keys: (B, Sk), or (total_k,) of a
            packed call. Keys that are not visual do not count. A dense call may have more keys (decode): what was added
            is not chosen. None: all visual keys.
        name, queries: as in :class:`RowStatistic`.

    Raises:
        TypeError, ValueError: ``keys`` is no bool tensor of 1 or 2 dimensions; in a call, one that does not fit it.
    """

    def __init__(self, keys: Tensor | None = None, *, name: str = "mass", queries: str = "text") -> None:
        self.name, self.queries = name, queries
        self.keys = keys

    @property
    def keys(self) -> Tensor | None:
        """The chosen keys; may be replaced, for the calls that follow."""
        return self.tensors[0] if self.tensors else None

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        if keys is not None and not isinstance(keys, Tensor):
            raise ArgumentTypeError("keys", type(keys).__name__, "be a bool tensor or None")
        if keys is not None and keys.dtype != torch.bool:
            raise ArgumentTypeError("keys", keys.dtype, "be bool")
        if keys is not None and keys.dim() not in (1, 2):
            raise ArgumentError("keys", tuple(keys.shape), "have shape (batch, keys), or (total_k,) packed")
        self.tensors = () if keys is None else (keys,)

    def check(self, call: Call, keys: Tensor | None = None) -> None:
        if keys is None:
            return
        tokens = call.k.shape[0 if call.packed else 1]
        fits = keys.shape == (tokens,)
        if not call.packed:
            fits = keys.dim() == 2 and keys.shape[0] == call.batch_size and keys.shape[1] <= tokens
        if not fits:
            needed = f"({tokens},)" if call.packed else f"({call.batch_size}, at most {tokens})"
            raise ArgumentError(f"keys of {self.name!r}", tuple(keys.shape), f"have shape {needed}")
        if keys.device != call.k.device:
            raise ArgumentError(f"keys of {self.name!r}", keys.device, f"be on {call.k.device}")

    def chosen(self, call: Call, keys: Tensor | None = None) -> Tensor:
        """Which keys of a call count, beside being visual: its (B, Sk) or (total_k,) bool."""
        if keys is None:
            return call.roles.visual
        missing = call.k.shape[0 if call.packed else 1] - keys.shape[-1]
        return torch.nn.functional.pad(keys, (0, missing))

    def __call__(self, rows: Rows, keys: Tensor | None = None) -> Tensor:
        if keys is None:
            return rows.p.sum(-1)
        chosen = torch.nn.functional.pad(keys if keys.dim() == 1 else keys[rows.sample], (0, 1))
        at = (rows.keys + rows.first_key).clamp_max(chosen.shape[0] - 1)  # what was added is like the last: not chosen
        return rows.p @ chosen[at].to(rows.p.dtype)

    def __repr__(self) -> str:
        keys = "" if self.keys is None else f"keys {tuple(self.keys.shape)}, "
        return f"Mass({keys}name={self.name!r}, queries={self.queries!r})"


@dataclasses.dataclass(frozen=True)
class Entropy(RowStatistic):
    """Entropy of the attention within the visual keys, ``-sum_j r_ij ln r_ij`` with ``r_ij = p_ij / sum_j p_ij``."""

    name: str = "entropy"
    queries: str = "text"

    def __call__(self, rows: Rows) -> Tensor:
        log_r = rows.log_r
        if rows.visible is not None:
            log_r = log_r.masked_fill(~rows.visible, 0)
        return -(rows.log_r.exp() * log_r).sum(-1)


@dataclasses.dataclass(frozen=True)
class ScoreSum(RowStatistic):
    """Sum of the scores over the visual keys, in closed form ``scale * q_i . sum_j k_j`` where the query sees them all.

    By default of the last text query alone: O(n D) per group of heads, and no scores.
    """

    name: str = "score_sum"
    queries: str = "last"

    def __call__(self, rows: Rows) -> Tensor:
        if rows.visible is None and rows.softcap == 0 and rows.bad is None:
            return rows.q @ rows.k.sum(0) * rows.scale
        scores = rows.scores
        return (scores if rows.visible is None else scores.masked_fill(~rows.visible, 0)).sum(-1)


def check_row_statistics(statistics: object) -> tuple[RowStatistic, ...]:
    """A rule's ``row_statistics`` as a tuple.

    Raises:
        TypeError, ValueError: not a sequence of instances of :class:`RowStatistic`, names that are no text or not
            distinct, ``queries`` that do not exist.
    """
    if not isinstance(statistics, (tuple, list)):
        raise ArgumentTypeError("row_statistics", type(statistics).__name__, "be a tuple of RowStatistic")
    names: list[str] = []
    for statistic in statistics:
        if not isinstance(statistic, RowStatistic):
            got = statistic.__name__ if isinstance(statistic, type) else type(statistic).__name__
            raise ArgumentTypeError("row_statistics", got, "be instances of RowStatistic")
        name = getattr(statistic, "name", None)
        if not isinstance(name, str) or not name:
            raise ArgumentTypeError(
                "row_statistics", f"{name!r} from {type(statistic).__name__}", "have a name that is a text"
            )
        if name in names:
            raise ArgumentError("row_statistics", f"{name!r} twice", "have names that differ")
        if statistic.queries not in QUERIES:
            raise ArgumentError(
                "row_statistics", f"{statistic.queries!r} from {name!r}", "have queries 'text' or 'last'"
            )
        names.append(name)
    return tuple(statistics)


def recorded_rows(statistics: object, records: bool) -> tuple[RowStatistic, ...]:
    """The row statistics that a caller wants to be returned; ``ValueError`` where nothing is."""
    found = check_row_statistics(statistics)
    if found and not records:
        raise ArgumentError("row_statistics", "return_stats=False", "come with return_stats=True, which returns them")
    return found


def all_row_statistics(weighting: object, recorded: tuple[RowStatistic, ...] = ()) -> tuple[RowStatistic, ...]:
    """What a rule asks for and what is to be recorded, each once."""
    own = getattr(weighting, "row_statistics", ())
    if not own and not recorded:
        return ()
    found = list(check_row_statistics(own))
    found += [s for s in recorded if not any(s is other or s == other for other in found)]
    return check_row_statistics(found)


def find_row_statistic(key: str) -> RowStatistic:
    """The living statistic that an operator was given as a text."""
    statistic = _live.get(key)
    if statistic is None:
        raise RuntimeError(f"row statistic {key!r} is gone; a rule must hold what a compiled graph computes with")
    return statistic


BY_NAME = {statistic.name: statistic for statistic in (Mass(), Entropy(), ScoreSum())}  # of the whole picture


def named(statistics: object) -> tuple[RowStatistic, ...]:
    """Row statistics of which those of the whole picture may be given by name: "mass", "entropy", "score_sum"."""
    if isinstance(statistics, str) or not isinstance(statistics, (tuple, list)):
        raise ArgumentTypeError("row_statistics", type(statistics).__name__, "be a tuple of names or RowStatistic")
    unknown = [s for s in statistics if isinstance(s, str) and s not in BY_NAME]
    if unknown:
        raise ArgumentError("row_statistics", repr(unknown[0]), f"be one of {', '.join(BY_NAME)}, or an object")
    return check_row_statistics(tuple(BY_NAME[s] if isinstance(s, str) else s for s in statistics))


def names_of(statistics: tuple[RowStatistic, ...]) -> list[str]:
    """What :func:`named` inverts; ``ValueError`` for one that has no name there."""
    for statistic in statistics:
        if BY_NAME.get(statistic.name) is not statistic:
            raise ArgumentError(
                "row_statistics", repr(statistic), f"be one of {', '.join(BY_NAME)}, to be written by name"
            )
    return [statistic.name for statistic in statistics]
