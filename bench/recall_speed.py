"""What recall costs while an answer is written: tokens a second, full, pruned, and with recall.

    python bench/recall_speed.py

SmolLM2-135M in turns, on a prompt of text. A recall chooses anew by the answer's own queries, often
at first and then less (docs/memory.md).
"""

import argparse
import statistics
import time

from overhead import smollm2

from csp_edge.engine import Engine
from csp_edge.eval.fidelity import default_text
from csp_edge.policies import CSP
from csp_edge.tokenizer import Prompt

WAYS = "full", "pruned", "recall"


def prefilled(way: str, items: list, n_answer: int, options: argparse.Namespace) -> Engine:
    engine = Engine(
        smollm2(),
        n_threads=options.threads,
        prune=True,
        recall="f16" if way == "recall" else None,
    )
    policy = CSP(options.budget)
    window = policy.resolve(len(items), has_pictures=False).window
    engine.prefill(Prompt(items), room=n_answer, window=window, policy=policy)
    return engine


def seconds(engine: Engine, way: str, tokens: list, budget: float) -> float:
    """To write an answer over the cache."""
    if way == "full":
        engine.observe(0)
    else:
        engine.prune(CSP(budget))
    t0 = time.perf_counter()
    for token in tokens:
        engine.decode(token)
    return time.perf_counter() - t0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--answers", type=int, nargs="+", default=[16, 128], help="tokens")
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    text, vocabulary = default_text(), Engine(smollm2())
    print("prompt  answer" + "".join(f"{way:>10}" for way in WAYS) + "   tokens a second")
    for n_tokens in options.lengths:
        items = vocabulary.tokenizer.tokenize([text[: 8 * n_tokens]]).items[:n_tokens]
        engines = {way: prefilled(way, items, max(options.answers), options) for way in WAYS}
        snapshots = {way: engine.snapshot() for way, engine in engines.items()}
        for n_answer in options.answers:
            taken: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(options.rounds):
                for way, engine in engines.items():
                    engine.restore(snapshots[way])
                    taken[way].append(seconds(engine, way, items[:n_answer], options.budget))
            speeds = [n_answer / statistics.median(taken[way]) for way in WAYS]
            print(f"{n_tokens:6}{n_answer:8}" + "".join(f"{x:10.1f}" for x in speeds), flush=True)


if __name__ == "__main__":
    main()
