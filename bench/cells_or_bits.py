"""More cells or more bits? What pruning and quantizing the cache lose, apart and together.

    python bench/cells_or_bits.py --write

At one byte budget a cache holds 1.9 times as many cells in q8_0 as in f16, and 3.6 times as many in
q4_0 ("More Tokens, Lower Precision", arXiv 2412.12706). Which loses less is measured: KL(full f16
|| other) of the next token's distribution along an answer, over conversations about pictures (the
embedded model, built-in suite) and along a text (SmolLM2-135M). --write puts the table where
csp-edge plan reads it.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from csp_edge import CSP, EdgeVLM
from csp_edge.engine import Engine
from csp_edge.eval.fidelity import default_text, windows
from csp_edge.eval.protocol import prefill, prune
from csp_edge.eval.suite import suite
from csp_edge.template import normalize_messages
from csp_edge.tokenizer import Prompt

sys.path.append(str(Path(__file__).parent))
from overhead import smollm2  # noqa: E402

import csp_edge  # noqa: E402

KV_TYPES = ("f16", "q8_0", "q4_0")
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 1.0)
BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
MAX_ANSWER = 16
TABLE = Path(csp_edge.__file__).parent / "kv_precision.json"


class Task(NamedTuple):
    """A prompt, and what is to come after it. None: what the full cache says."""

    prompt: Prompt
    continuation: list[int] | None


def steps(engine: Engine, continuation: list[int] | None) -> tuple[np.ndarray, list[int]]:
    """Log-probabilities [n_steps, n_vocab] along the continuation, and the continuation."""
    tokens, rows = [], []
    for i in range(len(continuation) if continuation else MAX_ANSWER):
        x = engine.logits.astype(np.float64)
        x -= x.max()
        rows.append(x - np.log(np.exp(x).sum()))
        token = continuation[i] if continuation else int(x.argmax())
        tokens.append(token)
        if not continuation and engine.tokenizer.ends(token):
            break
        engine.decode(token)
    return np.array(rows), tokens


def pictures(vlm: EdgeVLM, n_samples: int, seed: int) -> Iterator[Task]:
    for sample in suite(n_samples=n_samples, n_images=(8,), n_turns=1, seed=seed):
        with vlm.tokenize(normalize_messages(sample.messages())) as prompt:
            yield Task(prompt, None)


def text(vlm: EdgeVLM, n_windows: int) -> Iterator[Task]:
    found = windows(
        vlm.engine,
        "",
        default_text(),
        n_windows=n_windows,
        n_prompt=1024,
        n_continuation=MAX_ANSWER,
    )
    for window in found:
        yield Task(Prompt(list(window.prompt)), window.continuation)


def measure(name: str, args: argparse.Namespace) -> dict[str, dict[float, list[float]]]:
    """KL of every task, by type and share."""
    path = None if name == "pictures" else smollm2()
    losses: dict[str, dict[float, list[float]]] = {}
    full: list[tuple[np.ndarray, list[int]]] = []
    for kv_type in KV_TYPES:
        losses[kv_type] = {share: [] for share in SHARES}
        options = {"kv_type": kv_type, "n_threads": args.threads, "cache": CSP()}
        with EdgeVLM(path, **options) if path else EdgeVLM.demo(**options) as vlm:
            engine = vlm.engine
            tasks = text(vlm, args.windows) if path else pictures(vlm, args.samples, args.seed)
            for i, task in enumerate(tasks):
                policies = [CSP(share) if share < 1 else None for share in SHARES]
                snapshot = prefill(engine, task.prompt, policies, room=MAX_ANSWER)
                if kv_type == "f16":
                    prune(engine, snapshot, None)
                    full.append(steps(engine, task.continuation))
                p, continuation = full[i]
                for share, policy in zip(SHARES, policies, strict=True):
                    prune(engine, snapshot, policy)
                    q, _ = steps(engine, continuation)
                    losses[kv_type][share].append(float((np.exp(p) * (p - q)).sum(1).mean()))
                print(f"\r{name}, {kv_type}: {i + 1} done", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2, help="of each skill")
    parser.add_argument("--windows", type=int, default=6, help="of the text")
    parser.add_argument("--seed", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    args = parser.parse_args()

    measured = {name: measure(name, args) for name in ("pictures", "text")}
    for name, losses in measured.items():
        print(f"\n{name}: KL in nats" + "".join(f"{share:>10.0%}" for share in SHARES) + "  cells")
        for kv_type, by_share in losses.items():
            row = "".join(f"{np.mean(kl):10.4f}" for kl in by_share.values())
            print(f"{kv_type:{len(name) + 12}}{row}")

    # both count the same
    loss = {
        kv_type: {
            str(share): round(np.mean([np.mean(m[kv_type][share]) for m in measured.values()]), 5)
            for share in SHARES
        }
        for kv_type in KV_TYPES
    }
    if args.write:
        command = f"bench/cells_or_bits.py --samples {args.samples} --windows {args.windows}"
        table = {"command": f"{command} --seed {args.seed} --write", "loss": loss}
        TABLE.write_text(json.dumps(table, indent=2) + "\n")

    print("\nbytes, of a full f16 cache: mean KL of either")
    for n_bytes in SHARES[:-1]:
        cells = {kind: min(1.0, n_bytes * BYTES["f16"] / BYTES[kind]) for kind in KV_TYPES}
        row = {kind: interpolated(loss[kind], cells[kind]) for kind in KV_TYPES}
        best = min(row, key=row.__getitem__)
        print(f"{n_bytes:6.0%}", *(f"{k} {v:.4f}" for k, v in row.items()), f"best: {best}")


def interpolated(loss: dict[str, float], share: float) -> float:
    x = np.log([float(s) for s in loss])
    return float(np.interp(np.log(share), x, list(loss.values())))


if __name__ == "__main__":
    main()
