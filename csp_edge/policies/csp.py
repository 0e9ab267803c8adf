"""Cross-Self Pruning."""

import ctypes
from dataclasses import dataclass
from typing import Literal

from csp_edge.errors import PolicyError
from csp_edge.policies.base import Policy, is_int, is_number

_LOOKAHEAD_MOST = 256


class _Settings(ctypes.Structure):
    _fields_ = [("cross_ratio", ctypes.c_double), ("distance", ctypes.c_double)]


@dataclass(frozen=True, kw_only=True)
class CSP(Policy):
    """Cross-Self Pruning (arXiv 2412.04652): every layer and KV head keeps its own `budget` cells.

    The scored cells are drawn in two lots (section 3.2): the first by attention between
    modalities, the rest by attention within one.

    An int counts cells, a float in (0, 1] is a share of the prompt's tokens.

    Args:
        budget: cells that every KV head keeps, the recent ones included. None: a fifth of the
            prompt, but at least 128 cells: of a shorter prompt there is nothing to gain, and an
            answer to lose.
        window: the prompt's last tokens, whose queries score the cells (section 3.2).
            None: 8 where there are pictures, 32 where there are not, or the whole prompt where it
            is shorter.
        recent: the prompt's last cells, always kept. None: 16, but at most half of the budget, or,
            where there are pictures, a quarter.
        lookahead: tokens of the answer that are written over the whole cache, before it is pruned.
            Their queries score, too, and together with that of the prompt's last token weigh 0.95
            of all: answers of several parts look for other cells at each step. Not in the paper.
            None: 16 where there are pictures, 0 where there are not.
        cross_ratio: share of the scored cells drawn by attention between modalities, the rest
            being drawn by attention within one, in [0, 1]. None: measured, per layer and head.
        distance: above 0, cells are drawn one by one, the next being the one with the highest
            log(score) - distance * i / (i + 4) * max(0, c)^2, where c is the largest cosine of its
            key with those of the recent cells and of the i cells drawn so far: the first by score,
            the rest more and more apart. Not in the paper: neighbouring
            patches of a picture say the same, and what the first question does not need is there
            for the next. None: 32 where there are pictures to choose from, 0 where there are not.
        n_score: n of the scoring softmax, exp(x) / (n + sum exp(x)) (section 3.3), at least 0.
        sink: n while decoding over the pruned cache (section 3.3). None: plain softmax.
            A number above 0: that n. "mass": the measured mass of the evicted cells, per head.

    Raises:
        PolicyError: a setting is of the wrong type or out of range.
    """

    lookahead: int | None = None
    cross_ratio: float | None = None
    distance: float | None = None
    n_score: float = 1.0
    sink: float | Literal["mass"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lookahead is not None and not (
            is_int(self.lookahead) and 0 <= self.lookahead <= _LOOKAHEAD_MOST
        ):
            raise PolicyError(
                f"lookahead={self.lookahead!r}: give an int from 0 to {_LOOKAHEAD_MOST}, or None"
            )
        if self.cross_ratio is not None and not (
            is_number(self.cross_ratio) and 0 <= self.cross_ratio <= 1
        ):
            raise PolicyError(
                f"cross_ratio={self.cross_ratio!r}: give a number from 0 to 1, or None to measure"
            )
        if self.distance is not None and not (is_number(self.distance) and self.distance >= 0):
            raise PolicyError(f"distance={self.distance!r}: give a number of at least 0, or None")
        if not (is_number(self.n_score) and self.n_score >= 0):
            raise PolicyError(f"n_score={self.n_score!r}: give a number of at least 0")
        if self.sink not in (None, "mass") and not (is_number(self.sink) and self.sink > 0):
            raise PolicyError(f'sink={self.sink!r}: give a number above 0, "mass" or None')

    @property
    def needs_keys(self) -> bool | Literal["pictures"]:
        return "pictures" if self.distance is None else self.distance > 0

    def native_call(self) -> tuple[str, ctypes.Structure | None]:
        cross_ratio = -1.0 if self.cross_ratio is None else self.cross_ratio
        distance = -1.0 if self.distance is None else self.distance
        return "llama_csp_policy_csp", _Settings(cross_ratio, distance)

    def _lookahead(self, has_pictures: bool) -> int:
        return (16 if has_pictures else 0) if self.lookahead is None else self.lookahead

    def _default_recent(self, budget: int, has_pictures: bool) -> int:
        if not has_pictures:
            return super()._default_recent(budget, has_pictures)
        return min(16, max(1, budget // 4))

    def _default_window(self, n_tokens: int, has_pictures: bool) -> int:
        return min(8 if has_pictures else 32, n_tokens)
