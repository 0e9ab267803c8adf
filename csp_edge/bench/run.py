"""All of a run, and what stands in its file."""

import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from typing import Any

from csp_edge.bench import memory, speed
from csp_edge.bench.case import N_DECODE, Case, policy
from csp_edge.bench.memory import Memory
from csp_edge.bench.speed import Cache, Length
from csp_edge.bench.spread import spread
from csp_edge.eval.contenders import Budget, budget_name
from csp_edge.loading import Progress


@dataclass(frozen=True, slots=True)
class Run:
    """What was measured of a model.

    load: the system's load average of a minute, before and after. None: it isn't told.
    memory: of every length, and in it of every cache. None: it isn't told.
    """

    case: Case
    model: str
    quantization: str
    n_threads: int
    lengths: list[Length]
    memory: list[list[Memory | None]]
    load: tuple[float, float] | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every measurement, in seconds and bytes, beside medians and quartiles."""
        return {
            **asdict(self.case),
            "model": self.model,
            "quantization": self.quantization,
            "n_threads": self.n_threads,
            "n_decode": N_DECODE,
            "load": self.load,
            "lengths": [
                {
                    "n_tokens": length.n_tokens,
                    "n_image_tokens": length.n_image_tokens,
                    "encode_s": length.encode_s,
                    "prefill_s": length.prefill_s,
                    "prefill_tokens_per_second": spread(length.prefill_speed)._asdict(),
                    "caches": [
                        _as_dict(length, cache, found)
                        for cache, found in zip(length.caches, memories, strict=True)
                    ],
                }
                for length, memories in zip(self.lengths, self.memory, strict=True)
            ],
        }


def _as_dict(length: Length, cache: Cache, memory: Memory | None) -> dict[str, Any]:
    figures: dict[str, Any] = {
        **asdict(cache),
        "budget": None if cache.budget is None else budget_name(cache.budget),
        "first_token_s": length.first_token_s(cache),
        "tokens_per_second": spread(cache.speed)._asdict(),
        "memory": asdict(memory) if memory else None,
    }
    if cache.budget is not None:
        figures["speedup"] = spread(length.speedup(cache))._asdict()
        figures["speed_over_even"] = spread(cache.speed_over_even)._asdict()
    return figures


def bench(
    case: Case,
    lengths: Sequence[int | None],
    budgets: Sequence[Budget],
    *,
    n_rounds: int = 5,
    progress: Progress = lambda stage, done, total: None,
) -> Run:
    """Measure a model over the full cache and over pruned ones, in turns.

    Args:
        lengths: tokens of prompts, pictures included. None: what the pictures take, and a question.
        budgets: that each of them is pruned to.
        n_rounds: how often each prompt is read.
        progress: called with ("load" | "encode" | "prefill" | "decode" | "memory", done,
            total).

    Raises:
        OptionError: a length is beyond the context, or a budget keeps all of it.
        ModelError, ProjectorError: the model or its projector can't be used, or not be pruned.
        MemoryLimitError: it doesn't fit.
    """
    load = _load()
    with ExitStack() as stack:
        engine = stack.enter_context(closing(case.engine(progress)))
        # whatever makes no sense is told before the first is measured
        prompts = [stack.enter_context(case.prompt(engine, n)) for n in lengths]
        for prompt in prompts:
            for budget in budgets:
                policy(budget, prompt.n_tokens)
        found = [
            speed.measure(engine, prompt, budgets, n_rounds=n_rounds, progress=progress)
            for prompt in prompts
        ]
        info, n_threads = engine.info, engine.n_threads
    memories: list[list[Memory | None]] = [[] for _ in found]
    n_caches = 1 + len(budgets)
    for i, length in enumerate(found):
        for cache in length.caches:
            n_done = i * n_caches + len(memories[i])
            progress("memory", n_done, len(found) * n_caches)
            memories[i].append(memory.measure(case, length.n_tokens, cache.budget))
    progress("memory", len(found) * n_caches, len(found) * n_caches)
    name = info.name or info.path.stem
    after = _load()
    loads = None if load is None or after is None else (load, after)
    return Run(case, name, info.quantization, n_threads, found, memories, loads)


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
