"""What a run found, in tables: accuracy and divergence by policy and budget, with intervals."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import numpy as np

from csp_edge.eval.answers import Answer
from csp_edge.eval.contenders import FULL, Budget, budget_name, by_size
from csp_edge.eval.fidelity import Divergence
from csp_edge.eval.intervals import Array, Estimate, bootstrap, wilson
from csp_edge.eval.table import Table

Scores: TypeAlias = dict[tuple[str, str], float]
Found = TypeVar("Found", Answer, Divergence)


def accuracy(answers: Sequence[Answer], title: str = "Accuracy, %") -> Table:
    """Of every policy at every budget, and of the full cache, with Wilson's interval."""
    return _grid(title, answers, lambda a: a.budget, budget_name, _accuracy)


def accuracy_by(answers: Sequence[Answer], field: str, budget: Budget) -> Table:
    """Accuracy at one budget by a field of the answers. Last, how long the answers are."""
    chosen = [a for a in answers if a.budget in (None, budget)]
    title = f"Accuracy at {budget_name(budget)} by {field.replace('n_', '')}, %"
    table = _grid(title, chosen, lambda a: getattr(a, field), str, _accuracy)
    full = [a for a in chosen if a.policy == FULL]
    lengths = _grid("", full, lambda a: getattr(a, field), str, _mean_length).rows
    return replace(table, rows=table.rows + [["tokens", *row[1:]] for row in lengths])


def share_of_full(
    answers: Sequence[Answer], title: str = "Share of the full cache's accuracy, %"
) -> Table:
    """Accuracy over the full cache's on the same samples, the interval by resampling those."""
    full = _scores(a for a in answers if a.policy == FULL)

    def cell(found: Sequence[Answer]) -> str:
        mine, its = _paired(_scores(found), full)
        if not sum(its):
            return ""
        return _shown(bootstrap(_ratio, mine, its), 100)

    pruned = [a for a in answers if a.policy != FULL]
    return _grid(title, pruned, lambda a: a.budget, budget_name, cell)


def ahead_of(answers: Sequence[Answer], policy: str) -> Table:
    """How far every other policy is ahead of one at the same budget, on the same samples.

    In points of accuracy, the interval by resampling the samples.
    """
    theirs = {
        budget: _scores(a for a in answers if (a.policy, a.budget) == (policy, budget))
        for budget in {a.budget for a in answers}
    }

    def cell(found: Sequence[Answer]) -> str:
        mine, its = _paired(_scores(found), theirs[found[0].budget])
        return _shown(bootstrap(lambda a, b: a - b, mine, its), 100, "+.1f") if mine else ""

    others = [a for a in answers if a.policy not in (FULL, policy)]
    return _grid(f"Points ahead of {policy}", others, lambda a: a.budget, budget_name, cell)


def kl(divergences: Sequence[Divergence]) -> Table:
    """KL divergence by policy and budget, the interval by resampling windows."""

    def cell(found: Sequence[Divergence]) -> str:
        values = [d.kl for d in found if d.kl is not None]
        return _shown(bootstrap(lambda x: x, values), 1, ".3f") if values else ""

    title = "KL divergence of the full cache's next token, nats"
    return _grid(title, divergences, lambda d: d.budget, budget_name, cell)


def top1(divergences: Sequence[Divergence]) -> Table:
    """Top-1 agreement by policy and budget, the interval by resampling windows."""

    def cell(found: Sequence[Divergence]) -> str:
        values = [d.top1 for d in found if d.top1 is not None]
        return _shown(bootstrap(lambda x: x, values), 100) if values else ""

    title = "Top-1 agreement with the full cache, %"
    return _grid(title, divergences, lambda d: d.budget, budget_name, cell)


def mean_score(answers: Iterable[Answer]) -> Estimate | None:
    """The accuracy, with Wilson's interval. None: nothing was scored.

    Questions about one prompt are no independent witnesses: each sample counts once, by its mean.
    """
    scores = _scores(answers)
    return wilson(list(scores.values())) if scores else None


def _accuracy(found: Sequence[Answer]) -> str:
    mean = mean_score(found)
    return _shown(mean, 100) if mean else ""


def _mean_length(found: Sequence[Answer]) -> str:
    lengths = [a.n_answer for a in found if a.n_answer is not None]
    return f"{np.mean(lengths):.1f}" if lengths else ""


def _scores(answers: Iterable[Answer]) -> Scores:
    by_sample: dict[tuple[str, str], list[float]] = {}
    for a in answers:
        if a.score is not None:
            by_sample.setdefault((a.dataset, a.sample), []).append(a.score)
    return {sample: sum(scores) / len(scores) for sample, scores in by_sample.items()}


def _ratio(a: Array, b: Array) -> Array:
    # samples of which the full cache got nothing right say nothing
    return a / np.where(b > 0, b, np.nan)


def _paired(mine: Scores, its: Scores) -> tuple[list[float], list[float]]:
    both = [sample for sample in mine if sample in its]
    return [mine[sample] for sample in both], [its[sample] for sample in both]


def _shown(estimate: Estimate, scale: float, spec: str = ".1f") -> str:
    value, low, high = (format(scale * x, spec) for x in estimate)
    return f"{value} [{low}, {high}]"


def _grid(
    title: str,
    found: Sequence[Found],
    column: Callable[[Found], Any],
    name: Callable[[Any], str],
    cell: Callable[[Sequence[Found]], str],
) -> Table:
    """A row for each policy, the full cache first, and what can't run in notes."""
    cells: dict[tuple[str, Any], list[Found]] = {}
    for one in found:
        cells.setdefault((one.policy, column(one)), []).append(one)
    policies = list(dict.fromkeys(one.policy for one in found))
    policies.sort(key=lambda policy: policy != FULL)
    columns: list[Any] = sorted({column(one) for one in found}, key=_order)
    rows, notes = [], []
    for policy in policies:
        row = [policy]
        for key in columns:
            inside = cells.get((policy, key), [])
            row.append(cell(inside) if inside else "")
            where, errors = f"{policy} at {name(key)}", [one.error for one in inside if one.error]
            if errors:
                count = f"{len(errors)} of {len(inside)}"
                notes.append(f"{where}: {count} can't run, like: {errors[0]}")
            most = max(len(cells.get((other, key), [])) for other in policies)
            if 0 < len(inside) < most:
                notes.append(f"{where}: {len(inside)} of {most} measured")
        rows.append(row)
    return Table(title, ["", *map(name, columns)], rows, notes)


def _order(column: Any) -> Any:
    # budgets may be shares, cells and None
    return column if isinstance(column, str) else by_size(column)
