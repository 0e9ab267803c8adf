"""Cache policies: what is kept of a prompt's KV cache once it has been prefilled."""

import math
from dataclasses import KW_ONLY, dataclass, fields
from fractions import Fraction
from typing import Any, Literal, NamedTuple, TypeGuard

from csp_edge.errors import PolicyError


class Resolved(NamedTuple):
    """A CSP policy in cells, for one prompt."""

    budget: int
    window: int
    recent: int


@dataclass(frozen=True, slots=True)
class Full:
    """Keep every cell."""


@dataclass(frozen=True, slots=True)
class CSP:
    """Cross-Self Pruning (arXiv 2412.04652): every layer and KV head keeps its own `budget` cells.

    An int counts cells, a float in (0, 1] is a share of the prompt's tokens.

    Args:
        budget: cells that every KV head keeps, the recent ones included. None: a fifth of the
            prompt, but at least 128 cells: of a shorter prompt there is nothing to gain, and an
            answer to lose.
        window: the prompt's last tokens, whose queries score the cells (section 3.2).
            None: 16, or the whole prompt where it is shorter.
        recent: the prompt's last cells, always kept. None: 16, but at most half of the budget.
        cross_ratio: share of the scored cells drawn by attention between modalities, the rest
            being drawn by attention within one, in [0, 1]. None: measured, per layer and head.
        n_score: n of the scoring softmax, exp(x) / (n + sum exp(x)) (section 3.3), at least 0.
        sink: n while decoding over the pruned cache (section 3.3). None: plain softmax.
            A number above 0: that n. "mass": the measured mass of the evicted cells, per head.

    Raises:
        PolicyError: a setting is of the wrong type or out of range.
    """

    budget: int | float | None = None
    _: KW_ONLY
    window: int | float | None = None
    recent: int | float | None = None
    cross_ratio: float | None = None
    n_score: float = 1.0
    sink: float | Literal["mass"] | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            _check_amount("budget", self.budget, least=1)
        if self.window is not None:
            _check_amount("window", self.window, least=1)
        if self.recent is not None:
            _check_amount("recent", self.recent, least=0)
        if self.cross_ratio is not None and not (
            _is_number(self.cross_ratio) and 0 <= self.cross_ratio <= 1
        ):
            raise PolicyError(
                f"cross_ratio={self.cross_ratio!r}: give a number from 0 to 1, or None to measure"
            )
        if not (_is_number(self.n_score) and self.n_score >= 0):
            raise PolicyError(f"n_score={self.n_score!r}: give a number of at least 0")
        if self.sink not in (None, "mass") and not (_is_number(self.sink) and self.sink > 0):
            raise PolicyError(f'sink={self.sink!r}: give a number above 0, "mass" or None')

    def resolve(self, n_tokens: int) -> Resolved:
        """The policy in cells, for a prompt of `n_tokens` (at least 1).

        The budget may exceed the prompt: then nothing is evicted.

        Raises:
            PolicyError: the window, given in cells, is larger than the prompt, or there are more
                recent cells than the budget holds.
        """
        if self.budget is None:
            budget = max(128, _cells(0.2, n_tokens))
        else:
            budget = max(1, _cells(self.budget, n_tokens))

        window = min(16, n_tokens)
        if self.window is not None:
            window = max(1, _cells(self.window, n_tokens))
        if window > n_tokens:
            raise PolicyError(
                f"window={window} is larger than the prompt ({n_tokens} tokens): "
                "give a smaller one, a fraction, or None"
            )

        if self.recent is None:
            recent = min(16, budget // 2)
        elif isinstance(self.recent, float):
            recent = min(_cells(self.recent, n_tokens), budget)
        else:
            recent = self.recent
        if recent > budget:
            raise PolicyError(
                f"recent={recent} is larger than the budget ({budget} cells of this prompt's "
                f"{n_tokens}): give a smaller one, a fraction, or None"
            )
        return Resolved(budget, window, recent)


POLICIES: dict[str, type[CSP] | type[Full]] = {"csp": CSP, "full": Full}


def policy(name: str, **options: Any) -> CSP | Full:
    """The policy called `name`, one of `POLICIES`, with its settings.

    Raises:
        PolicyError: there is no such policy, it has no such setting, or one is out of range.
    """
    if name not in POLICIES:
        raise PolicyError(f"unknown policy {name!r}: choose one of {', '.join(POLICIES)}")
    kind = POLICIES[name]
    unknown = options.keys() - {field.name for field in fields(kind)}
    if unknown:
        raise PolicyError(f"policy {name!r} has no setting {min(unknown)!r}")
    return kind(**options)


def parse_budget(text: str) -> int | float:
    """A budget as written on a command line: "20%", "0.2" (a share) or "512" (cells).

    Raises:
        PolicyError: it is neither, or out of range.
    """
    try:
        if text.strip().endswith("%"):
            budget: int | float = float(text.strip()[:-1]) / 100
        else:
            budget = float(text) if "." in text else int(text)
    except ValueError:
        raise PolicyError(
            f"budget {text!r}: give a share like 20% or 0.2, or cells like 512"
        ) from None
    _check_amount("budget", budget, least=1)
    return budget


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_amount(name: str, value: object, least: int) -> None:
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
