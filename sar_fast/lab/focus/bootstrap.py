"""Bootstrap confidence intervals over groups: samples about one picture are not independent."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from sar_fast.base.errors import ArgumentError

RESAMPLES = 2000


def interval_of_mean(
    values: Sequence[float], groups: Sequence[Hashable], *, level: float = 0.95, seed: int = 0
) -> list[float]:
    """[low, high] of the mean by the percentile bootstrap, whole groups resampled with replacement.

    Args:
        values: one per sample. groups: the picture, or whatever samples share, of each.
    """
    if len(values) != len(groups) or len(values) == 0:
        raise ArgumentError("values and groups", f"{len(values)} and {len(groups)}", "have the same length > 0")
    index = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    number = np.array([index[group] for group in groups])
    sums = np.bincount(number, weights=np.asarray(values, dtype=np.float64))
    counts = np.bincount(number).astype(np.float64)
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for r in range(RESAMPLES):  # one resample at a time: memory does not grow with the dataset
        drawn = rng.integers(0, len(sums), len(sums))
        means[r] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]
