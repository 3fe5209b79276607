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


def test_interval_is_a_bootstrap_over_patients():
    values = series(np.random.default_rng(3).gamma(2, 1, 40))
    low, high = interval(values, one_each(values))
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    expected = expected.confidence_interval
    spread = expected.high - expected.low
    assert abs(low - expected.low) < 0.06 * spread
    assert abs(high - expected.high) < 0.06 * spread
    wide = interval(values, one_each(values), level=0.99)
    assert wide[0] < low and wide[1] > high


def test_equal_studies_of_a_patient_add_nothing():
    values = series(np.random.default_rng(3).gamma(2, 1, 20))
    single = interval(values, one_each(values))
    twins = series(np.repeat(values.to_numpy(), 2))
    patients = one_each(twins)
    apart = interval(twins, patients)
    patients[:] = np.repeat(values.index, 2)
    assert interval(twins, patients) == pytest.approx(single)
    assert apart != pytest.approx(single, rel=0.01)


def test_a_patient_with_more_studies_weighs_more_in_the_mean_of_studies():
    """Two patients: every draw is one of three means."""
    values = series([1, 1, 1, 0])
    patients = one_each(values)
    patients[:3] = "a"
    assert interval(values, patients) == (0, 1)
    assert interval(values, patients, level=0.2) == (0.75, 0.75)  # both were drawn: 3 of 4
    assert np.isnan(interval(values[:3], patients)).all()


def test_seeds_are_drawn_too():
    """Of two seeds that differ by 1 in all studies the mean is 0, 1/2 or 1, whoever is drawn."""
    zeros = series(np.zeros(30))
    patients = one_each(zeros)
    values = pd.DataFrame({0: zeros, 1: zeros + 1})
    assert interval(values, patients, level=0.9) == (0, 1)
    assert interval(values, patients, level=0.4) == (0.5, 0.5)
    values.loc["s0":"s9", 1] = np.nan  # a missing one does not count as 0
    assert interval(values, patients, level=0.9) == (0, 1)

    none = math.nan
    gaps = pd.DataFrame({0: series([5, none, none]), 1: series([none, 6, 7])})
    assert interval(gaps, patients, level=0.99) == (5, 7)  # an empty draw is no 0


@pytest.mark.parametrize("count", [1, 3, 10])
def test_sign_flip_goes_through_all_signs_of_few_patients(count):
    gains = series(np.random.default_rng(count).normal(0.4, 1, count))
    signs = np.array(list(itertools.product((1, -1), repeat=count)))
    far = np.abs(signs @ gains) >= abs(gains.sum()) - 1e-9
    assert sign_flip(gains, one_each(gains)) == pytest.approx(far.mean())


def test_sign_flip_takes_patients_means_and_draws_where_it_must(monkeypatch):
    gains = series([3, 5, -1, -1, -1, -1])
    patients = one_each(gains)
    patients[:] = list("aabbbb")
    assert sign_flip(gains, patients) == 1.0  # 4 and -1: of ±4 ±1 half are as far as 3, half as 5
    assert math.isnan(sign_flip(0 * gains, patients))

    many = series(np.random.default_rng(0).normal(0.2, 1, 12))
    exact = sign_flip(many, one_each(many))
    monkeypatch.setattr(certainty, "FLIPS", 4000)
    drawn = sign_flip(many, one_each(many))
    assert drawn != exact > 0.2
    assert drawn == pytest.approx(exact, abs=0.02)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    corrected = holm([math.nan, 0.6, 0.7])
    assert math.isnan(corrected[0])
    assert corrected[1:] == [1, 1]
