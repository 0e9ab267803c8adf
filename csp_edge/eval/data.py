"""MileBench's samples for a run: of which sets and skills, and how many."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from csp_edge.errors import OptionError
from csp_edge.eval.milebench import read_milebench
from csp_edge.eval.samples import Sample


def milebench_samples(
    folders: Sequence[Path], skills: Sequence[str] | None, n_samples: int | None
) -> list[Sample]:
    """Of MileBench's sets, the first of each.

    Args:
        skills: of these alone, or of sets of these names.

    Raises:
        OptionError: there is no set, one is malformed, or none is of these skills.
    """
    sets = {}
    for folder in folders:
        for dataset, group in groupby(read_milebench(folder), lambda sample: sample.dataset):
            if dataset in sets:
                raise OptionError(f"{folder}: set {dataset!r} stands there twice: give it once")
            sets[dataset] = list(group)[:n_samples]
    samples = [sample for each in sets.values() for sample in each]
    names = {name for s in samples for name in (s.dataset, s.turns[0].skill)}
    for skill in skills or ():
        if skill not in names:
            raise OptionError(f"no skill {skill!r} there: choose of {', '.join(sorted(names))}")
    return [s for s in samples if not skills or {s.dataset, s.turns[0].skill} & set(skills)]
