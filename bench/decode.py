"""Decode speed over the full cache and over 10 % of it, and what pruning costs beside prefill.

    python bench/decode.py

SmolLM2-135M, a prompt of 8192 tokens, two threads, both caches in one process, taking turns.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

from csp_edge import CSP
from csp_edge.engine import Engine, Prompt

sys.path.append(str(Path(__file__).parent))
from overhead import smollm2  # noqa: E402

N_DECODE = 16


def decode(engine: Engine) -> float:
    """Seconds to decode N_DECODE tokens."""
    t0 = time.perf_counter()
    for i in range(N_DECODE):
        engine.decode(2000 + i)
    return time.perf_counter() - t0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kv-type", default="f16")
    args = parser.parse_args()

    n_ctx = args.tokens + (args.rounds + 1) * N_DECODE
    policy = CSP(args.budget)
    engines = []
    for prune in (False, True):
        engine = Engine(
            Path(smollm2()), n_ctx=n_ctx, n_threads=2, kv_type=args.kv_type, prune=prune
        )
        tokens = [1000 + i * 7919 % 40000 for i in range(args.tokens)]
        window = policy.resolve(args.tokens).window if prune else 0
        with Prompt(tokens) as prompt:
            prefill = engine.prefill(prompt, window=window)
        engines.append(engine)
    full, pruned = engines
    pruning = pruned.prune(policy)

    times = []
    for i in range(args.rounds + 1):
        order = (full, pruned) if i % 2 else (pruned, full)
        done = {engine: decode(engine) for engine in order}
        if i:  # the first is a warm-up
            times.append((done[full], done[pruned]))

    print(f"SmolLM2-135M, {args.tokens} tokens of prompt, {args.kv_type} cache, two threads")
    for name, engine, k in (("full", full, 0), ("pruned", pruned, 1)):
        speed = N_DECODE / statistics.median(t[k] for t in times)
        n_bytes = engine.n_cells * engine.bytes_per_cell / 2**20
        print(f"{name:8} {engine.n_cells:6} cells {n_bytes:8.1f} MiB {speed:8.1f} tokens/s")
    print(f"decode speed, pruned/full: {statistics.median(f / p for f, p in times):.2f}")
    cost = pruning.score_s + pruning.select_s + pruning.compact_s
    print(
        f"score {pruning.score_s:.3f} s, select {pruning.select_s:.3f} s, "
        f"compact {pruning.compact_s:.3f} s: {cost / prefill.decode_s:.2%} of a prefill of "
        f"{prefill.decode_s:.1f} s ({args.tokens / prefill.decode_s:.0f} tokens/s)"
    )


if __name__ == "__main__":
    main()
