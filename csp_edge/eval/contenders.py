"""What a run compares: policies with their settings, each at every budget."""

from dataclasses import dataclass
from typing import Any, TypeAlias

from csp_edge.errors import PolicyError
from csp_edge.policies import POLICIES, Full, Policy, parse_budget, policy

Budget: TypeAlias = int | float  # cells, or a share of the prompt

FULL = "full"
RIVALS = [name for name in POLICIES if name != FULL]


@dataclass(frozen=True, slots=True)
class Contender:
    """A policy and its settings but for the budget. `label` is how it was written."""

    label: str
    name: str
    settings: tuple[tuple[str, Any], ...] = ()

    def at(self, budget: Budget) -> Policy:
        """The policy at a budget.

        Raises:
            PolicyError: a setting makes no sense.
        """
        pruning = policy(self.name, budget=budget, **dict(self.settings))
        assert not isinstance(pruning, Full)  # it has no budget
        return pruning


def parse_contenders(text: str) -> list[Contender]:
    """From "csp,snapkv:kernel=5,window=32": a comma, then a policy or one more setting.

    A setting is a number, a share like 10%, none, or a word.

    Raises:
        PolicyError: a policy or a setting is unknown or out of range, or a policy stands twice.
    """
    labels: list[str] = []
    for part in text.replace(" ", "").split(","):
        if "=" in part and ":" not in part and labels:
            labels[-1] += "," + part
        else:
            labels.append(part)
    contenders = [_contender(label) for label in labels if label != FULL]
    for contender in contenders:
        if contenders.count(contender) > 1:
            raise PolicyError(f"policy {contender.label!r} stands there twice: leave one")
        contender.at(1.0)
    return contenders


def _contender(label: str) -> Contender:
    name, _, tail = label.partition(":")
    settings = []
    for setting in tail.split(",") if tail else []:
        key, equals, value = setting.partition("=")
        if not equals or key == "budget":
            raise PolicyError(f"policy {label!r}: write its settings like {name}:window=32")
        settings.append((key, _value(value)))
    return Contender(label, name, tuple(settings))


def _value(text: str) -> Any:
    if text.endswith("%"):
        return parse_budget(text)
    if text == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_budgets(text: str) -> list[Budget]:
    """From "5%,10%,512", the smallest first, shares before cells.

    Raises:
        PolicyError: one is neither a share nor cells, or out of range.
    """
    budgets = {parse_budget(part) for part in text.split(",")}
    return sorted(budgets, key=by_size)


def by_size(budget: Budget | None) -> tuple[int, Budget]:
    """A sort key: shares, then cells, each the smallest first, and the full cache last."""
    if budget is None:
        return 2, 0
    return int(isinstance(budget, int)), budget


def budget_name(budget: Budget | None) -> str:
    """As on a command line: 10%, or 512. None: full."""
    if budget is None:
        return FULL
    return f"{100 * budget:g}%" if isinstance(budget, float) else str(budget)
