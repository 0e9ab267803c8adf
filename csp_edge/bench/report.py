"""Tables of a run."""

from collections.abc import Sequence

from csp_edge.bench.memory import Memory
from csp_edge.bench.run import Run
from csp_edge.bench.speed import Cache, Length
from csp_edge.bench.spread import spread
from csp_edge.eval.contenders import budget_name
from csp_edge.eval.table import Table

_MIB = 2**20


def tables(run: Run) -> list[Table]:
    """Speed, and, where the system tells it, memory."""
    found = [_speed(run)]
    if run.memory[0][0]:
        found.append(_memory(run))
    return found


def _speed(run: Run) -> Table:
    columns = ["prompt", "kept", "cells", "prefill, tokens/s", "first token, s", "prune, s"]
    columns += ["of prefill", "decode, tokens/s", "full = 1", "as many cells = 1"]
    if run.case.n_images:
        columns.insert(3, "encode, s")
    rows = [_speed_row(run, length, cache) for length in run.lengths for cache in length.caches]
    threads = "1 thread" if run.n_threads == 1 else f"{run.n_threads} threads"
    title = f"Speed of {run.model}, {run.quantization}, {run.case.kv_type} cache, {threads}"
    return Table(title, columns, rows, _notes(run))


def _speed_row(run: Run, length: Length, cache: Cache) -> list[str]:
    is_full = cache.budget is None
    row = [
        *_names(length, cache),
        spread(length.prefill_speed).text(1) if is_full else "",
        spread(length.first_token_s(cache)).text(2),
        "" if is_full else spread(cache.prune_s).text(3),
        "" if is_full else _share(cache.prune_s, length.prefill_s),
        spread(cache.speed).text(1),
        "" if is_full else spread(length.speedup(cache)).text(2),
        "" if is_full else spread(cache.speed_over_even).text(2),
    ]
    if run.case.n_images:
        row.insert(3, spread(length.encode_s).text(2) if is_full else "")
    return row


def _notes(run: Run) -> list[str]:
    first = run.lengths[0]
    n_rounds, n_turns = len(first.prefill_s), len(first.caches[0].decode_s)
    prefills = "1 prefill" if n_rounds == 1 else f"{n_rounds} prefills"
    notes = [
        f"Medians of {prefills} and of {n_turns} turns of each cache, "
        "± half of what is between the quartiles.",
        "Last: decode speed over that of the full cache, and over that of a context of as many "
        "cells that was never pruned.",
    ]
    if run.case.n_images:
        shares = [f"{length.n_image_tokens} of {length.n_tokens}" for length in run.lengths]
        notes.append(f"Tokens of pictures: {', '.join(shares)}.")
    if run.load:
        notes.append(f"Load average {run.load[0]:.1f} before and {run.load[1]:.1f} after.")
    return notes


def _share(part: Sequence[float], whole: Sequence[float]) -> str:
    return f"{spread(part).median / spread(whole).median:.1%}"


def _memory(run: Run) -> Table:
    columns = ["prompt", "kept", "cells", "K and V, MiB", "at most, MiB", "while answering, MiB"]
    rows = []
    for length, memories in zip(run.lengths, run.memory, strict=True):
        for cache, memory in zip(length.caches, memories, strict=True):
            rows.append([*_names(length, cache), *_amounts(memory)])
    notes = ["All of a process that does nothing else, weights included."]
    return Table("Memory", columns, rows, notes)


def _amounts(memory: Memory | None) -> list[str]:
    if memory is None:
        return ["", "", ""]
    return [f"{n / _MIB:.1f}" for n in (memory.kv, memory.peak, memory.answer)]


def _names(length: Length, cache: Cache) -> list[str]:
    return [str(length.n_tokens), budget_name(cache.budget), str(cache.n_cells)]
