"""A page of results, in Markdown, from the logs of runs."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, get_args, get_type_hints

from csp_edge.errors import OptionError
from csp_edge.eval import report
from csp_edge.eval.answers import Answer
from csp_edge.eval.contenders import FULL, RIVALS, by_size
from csp_edge.eval.fidelity import Divergence
from csp_edge.eval.log import Entry, read_log
from csp_edge.eval.table import Table

Found: TypeAlias = Answer | Divergence

_FIELDS = ("dataset", "skill", "n_images")  # the others would say little more
_PROTOCOL = """\
Each prompt is prefilled once, its last queries observed, and then pruned by every policy to every
budget. The last token is decoded again over what is left, so already an answer's first token comes
from the pruned cache. CSP is shown the first 16 tokens of the full cache's answer (`lookahead`),
which are taken back. Later questions go on over the same cache, after the right answers to those
before. In brackets: 95 % intervals, of accuracies Wilson's over samples, of comparisons by
resampling the samples that both were asked."""
_FIDELITY_PROTOCOL = """\
Windows of a text, each a prompt and its true continuation. The prompt is prefilled once and pruned
by every policy to every budget, its last token decoded again, then the continuation, token by
token. At every step the next token's distribution is held against the full cache's. In brackets:
95 % intervals, by resampling windows."""


def found_in(path: Path, header: Mapping[str, Any], entries: Iterable[Entry]) -> list[Found]:
    """What a log's entries say.

    Raises:
        OptionError: it is not of this version.
    """
    kinds: dict[str, type[Found]] = {"answers": Answer, "fidelity": Divergence}
    try:
        kind = kinds[header["log"]]
        found = [kind(**entry) for entry in entries]
        types = get_type_hints(kind)
        for each in found:
            _check_types(each, types)
    except (KeyError, TypeError) as error:
        raise OptionError(f"{path}: not a log of this version ({error}): make it anew") from None
    return found


def _check_types(found: Found, types: Mapping[str, Any]) -> None:
    for name, kind in types.items():
        value = getattr(found, name)
        is_fine = isinstance(value, kind) or (type(value) is int and float in get_args(kind))
        if isinstance(value, (int, float)):
            is_fine = is_fine and math.isfinite(value)
            is_fine = is_fine and (name not in ("score", "top1") or 0 <= value <= 1)
        if not is_fine:
            raise TypeError(f"{name}={value!r}")


@dataclass(frozen=True, slots=True)
class Run:
    """What logs say of one model and its data. Seeds are taken together."""

    title: str
    seeds: list[int | None]
    found: list[Found]

    @property
    def answers(self) -> list[Answer]:
        return [each for each in self.found if isinstance(each, Answer)]

    @property
    def divergences(self) -> list[Divergence]:
        return [each for each in self.found if isinstance(each, Divergence)]


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs that logs are of.

    Raises:
        OptionError: a log can't be read, or is not of this version.
    """
    runs: dict[str, Run] = {}
    for path in paths:
        header, entries = read_log(path)
        found = found_in(path, header, entries)
        seed = header.pop("seed", None)
        if seed is not None and not isinstance(seed, int):
            raise OptionError(f"{path}: not a log of this version (seed={seed!r}): make it anew")
        title = f"{header.get('model')} on {header.get('data')}"
        run = runs.setdefault(json.dumps(header, sort_keys=True), Run(title, [], []))
        run.seeds.append(seed)
        run.found.extend(_of_seed(each, seed) for each in found)
    return list(runs.values())


def _of_seed(found: Found, seed: object) -> Found:
    """Told apart from what another seed calls the same."""
    return replace(found, sample=f"{found.sample}/{seed}") if isinstance(found, Answer) else found


def page(runs: Iterable[Run], plots: Mapping[str, Path], folder: Path) -> str:
    """Markdown: of each run its protocol, and tables of everything in it.

    Args:
        plots: of runs, by their titles.
        folder: where the page will be.
    """
    parts = ["# Results"]
    for run in runs:
        parts.append(f"## {run.title}")
        tables = []
        if run.answers:
            parts += [_PROTOCOL, _counted(run.answers, run.seeds)]
            tables += answer_tables(as_they_come(run.answers), _FIELDS)
            tables += [
                replace(table, title=f"{table.title[:-3]}, with other settings, %")
                for table in _by_turn(with_settings(run.answers))
            ]
        if run.divergences:
            parts.append(_FIDELITY_PROTOCOL)
            tables += [report.kl(run.divergences), report.top1(run.divergences)]
        if run.title in plots:
            link = Path(os.path.relpath(plots[run.title], folder)).as_posix()
            parts.append(f"![{run.title}]({link})")
        for table in tables:
            parts += [f"### {table.title}", table.markdown()]
    return "\n\n".join(parts) + "\n"


def _counted(answers: Sequence[Answer], seeds: Sequence[int | None]) -> str:
    samples = {(a.dataset, a.sample): a.n_images for a in answers}
    n_tokens = [a.n_tokens for a in answers if a.n_tokens]
    prompts = f", {min(n_tokens)} to {max(n_tokens)} tokens" if n_tokens else ""
    drawn = ", ".join(str(seed) for seed in sorted(set(seeds) - {None}, key=str))
    return (
        f"{len(samples)} conversations about {min(samples.values())} to {max(samples.values())} "
        f"pictures{prompts}, {len(answers)} answers." + (f" Seeds: {drawn}." if drawn else "")
    )


def as_they_come(answers: Iterable[Answer]) -> list[Answer]:
    """Of the full cache, and of policies without settings of their own."""
    return [a for a in answers if ":" not in a.policy]


def with_settings(answers: Sequence[Answer]) -> list[Answer]:
    """Of policies with settings, and for comparison of the same without and of the full cache."""
    names = {a.policy.partition(":")[0] for a in answers if ":" in a.policy}
    shown = {*names, FULL} if names else set()
    return [a for a in answers if a.policy in shown or ":" in a.policy]


def answer_tables(answers: Sequence[Answer], fields: Iterable[str]) -> list[Table]:
    """By policy and budget, and at each budget by those of the fields that vary."""
    tables = _by_turn(answers)
    policies = {a.policy for a in answers}
    if RIVALS[0] in policies and len(policies) > 2:
        tables.append(report.ahead_of(answers, RIVALS[0]))
    budgets = sorted({a.budget for a in answers if a.budget is not None}, key=by_size)
    for field in fields:
        if len({getattr(a, field) for a in answers}) > 1:
            tables += [report.accuracy_by(answers, field, budget) for budget in budgets]
    return tables


def _by_turn(answers: Sequence[Answer]) -> list[Table]:
    """Accuracy, and its share of the full cache's, of the first questions and of later ones."""
    tables = []
    for which, asked in {
        "first questions": [a for a in answers if a.turn == 1],
        "later questions over the same cache": [a for a in answers if a.turn > 1],
    }.items():
        if asked:
            tables.append(report.accuracy(asked, f"Accuracy, {which}, %"))
        if any(a.policy != FULL for a in asked):
            title = f"Share of the full cache's accuracy, {which}, %"
            tables.append(report.share_of_full(asked, title))
    return tables
