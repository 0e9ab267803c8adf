"""How long reading, pruning and answering take, over all caches of one prompt in turns."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

from csp_edge.bench.case import N_ANSWER, N_DECODE, N_WARM, n_image_tokens, policy, text
from csp_edge.engine import Engine, Snapshot
from csp_edge.eval.contenders import Budget
from csp_edge.loading import Progress
from csp_edge.policies import CSP
from csp_edge.tokenizer import Prompt

N_LAPS = 3  # that every cache has after each prefill: they are short beside it


@dataclass(slots=True)
class Cache:
    """One cache of a prompt: pruned to `budget`, or, if that is None, full.

    n_cells: after the prompt. Seconds, one for each lap: decode_s of N_DECODE tokens; even_s of as
    many over a context of n_cells tokens that was never pruned. Of the full cache decode_s alone.
    """

    budget: Budget | None
    n_cells: int
    decode_s: list[float] = field(default_factory=list)
    even_s: list[float] = field(default_factory=list)
    prune_s: list[float] = field(default_factory=list)
    score_s: list[float] = field(default_factory=list)
    select_s: list[float] = field(default_factory=list)
    compact_s: list[float] = field(default_factory=list)

    @property
    def speed(self) -> list[float]:
        """Tokens decoded a second, for each lap."""
        return [N_DECODE / s for s in self.decode_s]

    @property
    def speed_over_even(self) -> list[float]:
        """For each lap, over the speed of a context of as many cells that was never pruned."""
        return [even / s for even, s in zip(self.even_s, self.decode_s, strict=True)]


@dataclass(slots=True)
class Length:
    """Prompts of one length. Seconds, one for each round; the full cache comes first."""

    n_tokens: int
    n_image_tokens: int
    caches: list[Cache]
    encode_s: list[float] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)

    @property
    def prefill_speed(self) -> list[float]:
        """Tokens read a second, for each round."""
        return [self.n_tokens / s for s in self.prefill_s]

    def first_token_s(self, cache: Cache) -> list[float]:
        """Of every round: pictures encoded, the prompt read and, but for the full cache, pruned."""
        read = [sum(each) for each in zip(self.encode_s, self.prefill_s, strict=True)]
        if not cache.prune_s:
            return read
        return [s + cache.prune_s[N_LAPS * i] for i, s in enumerate(read)]

    def speedup(self, cache: Cache) -> list[float]:
        """For each lap, the speed of decoding over that of the full cache."""
        full = self.caches[0].decode_s
        return [f / s for f, s in zip(full, cache.decode_s, strict=True)]


def measure(
    engine: Engine,
    prompt: Prompt,
    budgets: Sequence[Budget],
    *,
    n_rounds: int,
    progress: Progress,
) -> Length:
    """Time a prompt's caches: the full one, and for each budget a pruned one.

    In every round the prompt is read once, with the queries observed that prune it. Then all caches
    take turns, every second lap in reverse: each is brought back as the prompt left it, pruned,
    and an answer decoded over it.

    Args:
        engine: made with prune=True.
        progress: called between turns, with ("decode", done, total).

    Raises:
        OptionError: a budget keeps all of the prompt.
        MemoryLimitError: the cache doesn't fit, or a copy of it.
    """
    n_tokens = prompt.n_tokens
    policies = {budget: policy(budget, n_tokens) for budget in budgets}
    caches = [Cache(b, p.resolve(n_tokens).budget) for b, p in policies.items()]
    found = Length(n_tokens, n_image_tokens(prompt), [Cache(None, n_tokens), *caches])
    # it warms up on these
    evens = {cache.budget: _even(engine, cache.n_cells) for cache in caches}
    answer = list(islice(cycle(i for i in prompt.items if isinstance(i, int)), N_ANSWER))
    window = CSP().resolve(n_tokens, has_pictures=prompt.has_pictures).window

    for i in range(n_rounds):
        snapshot = _read(engine, prompt, window, found)
        # full, pruned, even, pruned, even, ...
        turns = [(cache, even) for cache in found.caches for even in (False, True)]
        turns.remove((found.caches[0], True))
        for j in range(N_LAPS):
            for k, (cache, is_even) in enumerate(turns if (i + j) % 2 == 0 else turns[::-1]):
                progress("decode", j * len(turns) + k, N_LAPS * len(turns))
                if is_even:
                    engine.restore(evens[cache.budget])
                    cache.even_s.append(_decode(engine, answer))
                    continue
                engine.restore(snapshot)
                if cache.budget is None:
                    engine.observe(0)
                else:
                    _prune(engine, policies[cache.budget], cache)
                cache.decode_s.append(_decode(engine, answer))
        progress("decode", N_LAPS * len(turns), N_LAPS * len(turns))
    return found


def _even(engine: Engine, n_cells: int) -> Snapshot:
    """A context of that many tokens."""
    engine.clear()
    with Prompt(text(engine.tokenizer, n_cells)) as prompt:
        engine.prefill(prompt, room=N_ANSWER)
    return engine.snapshot()


def _read(engine: Engine, prompt: Prompt, window: int, found: Length) -> Snapshot:
    engine.clear()
    engine.encoder.embeddings.clear()
    t0 = time.perf_counter()
    prefill = engine.prefill(prompt, room=N_ANSWER, window=window)
    _ = engine.logits  # there only when the device is done
    seconds = time.perf_counter() - t0
    found.encode_s.append(prefill.encode_s)
    found.prefill_s.append(seconds - prefill.encode_s)
    return engine.snapshot()


def _prune(engine: Engine, policy: CSP, cache: Cache) -> None:
    t0 = time.perf_counter()
    pruning = engine.prune(policy)
    cache.prune_s.append(time.perf_counter() - t0)
    cache.score_s.append(pruning.score_s)
    cache.select_s.append(pruning.select_s)
    cache.compact_s.append(pruning.compact_s)


def _decode(engine: Engine, answer: Sequence[int]) -> float:
    """Seconds of all tokens but the first ones."""
    t0 = 0.0
    for i, token in enumerate(answer):
        if i == N_WARM:
            t0 = time.perf_counter()
        engine.decode(token)
        _ = engine.logits
    return time.perf_counter() - t0
