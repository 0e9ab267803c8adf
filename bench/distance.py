"""What comparing keys costs: seconds to prune with distance 32 and without, beside the prefill.

    python bench/distance.py

SmolLM2-135M, 90 KV heads, some 2100 tokens of prose pruned to 20 %, both in one process, in turns.
"""

import statistics
import sys
from pathlib import Path

from csp_edge import CSP, EdgeVLM
from csp_edge.eval.fidelity import default_text

sys.path.append(str(Path(__file__).parent))
from overhead import smollm2  # noqa: E402

N_CHARS = 9000
N_ROUNDS = 3


def main() -> None:
    text = default_text()[:N_CHARS]
    timings = {distance: [] for distance in (0.0, 32.0)}
    for _ in range(N_ROUNDS):
        for distance, found in timings.items():
            with EdgeVLM(smollm2(), cache=CSP(0.2, distance=distance), n_threads=2) as vlm:
                result = vlm.chat(text, max_tokens=1)
            found.append(result.timings)
    print(f"SmolLM2-135M, {result.usage.prompt_tokens} tokens pruned to 20 %, two threads")
    for distance, found in timings.items():
        prune_s, prefill_s = (
            statistics.median(getattr(t, name) for t in found) for name in ("prune_s", "prefill_s")
        )
        print(
            f"distance {distance:4g}: pruned in {prune_s:.2f} s, after {prefill_s:.1f} s of prefill"
        )


if __name__ == "__main__":
    main()
