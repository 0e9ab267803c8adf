"""A plot of accuracy over budget."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from csp_edge.errors import OptionError
from csp_edge.eval.answers import Answer
from csp_edge.eval.contenders import FULL, Budget, budget_name, by_size
from csp_edge.eval.report import mean_score

FORMATS = (".png", ".svg")
# colors that most eyes tell apart, then again with another dash
COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B"),
    *("#7F7F7F", "#BCBD22"),
)
MARKERS = "osD^vPX<>p"
_DASHES = ("-", "--", ":")


def check_plot(path: Path) -> None:
    """Find out before a long run whether it can end in a plot.

    Raises:
        OptionError: it can't be plotted to this file, or Matplotlib is missing.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError(f"{path}: give a name that ends with {' or '.join(FORMATS)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise OptionError("a plot needs Matplotlib: pip install csp-edge[eval]") from None


def plot(answers: Sequence[Answer], path: Path, title: str) -> None:
    """Draw a line for each policy, its 95 % interval as a band, the full cache's dashed.

    Args:
        path: ends with .png or .svg.

    Raises:
        OptionError: as check_plot() does, or the file can't be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    places = _places(answers)
    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(places.values()), [budget_name(budget) for budget in places])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="kept of the prompt's KV cache", ylabel="accuracy, %", title=title)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _draw(axes, answers, places)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", frameon=False, handlelength=3)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure: the same file from the same figure.

    Raises:
        OptionError: the file can't be written.
    """
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "csp-edge"
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
    try:
        figure.savefig(path, dpi=160, metadata=metadata)
    except OSError as error:
        raise OptionError(f"{path}: can't be written: {error.strerror}") from None


def _places(answers: Sequence[Answer]) -> dict[Budget, float]:
    """Where a budget stands on the axis: the share of the prompt that is kept, in the mean."""
    shares: dict[Budget, list[float]] = {}
    for a in answers:
        if a.budget is not None and a.n_kept and a.n_tokens:
            shares.setdefault(a.budget, []).append(a.n_kept / a.n_tokens)
    return {budget: float(np.mean(shares[budget])) for budget in sorted(shares, key=by_size)}


def _draw(axes: Any, answers: Sequence[Answer], places: Mapping[Budget, float]) -> None:
    full = mean_score(answer for answer in answers if answer.policy == FULL)
    if full:
        axes.axhline(100 * full.value, color="0.35", linestyle="--", linewidth=1.2, label=FULL)
    lines = {policy: _line(answers, policy, places) for policy in _policies(answers)}
    # the legend from top to bottom as the lines stand
    for i, (policy, line) in sorted(
        enumerate(lines.items()), key=lambda item: -item[1][1][1].mean()
    ):
        x, value, low, high = line
        color = COLORS[i % len(COLORS)]
        axes.fill_between(x, low, high, color=color, alpha=0.08, linewidth=0)
        axes.plot(
            x,
            value,
            color=color,
            marker=MARKERS[i % len(MARKERS)],
            linestyle=_DASHES[i // len(COLORS) % len(_DASHES)],
            markersize=5,
            linewidth=1.8,
            label=policy,
        )


def _policies(answers: Sequence[Answer]) -> list[str]:
    """Those that ran."""
    ran = (a.policy for a in answers if a.policy != FULL and a.score is not None)
    return list(dict.fromkeys(ran))


def _line(
    answers: Sequence[Answer], policy: str, places: Mapping[Budget, float]
) -> npt.NDArray[np.float64]:
    """[4, n_budgets]: the place, the accuracy in percent, and its interval's bounds."""
    points = []
    for budget, place in places.items():
        mean = mean_score(a for a in answers if (a.policy, a.budget) == (policy, budget))
        if mean:
            points.append((place, 100 * mean.value, 100 * mean.low, 100 * mean.high))
    return np.array(points).T
