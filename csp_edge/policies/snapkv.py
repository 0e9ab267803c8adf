"""SnapKV."""

import ctypes
from dataclasses import dataclass
from typing import Literal

from csp_edge.errors import PolicyError
from csp_edge.policies.base import Policy, is_int


class Settings(ctypes.Structure):
    _fields_ = [("kernel", ctypes.c_uint32), ("average", ctypes.c_bool)]


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """SnapKV (arXiv 2404.14469): window attention, pooled along the sequence, blind to modality.

    A cell's score is the largest or the average attention among its neighbours, so that clusters
    are kept. In the paper the window is also what is kept of the recent cells, 16 to 32 of them;
    here both can be given, and are 16. Query heads that share a KV head share a choice.

    Args:
        budget, window, recent: as in `Policy`.
        kernel: cells that are pooled, odd, up to 99. The paper uses 5 and 7.
        pooling: "max" or "average". Beyond both ends attention is 0.

    Raises:
        PolicyError: a setting is of the wrong type or out of range.
    """

    kernel: int = 7
    pooling: Literal["max", "average"] = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_int(self.kernel) and 1 <= self.kernel <= 99 and self.kernel % 2):
            raise PolicyError(f"kernel={self.kernel!r}: give an odd int from 1 to 99")
        if self.pooling not in ("max", "average"):
            raise PolicyError(f'pooling={self.pooling!r}: give "max" or "average"')

    def _settings(self) -> Settings:
        return Settings(self.kernel, self.pooling == "average")

    def native_call(self) -> tuple[str, ctypes.Structure | None]:
        return "llama_csp_policy_snapkv", self._settings()
