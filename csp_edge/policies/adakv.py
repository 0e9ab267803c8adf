"""Ada-KV."""

import ctypes
from dataclasses import dataclass

from csp_edge.errors import PolicyError
from csp_edge.policies.base import is_number
from csp_edge.policies.snapkv import Settings, SnapKV


class _Settings(ctypes.Structure):
    _fields_ = [("score", Settings), ("safeguard", ctypes.c_double)]


@dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """Ada-KV (arXiv 2407.11550): SnapKV, with one budget for all KV heads of a layer.

    Every head first draws its safeguarded share of the `budget - recent` cells. What is left of
    n_head_kv times that goes to the best cells of any head, ties to the lower head.

    Args:
        budget, window, recent, kernel, pooling: as in `SnapKV`; budget is the heads' average.
        safeguard: share that every head has for itself, in [0, 1]. The paper's alpha of 0.2.

    Raises:
        PolicyError: a setting is of the wrong type or out of range.
    """

    safeguard: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.safeguard) and 0 <= self.safeguard <= 1):
            raise PolicyError(f"safeguard={self.safeguard!r}: give a number from 0 to 1")

    def native_call(self) -> tuple[str, ctypes.Structure | None]:
        return "llama_csp_policy_adakv", _Settings(self._settings(), self.safeguard)
