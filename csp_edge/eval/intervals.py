"""Means with their 95 % confidence intervals."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]

_Z = 1.959964  # of the normal distribution, two-sided
_N_RESAMPLES = 2000
_N_AT_ONCE = 100  # for the memory's sake


class Estimate(NamedTuple):
    """A value, and the bounds of its interval."""

    value: float
    low: float
    high: float


def wilson(scores: Sequence[float]) -> Estimate:
    """The mean of independent scores in [0, 1], none of them missing.

    Wilson's interval (1927), exact in spirit for right and wrong. Scores in between vary less than
    that, so for them it is on the wide side.
    """
    n, mean = len(scores), math.fsum(scores) / len(scores)
    center = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
    # none right, or all: that bound is exact, but for rounding
    return Estimate(mean, center - half if mean > 0 else 0.0, center + half if mean < 1 else 1.0)


def bootstrap(statistic: Callable[..., Array], *columns: Sequence[float]) -> Estimate:
    """A statistic of means, its interval by resampling rows. The same draws every time.

    Args:
        statistic: of the mean of each column, for arrays of them. NaN: undefined, not counted.
        columns: measured on the same rows, so that what is hard in a row is hard in all.
    """
    table = np.array(columns, np.float64)
    rng = np.random.default_rng(0)
    n = table.shape[1]
    # how often each row is drawn is all that a mean asks for
    means = [
        table @ rng.multinomial(n, np.full(n, 1 / n), _N_AT_ONCE).T / n
        for _ in range(_N_RESAMPLES // _N_AT_ONCE)
    ]
    value = statistic(*table.mean(axis=1))
    low, high = np.nanpercentile(statistic(*np.concatenate(means, axis=1)), [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))
