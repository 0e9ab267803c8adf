"""PyramidKV."""

import ctypes
from dataclasses import dataclass

from csp_edge.errors import PolicyError
from csp_edge.policies.base import is_number
from csp_edge.policies.snapkv import Settings, SnapKV


class _Settings(ctypes.Structure):
    _fields_ = [("score", Settings), ("beta", ctypes.c_double)]


@dataclass(frozen=True, kw_only=True)
class Pyramid(SnapKV):
    """PyramidKV (arXiv 2406.02069): SnapKV, with a budget that falls from layer to layer.

    With k = budget - recent, the last layer's heads draw k / beta cells (1 at least), the first
    layer's 2 k minus that (but no more than there are), and those between fall linearly. The
    layers' budgets are `budget` on average, exactly.

    Args:
        budget, window, recent, kernel, pooling: as in `SnapKV`.
        beta: how steep it is, at least 1, where it is flat. The authors' code uses 20.

    Raises:
        PolicyError: a setting is of the wrong type or out of range.
    """

    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.beta) and self.beta >= 1):
            raise PolicyError(f"beta={self.beta!r}: give a number of at least 1")

    def native_call(self) -> tuple[str, ctypes.Structure | None]:
        return "llama_csp_policy_pyramid", _Settings(self._settings(), self.beta)
