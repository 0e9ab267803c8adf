"""Pruning while the prompt is read: accuracy within max_cells beside pruning the whole prompt.

    python bench/bounded.py

The embedded model, the suite's first questions about 8 and 16 pictures (some 550 and 1080 cells).
Pruned once the whole prompt is there, and within max_cells: by a probe, that is by the question's
own queries, run before the pictures come, or by those of the tokens that came last. All of them
keep the same number of cells in the end, and answers begin over what was kept.
"""

import argparse
import time
from collections import defaultdict

import numpy as np

from csp_edge import CSP, EdgeVLM
from csp_edge.engine import Engine
from csp_edge.eval.intervals import bootstrap, wilson
from csp_edge.eval.protocol import greedy, look_ahead, prefill, prune
from csp_edge.eval.samples import Sample
from csp_edge.eval.scoring import score
from csp_edge.eval.suite import suite
from csp_edge.hook import Pruning
from csp_edge.template import normalize_messages
from csp_edge.tokenizer import Prompt

MAX_TOKENS = 64


def answer(engine: Engine) -> str:
    tokens = greedy(engine, MAX_TOKENS)
    return b"".join(map(engine.tokenizer.piece, tokens)).decode(errors="replace").strip()


def whole(engine: Engine, prompt: Prompt, policy: CSP) -> tuple[dict[str, str], Pruning]:
    """Answers over the full and the pruned cache, and what was kept."""
    prefilled = prefill(engine, prompt, [policy], room=MAX_TOKENS)
    prune(engine, prefilled, None)
    said = {"full": answer(engine)}
    engine.restore(prefilled.cache)
    engine.look_ahead(prefilled.answer)
    pruning = engine.prune(policy)
    engine.redecode()
    return said | {"pruned": answer(engine)}, pruning


def bounded(engine: Engine, prompt: Prompt, policy: CSP) -> tuple[str, Pruning]:
    engine.clear()
    amounts = policy.resolve(prompt.n_tokens)
    engine.prefill(prompt, window=amounts.window, lookahead=amounts.lookahead, policy=policy)
    look_ahead(engine, policy)
    pruning = engine.prune(policy)
    engine.redecode()
    return answer(engine), pruning


def overlap(a: Pruning, b: Pruning) -> float:
    """Of the cells that a head keeps, the share that the other keeps, in the mean over heads."""
    heads = [
        len(np.intersect1d(x, y)) / len(x)
        for one, other in zip(a.layers, b.layers, strict=True)
        for x, y in zip(one.kept, other.kept, strict=True)
    ]
    return float(np.mean(heads))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--samples", type=int, default=6, help="of each skill and number of pictures (6)")
    add("--images", type=int, nargs="+", default=[8, 16])
    add("--max-cells", type=int, nargs="+", default=[256, 512])
    add("--budget", type=float, default=0.1, help="share of the prompt's cells (0.1)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    args = parser.parse_args()

    policy = CSP(args.budget)
    free = EdgeVLM.demo(n_threads=args.threads)
    vlms = {}
    for n in args.max_cells:
        for name, probes in ((f"{n} cells, probe", True), (f"{n} cells, last tokens", False)):
            vlm = EdgeVLM.demo(max_cells=n, n_threads=args.threads)
            vlm.engine._probes = probes
            # every picture is encoded once
            vlm.engine.encoder.embeddings = free.engine.encoder.embeddings
            vlms[name] = vlm

    scores, shared = defaultdict(list), defaultdict(list)
    seconds = defaultdict(float)
    samples = list(suite(n_samples=args.samples, n_images=args.images, n_turns=1, seed=args.seed))
    for sample in samples:
        ask(sample, policy, free, vlms, scores, shared, seconds)

    print(
        f"{len(samples)} questions about {args.images} pictures, pruned to {args.budget:.0%}, "
        f"CSP, exact answers"
    )
    print(f"{'':26}{'right, % (95 %)':>22}{'less than pruned (95 %)':>27}{'same cells':>12}")
    for name, found in scores.items():
        mean, low, high = (100 * x for x in wilson(found))
        loss = bootstrap(lambda a, b: 100 * (a - b), scores["pruned"], found)
        same = f"{100 * np.mean(shared[name]):10.0f} %" if shared[name] else ""
        print(
            f"{name:26}{f'{mean:.1f} ({low:.0f} to {high:.0f})':>22}"
            f"{f'{loss.value:.1f} ({loss.low:.1f} to {loss.high:.1f})':>27}{same:>12}"
            f"{seconds[name]:8.1f} s"
        )


def ask(
    sample: Sample,
    policy: CSP,
    free: EdgeVLM,
    vlms: dict[str, EdgeVLM],
    scores: dict[str, list[float]],
    shared: dict[str, list[float]],
    seconds: dict[str, float],
) -> None:
    """One question over all caches."""
    (turn,) = sample.turns
    with free.tokenize(normalize_messages(sample.messages())) as prompt:
        said, reference = whole(free.engine, prompt, policy)
        for name, vlm in vlms.items():
            t0 = time.perf_counter()
            said[name], pruning = bounded(vlm.engine, prompt, policy)
            seconds[name] += time.perf_counter() - t0
            shared[name].append(overlap(reference, pruning))
    for name, text in said.items():
        scores[name].append(score(sample.metric, text, turn.answer, turn.choices))


if __name__ == "__main__":
    main()
