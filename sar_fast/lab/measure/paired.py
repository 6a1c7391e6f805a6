"""Whether two ways of answering the same questions differ: paired differences, their intervals, corrected tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from sar_fast.base.errors import ArgumentError
from sar_fast.base.extras import need

RESAMPLES = 9999


@dataclasses.dataclass(frozen=True)
class Difference:
    """A mean difference over questions, its 95 % interval (percentile bootstrap over questions), and the p-value of a
    two-sided permutation test of paired answers (signs flipped at random)."""

    mean: float
    low: float
    high: float
    p: float


def paired_difference(before: np.ndarray, after: np.ndarray, *, seed: int = 0) -> Difference:
    """How much more often ``after`` is right than ``before``.

    Args:
        before, after: (questions,) or (runs, questions), numbers or bool. Runs (training seeds) answer the same
            questions, so a question's mean over runs is what is resampled.

    ``ArgumentError`` if the shapes differ or there are no questions.
    """
    before, after = np.atleast_2d(np.asarray(before, dtype=float)), np.atleast_2d(np.asarray(after, dtype=float))
    if before.shape != after.shape or before.size == 0:
        raise ArgumentError("after", after.shape, f"have the questions of before, {before.shape}")
    d = (after - before).mean(0)
    if not d.any():
        return Difference(0.0, 0.0, 0.0, 1.0)
    need("a paired test", "scipy")
    from scipy import stats

    rng = np.random.default_rng(seed)
    low, high = _bootstrap(d, rng)
    test = stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, batch=100, rng=rng, vectorized=True
    )
    return Difference(float(d.mean()), low, high, float(test.pvalue))


def interval_of_share(right: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): the share of right answers with its 95 % interval, (questions,) or (runs, questions)."""
    means = np.atleast_2d(np.asarray(right, dtype=float)).mean(0)
    if (means == means[0]).all():
        return float(means[0]), float(means[0]), float(means[0])
    return float(means.mean()), *_bootstrap(means, np.random.default_rng(seed))


def _bootstrap(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95 % interval of the mean."""
    need("a bootstrap interval", "scipy")
    from scipy import stats

    found = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", batch=100, rng=rng)
    low, high = found.confidence_interval
    return float(low), float(high)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values by name, corrected for their number (Holm 1979): each at least as large as it was, at most 1."""
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p}
