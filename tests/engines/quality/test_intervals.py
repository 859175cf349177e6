"""Intervals and the sign test, against values that are known."""

from __future__ import annotations

import numpy as np
import pytest

from cinecat.engines.quality.intervals import Mean, bootstrap_mean, sign_test, wilson_interval


def test_a_bootstrap_interval_is_about_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, 100)
    mean = bootstrap_mean(list(values))
    assert mean.value == pytest.approx(values.mean())
    assert (mean.low, mean.high) == pytest.approx((mean.value - 0.19, mean.value + 0.19), abs=0.04)


def test_the_same_samples_have_the_same_interval() -> None:
    assert bootstrap_mean([1.0, 2.0, 4.0]) == bootstrap_mean([1.0, 2.0, 4.0])


def test_a_single_sample_has_no_interval() -> None:
    assert bootstrap_mean([2.0]) == Mean(2.0, None, None)
    with pytest.raises(ValueError, match="none"):
        bootstrap_mean([])


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(8, 10, 0.490, 0.943), (0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (0, 0, 0.0, 1.0)],
)
def test_wilson_intervals_are_those_of_the_tables(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-3)


@pytest.mark.parametrize(("successes", "trials", "p"), [(8, 10, 0.109375), (5, 10, 1.0), (0, 5, 0.0625), (0, 0, 1.0)])
def test_the_sign_test_is_two_sided_and_exact(successes: int, trials: int, p: float) -> None:
    assert sign_test(successes, trials) == pytest.approx(p)
    assert sign_test(trials - successes, trials) == pytest.approx(p)
