"""How sure a mean or a difference is: patients are drawn, not studies, since patients repeat."""

import math
from itertools import product

import numpy as np
import pandas as pd

DRAWS = 10_000  # of a bootstrap
FLIPS = 10_000  # of a permutation test with more patients than can be gone through


def interval(values, patients: pd.Series, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the mean over studies, by drawing patients with all their studies.

    values: by study, a Series, or a DataFrame with a column for each seed, which are drawn too.
    patients: by study. NaN, NaN for fewer than two patients.
    """
    own = pd.DataFrame(values).groupby(patients.loc[values.index])
    sums, counts = own.sum().to_numpy(), own.count().to_numpy()  # (patients, seeds)
    rng, (people, seeds) = np.random.default_rng(0), sums.shape
    if people < 2:
        return math.nan, math.nan
    drawn = rng.multinomial(people, np.full(people, 1 / people), DRAWS)  # how often each is
    again = rng.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS)
    total, number = ((drawn @ a * again).sum(1) for a in (sums, counts))
    tail = (1 - level) / 2
    means = np.divide(total, number, out=np.full(DRAWS, np.nan), where=number > 0)  # not 0
    low, high = np.nanquantile(means, (tail, 1 - tail))
    return float(low), float(high)


def sign_flip(differences: pd.Series, patients: pd.Series) -> float:
    """p of the hypothesis that a difference is as likely as its negative, two-sided: the share of
    all flips of signs (of FLIPS drawn ones, if there are more) whose mean is as far from 0.

    differences, patients: by study; a patient counts once, by the mean of its studies.
    """
    own = differences.groupby(patients.loc[differences.index]).mean().to_numpy()
    if not own.any():
        return math.nan
    if 2 ** len(own) <= FLIPS:
        signs = np.array(list(product((1, -1), repeat=len(own))))
        far = np.abs(signs @ own) >= np.abs(own.sum()) * (1 - 1e-12)
        return float(far.mean())
    signs = np.random.default_rng(0).choice((1.0, -1.0), size=(FLIPS, len(own)))
    far = np.abs(signs @ own) >= np.abs(own.sum()) * (1 - 1e-12)
    return float((1 + far.sum()) / (1 + FLIPS))  # the signs as they are count as one


def holm(values: list[float]) -> list[float]:
    """p values corrected for their number by Holm's steps; NaN stays and does not count."""
    order = sorted((p, i) for i, p in enumerate(values) if not math.isnan(p))
    corrected, highest = [math.nan] * len(values), 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        corrected[i] = highest
    return corrected
