"""certainty.py against scipy, and against numbers worked out by hand."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import certainty
from certainty import holm, interval, sign_flip


def series(values):
    names = [f"s{i}" for i in range(len(values))]
    return pd.Series(values, names, float)


def one_each(values):
    """A patient for every study."""
    return pd.Series(values.index, values.index)


def simple_interval(values, level=0.95):
    return interval(values, one_each(values), level)


def test_interval_is_a_bootstrap_over_patients():
    values = series(np.random.default_rng(3).gamma(2, 1, 40))
    low, high = simple_interval(values)
    bootstrap = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=20_000,
        method="percentile",
        rng=1,
    )
    ends = bootstrap.confidence_interval
    tolerance = 0.06 * (ends.high - ends.low)
    assert low == pytest.approx(ends.low, abs=tolerance)
    assert high == pytest.approx(ends.high, abs=tolerance)
    lower, higher = simple_interval(values, level=0.99)
    assert lower < low < high < higher


def test_equal_studies_of_a_patient_add_nothing():
    values = series(np.random.default_rng(3).gamma(2, 1, 20))
    twins = series(np.repeat(values.to_numpy(), 2))
    patients = pd.Series(np.repeat(values.index, 2), twins.index)
    expected = simple_interval(values)
    assert interval(twins, patients) == pytest.approx(expected)
    assert simple_interval(twins) != pytest.approx(expected, rel=0.01)


def test_a_patient_with_more_studies_weighs_more_in_the_mean_of_studies():
    """Two patients: every draw is one of three means."""
    values = series([1, 1, 1, 0])
    patients = pd.Series(list("aaab"), values.index)
    assert interval(values, patients) == (0, 1)
    assert interval(values, patients, level=0.2) == (0.75, 0.75)  # both were drawn: 3 of 4
    assert np.isnan(interval(values[:3], patients)).all()


def test_seeds_are_drawn_too():
    """Of two seeds that differ by 1 in all studies the mean is 0, 1/2 or 1, whoever is drawn."""
    zeros = series(np.zeros(30))
    values = pd.DataFrame({0: zeros, 1: zeros + 1})
    assert simple_interval(values, level=0.9) == (0, 1)
    assert simple_interval(values, level=0.4) == (0.5, 0.5)
    values.loc["s0":"s9", 1] = np.nan  # a missing one does not count as 0
    assert simple_interval(values, level=0.9) == (0, 1)

    first = series([5, np.nan, np.nan])
    second = series([np.nan, 6, 7])
    gaps = pd.DataFrame({0: first, 1: second})
    assert simple_interval(gaps, level=0.99) == (5, 7)  # an empty draw is no 0


@pytest.mark.parametrize("count", [1, 3, 10])
def test_sign_flip_goes_through_all_signs_of_few_patients(count):
    gains = series(np.random.default_rng(count).normal(0.4, 1, count))
    flips = itertools.product((1, -1), repeat=count)
    sums = np.array(list(flips)) @ gains
    far = np.abs(sums) >= abs(gains.sum()) - 1e-9
    assert sign_flip(gains, one_each(gains)) == pytest.approx(far.mean())


def test_sign_flip_takes_patients_means_and_draws_where_it_must(monkeypatch):
    gains = series([3, 5, -1, -1, -1, -1])
    patients = pd.Series(list("aabbbb"), gains.index)
    assert sign_flip(gains, patients) == 1.0  # 4 and -1: of ±4 ±1 half are as far as 3, half as 5
    assert math.isnan(sign_flip(0 * gains, patients))

    many = series(np.random.default_rng(0).normal(0.2, 1, 12))
    exact = sign_flip(many, one_each(many))
    monkeypatch.setattr(certainty, "FLIPS", 4000)
    drawn = sign_flip(many, one_each(many))
    assert drawn != exact > 0.2
    assert drawn == pytest.approx(exact, abs=0.02)


def test_holm_by_hand():
    corrected = holm([0.01, 0.04, 0.03, 0.005])
    assert corrected == pytest.approx([0.03, 0.06, 0.06, 0.02])
    unknown, *known = holm([math.nan, 0.6, 0.7])
    assert math.isnan(unknown)
    assert known == [1, 1]
