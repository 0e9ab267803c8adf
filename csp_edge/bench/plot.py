"""A plot of speed, waiting and memory over the length of the prompt."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from csp_edge.bench.memory import Memory
from csp_edge.bench.run import Run
from csp_edge.bench.speed import Cache, Length
from csp_edge.bench.spread import Spread, spread
from csp_edge.eval.contenders import budget_name
from csp_edge.eval.plot import COLORS, MARKERS, check_plot, save

_MIB = 2**20

Value: TypeAlias = Callable[[Length, Cache, Memory | None], Spread | None]


def _memory(length: Length, cache: Cache, memory: Memory | None) -> Spread | None:
    return spread([memory.answer / _MIB]) if memory else None


_PANELS: dict[str, Value] = {
    "decode, tokens/s": lambda length, cache, memory: spread(cache.speed),
    "first token, s": lambda length, cache, memory: spread(length.first_token_s(cache)),
    "memory while answering, MiB": _memory,
}


def plot(run: Run, path: Path) -> None:
    """Draw a line for the full cache and for each budget, the quartiles as a band.

    Args:
        path: ends with .png or .svg.

    Raises:
        OptionError: Matplotlib is missing, or the file can't be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, len(_PANELS))
    n_tokens = [length.n_tokens for length in run.lengths]
    for axes, (name, figure_of) in zip(panels, _PANELS.items(), strict=True):
        for i, cache in enumerate(run.lengths[0].caches):
            found = [
                figure_of(length, length.caches[i], memories[i])
                for length, memories in zip(run.lengths, run.memory, strict=True)
            ]
            points = [(n, *each) for n, each in zip(n_tokens, found, strict=True) if each]
            if not points:
                continue
            x, median, low, high = zip(*points, strict=True)
            color = COLORS[i % len(COLORS)]
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(
                x,
                median,
                color=color,
                marker=MARKERS[i % len(MARKERS)],
                markersize=5,
                linewidth=1.8,
                label=budget_name(cache.budget),
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(n_tokens, [str(n) for n in n_tokens])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="tokens of the prompt", ylabel=name)
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{run.model}, {run.quantization}, {run.case.kv_type} cache")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="kept", loc="outside right upper", frameon=False)
    save(figure, path)
