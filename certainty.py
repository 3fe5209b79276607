"""How certain a mean or a difference is. Patients are drawn, not studies, since patients repeat."""

import math

import numpy as np
import pandas as pd
from scipy import stats

DRAWS = 10_000  # of a bootstrap
FLIPS = 10_000  # drawn in a permutation test of more patients than can be gone through


def interval(values, patients: pd.Series, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the mean over studies, by drawing patients with all their studies.

    values: by study, a Series, or a DataFrame with a column for each seed; seeds are drawn too.
    patients: by study. Returns NaN, NaN for fewer than two patients.
    """
    by_patient = pd.DataFrame(values).groupby(patients.loc[values.index])
    sums = by_patient.sum().to_numpy()  # (patients, seeds)
    counts = by_patient.count().to_numpy()
    patient_count, seed_count = sums.shape
    if patient_count < 2:
        return math.nan, math.nan

    # How often each draw holds each patient, and each seed.
    rng = np.random.default_rng(0)
    patient_draws = rng.multinomial(patient_count, np.full(patient_count, 1 / patient_count), DRAWS)
    seed_draws = rng.multinomial(seed_count, np.full(seed_count, 1 / seed_count), DRAWS)

    totals = (patient_draws @ sums * seed_draws).sum(1)
    numbers = (patient_draws @ counts * seed_draws).sum(1)
    means = np.full(DRAWS, np.nan)  # a draw may hold no value, which is no 0
    np.divide(totals, numbers, out=means, where=numbers > 0)
    tail = (1 - level) / 2
    low, high = np.nanquantile(means, (tail, 1 - tail))
    return float(low), float(high)


def sign_flip(differences: pd.Series, patients: pd.Series) -> float:
    """Two-sided p of the hypothesis that a difference is as likely as its negative.

    It is the share of all flips of signs whose mean is as far from 0; of FLIPS drawn ones, the
    signs as they are among them, if there are more. differences, patients: by study; a patient
    counts once, by the mean of its studies. Returns NaN if all differences are 0.
    """
    means = differences.groupby(patients.loc[differences.index]).mean().to_numpy()
    if not means.any():
        return math.nan
    if len(means) == 1:  # scipy takes no fewer than two; both signs are as far from 0
        return 1.0

    test = stats.permutation_test(
        (means,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def holm(values: list[float]) -> list[float]:
    """p values corrected for their number by Holm's steps; NaN stays and does not count."""
    p = np.array(values, float)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known])]  # from the smallest
    steps = len(order) - np.arange(len(order))
    p[order] = np.maximum.accumulate(np.minimum(steps * p[order], 1))
    return p.tolist()
