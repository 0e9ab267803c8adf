"""H2O, the Heavy-Hitter Oracle."""

import ctypes
from dataclasses import dataclass

from csp_edge.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """H2O (arXiv 2306.14048): the cells that received most attention, accumulated over all queries.

    As in the paper, half of the budget goes to them and half to the recent cells. The paper also
    evicts while it decodes; here, as with every policy, the prompt is pruned once. In a cache that
    was pruned before, the queries since then are what is accumulated.

    Args:
        budget: as in `Policy`.
        window: the prompt's last tokens, whose queries are accumulated. None: the whole prompt,
            whose queries are all held in memory until it has been pruned.
        recent: the prompt's last cells, always kept. None: half of the budget.

    Raises:
        PolicyError: a setting is of the wrong type or out of range.
    """

    def _default_window(self, n_tokens: int, has_pictures: bool) -> int:
        return n_tokens

    def _default_recent(self, budget: int, has_pictures: bool) -> int:
        return budget // 2

    def native_call(self) -> tuple[str, ctypes.Structure | None]:
        return "llama_csp_policy_h2o", None
