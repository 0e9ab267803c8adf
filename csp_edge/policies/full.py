"""The full cache."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Full:
    """Keep every cell."""
