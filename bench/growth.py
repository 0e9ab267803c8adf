"""How pruning grows with the context: seconds to score, select and compact 1k to 64k cells.

    python bench/growth.py

SmolVLM-256M's shape with 2 layers and random weights, whose context is lengthened; one thread,
medians of 5. Beside it a plain copy of the bytes that pruning to 10 % has to move at least: K read
once, and what is kept of K and V read and written.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from gguf import GGUFReader

from csp_edge import CSP
from csp_edge.engine import Engine
from csp_edge.eval.fidelity import default_text
from csp_edge.tokenizer import Prompt

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tools/random_model")]
from memory import copy_seconds  # noqa: E402
from write import write  # noqa: E402

LENGTHS = [1024 * 2**i for i in range(7)]
BUDGET = 0.1
N_ROUNDS = 5


def main() -> None:
    policy = CSP(BUDGET)
    with tempfile.TemporaryDirectory() as folder:
        model, _ = write("smolvlm-256m", Path(folder), type_name="q8_0", n_layer=2)
        GGUFReader(model, "r+").fields["llama.context_length"].parts[-1][0] = 2 * LENGTHS[-1]
        engine = Engine(model, n_ctx=LENGTHS[-1], n_threads=1, prune=True)
        # a token for each byte, and some more
        items = engine.tokenizer.tokenize([default_text()[: LENGTHS[-1]]]).items[: LENGTHS[-1]]
        print("  cells  seconds  a thousand  score  select  compact  a copy")
        for n_tokens in LENGTHS:
            amounts = policy.resolve(n_tokens, has_pictures=False)
            engine.prefill(Prompt(items[:n_tokens]), window=amounts.window)
            snapshot = engine.snapshot()
            found = []
            for _ in range(N_ROUNDS):
                found.append(engine.prune(policy))
                engine.restore(snapshot)
            parts = [
                statistics.median(getattr(pruning, name) for pruning in found)
                for name in ("score_s", "select_s", "compact_s")
            ]
            n_bytes = (n_tokens // 2 + amounts.budget) * int(engine.bytes_per_cell)
            seconds = sum(parts)
            print(
                f"{n_tokens:7} {seconds:8.4f} {seconds / n_tokens * 1000:11.5f}"
                f"{parts[0]:7.4f}{parts[1]:8.4f}{parts[2]:9.4f}{copy_seconds(n_bytes):8.4f}",
                flush=True,
            )
        engine.close()


if __name__ == "__main__":
    main()
