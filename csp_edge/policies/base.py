"""What every policy is, and what it is shown."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeGuard

from csp_edge.errors import PolicyError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


# what the queries of an answer's beginning, and of the token before it, weigh of all scores
ANSWER_SHARE = 0.95


class Resolved(NamedTuple):
    """A policy in cells and tokens, for one prompt."""

    budget: int
    window: int
    recent: int
    lookahead: int = 0


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LayerView:
    """One layer as a policy sees it. Cells stand in the order of their tokens.

    i_layer, n_layer: the layer, and how many there are, counting those that are pruned.
    budget: cells that every KV head is to keep, fewer than n_cells; recent of them are the last.

    token: uint32 [n_head_kv, n_cells]: the token in each cell, an index into the conversation.
    modality: int8 [n_head_kv, n_cells]: 0 text, 1 picture.
    self_, cross: float32 [n_head_kv, n_cells]: the attention that each cell receives from the
        window's queries of its own modality, and from those of another, summed over queries and
        over the query heads of the group. Their sum is plain window attention.
    k: float32 [n_head_kv, n_cells, head_dim]: keys, after RoPE. None where they are not needed.
    """

    i_layer: int
    n_layer: int
    budget: int
    recent: int
    token: npt.NDArray[np.uint32]
    modality: npt.NDArray[np.int8]
    self_: npt.NDArray[np.float32]
    cross: npt.NDArray[np.float32]
    k: npt.NDArray[np.float32] | None


@dataclass(frozen=True)
class Policy:
    """What is kept of a prompt's KV cache. For one of your own, write `select`.

    An int counts cells, a float in (0, 1] is a share of the prompt's tokens.

    Args:
        budget: cells that every KV head keeps, the recent ones included. None: a fifth of the
            prompt, but at least 128 cells: of a shorter prompt there is nothing to gain, and an
            answer to lose.
        window: the prompt's last tokens, whose queries score the cells.
            None: 16, or the whole prompt where it is shorter.
        recent: the prompt's last cells, always kept. None: 16, but at most half of the budget.

    Raises:
        PolicyError: a setting is of the wrong type or out of range.
    """

    budget: int | float | None = None
    _: KW_ONLY
    window: int | float | None = None
    recent: int | float | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            check_amount("budget", self.budget, least=1)
        if self.window is not None:
            check_amount("window", self.window, least=1)
        if self.recent is not None:
            check_amount("recent", self.recent, least=0)

    @property
    def needs_keys(self) -> bool | Literal["pictures"]:
        """Whether the policy looks at keys, which have to be fetched for it: always or never, or
        "pictures": in layers with cells of pictures."""
        return False

    @property
    def n_score(self) -> float:
        """n of the scoring softmax, exp(x) / (n + sum exp(x)). 0: plain softmax."""
        return 0.0

    @property
    def sink(self) -> float | Literal["mass"] | None:
        """n while decoding over the pruned cache. None: plain softmax."""
        return None

    def select(self, layer: LayerView) -> Sequence[npt.NDArray[np.integer]]:
        """The cells that each KV head of a layer keeps.

        Called once per layer, or, where an earlier pruning left the heads of a layer with different
        numbers of cells, once for each number, with the heads that have it.

        Returns:
            For every KV head, indices below n_cells, ascending, at least one. Heads may keep
            different numbers.
        """
        raise PolicyError(f"{type(self).__name__} has no select(layer): write one")

    def native_call(self) -> tuple[str, ctypes.Structure | None] | None:
        """The function in the library that chooses instead of `select`, and its settings."""
        return None

    def resolve(self, n_tokens: int, *, has_pictures: bool = True) -> Resolved:
        """The policy in cells, for a prompt of `n_tokens` (at least 1), those of pictures included.

        The budget may exceed the prompt: then nothing is evicted.

        Raises:
            PolicyError: the window, given in cells, is larger than the prompt, or there are more
                recent cells than the budget holds.
        """
        if self.budget is None:
            budget = max(128, _cells(0.2, n_tokens))
        else:
            budget = max(1, _cells(self.budget, n_tokens))

        if self.window is None:
            window = self._default_window(n_tokens, has_pictures)
        else:
            window = max(1, _cells(self.window, n_tokens))
        if window > n_tokens:
            raise PolicyError(
                f"window={window} is larger than the prompt ({n_tokens} tokens): "
                "give a smaller one, a fraction, or None"
            )

        if self.recent is None:
            recent = self._default_recent(budget, has_pictures)
        elif isinstance(self.recent, float):
            recent = min(_cells(self.recent, n_tokens), budget)
        else:
            recent = self.recent
        if recent > budget:
            raise PolicyError(
                f"recent={recent} is larger than the budget ({budget} cells of this prompt's "
                f"{n_tokens}): give a smaller one, a fraction, or None"
            )
        return Resolved(budget, window, recent, self._lookahead(has_pictures))

    def _default_window(self, n_tokens: int, has_pictures: bool) -> int:
        return min(16, n_tokens)

    def _default_recent(self, budget: int, has_pictures: bool) -> int:
        return min(16, budget // 2)

    def _lookahead(self, has_pictures: bool) -> int:
        return 0


def is_number(value: object) -> TypeGuard[float]:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # an int may be larger


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def check_amount(name: str, value: object, least: int) -> None:
    match value:
        case bool():
            pass
        case int() if value >= least:
            return
        case float() if 0 < value <= 1 or value == least == 0:
            return
    kinds = f"an int of at least {least} (cells) or a float above 0 and up to 1 (a share)"
    raise PolicyError(f"{name}={value!r}: give {kinds}")


def _cells(amount: float, n_tokens: int) -> int:
    if isinstance(amount, int):
        return amount
    # by the decimal that was written: 0.29 of 100 is 29, though 0.29 * 100 < 29
    return math.floor(Fraction(str(float(amount))) * n_tokens)
