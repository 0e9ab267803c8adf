"""Random cells."""

import ctypes
from dataclasses import dataclass

from csp_edge.errors import PolicyError
from csp_edge.policies.base import Policy, is_int


class _Settings(ctypes.Structure):
    _fields_ = [("seed", ctypes.c_uint64)]


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Cells at random, beside the recent ones: what any score has to beat.

    Cell j of head h in layer l has the output number (l * n_head_kv + h) * n_cells + j of the
    generator splitmix64 (Steele, Lea and Flood, OOPSLA 2014), started at `seed`. The highest stay.

    Args:
        budget, recent: as in `Policy`.
        window: of no effect. None: 1, the least.
        seed: an int from 0 to 2^64 - 1.

    Raises:
        PolicyError: a setting is of the wrong type or out of range.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_int(self.seed) and 0 <= self.seed < 2**64):
            raise PolicyError(f"seed={self.seed!r}: give an int from 0 to 2^64 - 1")

    def _default_window(self, n_tokens: int, has_pictures: bool) -> int:
        return 1

    def native_call(self) -> tuple[str, ctypes.Structure | None]:
        return "llama_csp_policy_random", _Settings(self.seed)
