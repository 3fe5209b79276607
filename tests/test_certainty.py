"""certainty.py against scipy, and against numbers worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import certainty
from certainty import holm, interval, sign_flip

NAMES = [f"s{i}" for i in range(40)]


def series(values):
    return pd.Series(values, NAMES[: len(values)], float)


def test_interval_is_a_bootstrap_over_patients():
    values = series(np.random.default_rng(3).gamma(2, 1, 40))
    each = pd.Series(values.index, values.index)  # a patient for every study
    low, high = interval(values, each)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    spread = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert abs(low - theirs.confidence_interval.low) < 0.06 * spread
    assert abs(high - theirs.confidence_interval.high) < 0.06 * spread
    wide = interval(values, each, level=0.99)
    assert wide[0] < low and wide[1] > high
    # Twins add nothing: of 20 patients with two equal studies each the interval is that of 20.
    twins = series(np.repeat(values[:20], 2).to_numpy())
    patients = pd.Series(np.repeat(NAMES[:20], 2), twins.index)
    single = interval(values[:20], each[:20])
    assert interval(twins, patients) == pytest.approx(single)
    assert interval(twins, pd.Series(twins.index, twins.index)) != pytest.approx(single, rel=0.01)


def test_a_patient_with_more_studies_weighs_more_in_the_mean_of_studies():
    """Two patients: every draw is one of three means."""
    values, patients = series([1, 1, 1, 0]), pd.Series(["a", "a", "a", "b"], NAMES[:4])
    assert interval(values, patients) == (0, 1)
    assert interval(values, patients, level=0.2) == (0.75, 0.75)  # both were drawn: 3 of 4
    assert all(map(math.isnan, interval(values[:3], patients)))


def test_seeds_are_drawn_too():
    """Of two seeds that differ by 1 in all studies the mean is 0, 1/2 or 1, whoever is drawn."""
    values = pd.DataFrame({0: series(np.zeros(30)), 1: series(np.ones(30))})
    each = pd.Series(values.index, values.index)
    assert interval(values, each, level=0.9) == (0, 1)
    assert interval(values, each, level=0.4) == (0.5, 0.5)
    part = pd.DataFrame({0: series([5, np.nan, np.nan]), 1: series([np.nan, 6, 7])})
    low, high = interval(part, pd.Series(part.index, part.index), level=0.99)
    assert (low, high) == (5, 7)  # a draw without a value is no 0
    values.loc["s0":"s9", 1] = np.nan  # a missing one does not count as 0
    assert interval(values, each, level=0.9) == (0, 1)


@pytest.mark.parametrize("count", [3, 10])
def test_sign_flip_is_the_exact_permutation_test(count):
    gains = series(np.random.default_rng(count).normal(0.4, 1, count))
    theirs = stats.permutation_test(
        (gains,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    each = pd.Series(gains.index, gains.index)
    assert sign_flip(gains, each) == pytest.approx(theirs.pvalue)
    assert sign_flip(series([0, 0]), each) != sign_flip(series([0, 0]), each)  # NaN


def test_sign_flip_takes_patients_means_and_draws_where_it_must(monkeypatch):
    gains = series([3, 5, -1, -1, -1, -1])
    patients = pd.Series(["a", "a", "b", "b", "b", "b"], gains.index)
    assert sign_flip(gains, patients) == 1.0  # 4 and -1: of ±4 ±1 half are as far as 3, half as 5
    many = series(np.random.default_rng(0).normal(0.2, 1, 12))
    each = pd.Series(many.index, many.index)
    exact = sign_flip(many, each)
    monkeypatch.setattr(certainty, "FLIPS", 4000)
    assert exact > 0.2 and sign_flip(many, each) == pytest.approx(exact, abs=0.02)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    corrected = holm([math.nan, 0.6, 0.7])
    assert math.isnan(corrected[0]) and corrected[1:] == [1, 1]
