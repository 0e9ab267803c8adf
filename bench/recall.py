"""Recall: accuracy of each question of a conversation, full, pruned, and pruned with recall.

    python bench/recall.py

Every answer comes from the pruned cache, from its first token on: the last token of the question is
decoded again over it, and what the policy was shown ahead is taken back; with recall it is shown
nothing. A conversation goes on with the model's own answers. The conversations are the suite's.
"""

import argparse
import statistics
import time

import numpy as np

from csp_edge.eval.intervals import bootstrap
from csp_edge.eval.protocol import greedy, look_ahead
from csp_edge.eval.samples import Sample
from csp_edge.eval.scoring import score
from csp_edge.eval.suite import suite
from csp_edge.policies import CSP, Full
from csp_edge.template import normalize_messages
from csp_edge.vlm import EdgeVLM

N_TURNS = 5
N_ANSWER_MAX = 64


def answer(vlm: EdgeVLM, prompt) -> str:
    engine = vlm.engine
    if isinstance(vlm.cache, Full):
        engine.prefill(prompt)
    else:
        policy = vlm.cache
        amounts = policy.resolve(prompt.n_tokens)
        engine.prefill(prompt, window=amounts.window, lookahead=amounts.lookahead, policy=policy)
        if not engine.keeps_observing:  # a recall goes by the answer as it comes
            look_ahead(engine, policy)
        engine.prune(policy)
        engine.redecode()
    tokens = greedy(engine, N_ANSWER_MAX)
    return b"".join(map(engine.tokenizer.piece, tokens)).decode(errors="replace").strip()


def conversation(vlm: EdgeVLM, sample: Sample) -> list[float]:
    """The scores of its answers."""
    vlm.engine.clear()
    answers, scores = [], []
    for turn in sample.turns:
        messages = normalize_messages(sample.messages(answers), ())
        with vlm.tokenize(messages) as prompt:
            answers.append(answer(vlm, prompt))
        scores.append(score(sample.metric, answers[-1], turn.answer, turn.choices))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--samples", type=int, default=2, help="of each skill and number of pictures"
    )
    parser.add_argument("--images", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    samples = list(
        suite(
            n_samples=options.samples, n_images=options.images, n_turns=N_TURNS, seed=options.seed
        )
    )
    variants = {"full cache": {"cache": Full()}}
    for budget in options.budgets:
        for name, recall in ("pruned", None), ("recall", "f16"), ("recall, q8_0", "q8_0"):
            variants[f"{name}, {budget:.0%}"] = {"cache": CSP(budget), "recall": recall}

    print(f"{len(samples)} conversations of {N_TURNS} questions about {options.images} pictures")
    print(f"{'right, %, by question':22}" + "".join(f"{i + 1:7}" for i in range(N_TURNS)), end="")
    print("    2 to 5   less than full (95 %)   seconds an answer")
    full = None
    for name, settings in variants.items():
        seconds = []
        with EdgeVLM.demo(n_threads=options.threads, **settings) as vlm:
            scores = []
            for sample in samples:
                t0 = time.perf_counter()
                scores.append(conversation(vlm, sample))
                seconds.append((time.perf_counter() - t0) / N_TURNS)
        later = np.mean(np.array(scores)[:, 1:], axis=1)
        full = later if full is None else full
        loss = bootstrap(lambda a, b: 100 * (a - b), full, later)
        print(
            f"{name:22}"
            + "".join(f"{100 * x:7.1f}" for x in np.mean(scores, axis=0))
            + f"{100 * later.mean():10.1f}   {loss.value:6.1f} ({loss.low:.1f} to {loss.high:.1f})"
            + f"{statistics.median(seconds):20.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
