"""The middle of several measurements, and how far they are apart."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Spread(NamedTuple):
    """The median, and the quartiles, between which the middle half lies."""

    median: float
    low: float
    high: float

    def text(self, n_digits: int) -> str:
        """The median, and half of what is between the quartiles."""
        return f"{self.median:.{n_digits}f} ±{(self.high - self.low) / 2:.{n_digits}f}"


def spread(values: Sequence[float]) -> Spread:
    """Of one measurement or more."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return Spread(median, low, high)
