"""StreamingLLM."""

import ctypes
from dataclasses import dataclass

from csp_edge.errors import PolicyError
from csp_edge.policies.base import Policy, is_int


class _Settings(ctypes.Structure):
    _fields_ = [("n_sink", ctypes.c_uint32)]


@dataclass(frozen=True, kw_only=True)
class Streaming(Policy):
    """StreamingLLM (arXiv 2309.17453): the first cells, to which much attention drains, and the
    most recent ones. No score counts.

    The paper moves keys to positions within the cache; here keys stay at their true positions.

    Args:
        budget: as in `Policy`.
        window: of no effect. None: 1, the least.
        recent: of the most recent cells, those whose positions stay their own. None: all of them.
        sinks: the first cells that are kept, at most half of the budget where `recent` is None,
            and what `recent` leaves of it where it is not. The paper keeps 4.

    Raises:
        PolicyError: a setting is of the wrong type or out of range.
    """

    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_int(self.sinks) and 0 <= self.sinks < 2**32):
            raise PolicyError(f"sinks={self.sinks!r}: give an int of at least 0")

    def _default_window(self, n_tokens: int, has_pictures: bool) -> int:
        return 1

    def _default_recent(self, budget: int, has_pictures: bool) -> int:
        return budget - min(self.sinks, budget // 2)

    def native_call(self) -> tuple[str, ctypes.Structure | None]:
        return "llama_csp_policy_streaming", _Settings(self.sinks)
