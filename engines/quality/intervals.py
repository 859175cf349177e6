"""How sure a figure is: intervals and a test, for a few dozen samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

_RESAMPLES = 2000
_Z = 1.959964
"""Of a two-sided 95% interval."""


@dataclass(frozen=True)
class Mean:
    """A mean with its 95% interval.

    Attributes:
        low, high: None where there is a single sample, which tells nothing of its spread.
    """

    value: float
    low: float | None
    high: float | None


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Mean:
    """The mean of some samples, with the percentile bootstrap of 2,000 resamples.

    Raises:
        ValueError: there is no sample.
    """
    if not values:
        raise ValueError("values: there is none to take the mean of")
    samples = np.asarray(values, dtype=np.float64)
    if len(samples) == 1:
        return Mean(float(samples[0]), None, None)
    drawn = np.random.default_rng(seed).integers(0, len(samples), (_RESAMPLES, len(samples)))
    low, high = np.quantile(samples[drawn].mean(axis=1), (0.025, 0.975))
    return Mean(float(samples.mean()), float(low), float(high))


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson, 1927); (0, 1) where nothing was tried."""
    if trials == 0:
        return 0.0, 1.0
    share, square = successes / trials, _Z * _Z
    scale = 1 + square / trials
    middle = (share + square / (2 * trials)) / scale
    reach = _Z * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials)) / scale
    return max(0.0, middle - reach), min(1.0, middle + reach)


def sign_test(successes: int, trials: int) -> float:
    """The two-sided binomial p-value of a fair coin that shows at least so uneven a result; 1 without trials."""
    tail = sum(math.comb(trials, count) for count in range(min(successes, trials - successes) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**trials)))
