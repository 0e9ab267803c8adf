"""LOOK-M."""

import ctypes
from dataclasses import dataclass

from csp_edge.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class LookM(Policy):
    """LOOK-M (arXiv 2406.18139): text before pictures, and evicted picture cells merged.

    Text cells are drawn first, by window attention, as the paper's text prior does by raising
    their scores above all others; what they leave of the budget goes to picture cells. An evicted
    picture cell is merged into the kept one whose key is nearest to its own by cosine, in the
    paper's pivotal way, which gives the kept cell the greater weight.

    Args:
        budget, window, recent: as in `Policy`.

    Raises:
        PolicyError: a setting is of the wrong type or out of range.
    """

    @property
    def needs_keys(self) -> bool:
        return True

    def native_call(self) -> tuple[str, ctypes.Structure | None]:
        return "llama_csp_policy_lookm", None
