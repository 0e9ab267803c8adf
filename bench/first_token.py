"""Where the time to an answer's first token goes, with the demo model.

    python bench/first_token.py

1. A cold process: from starting `csp-edge chat` to the first byte of its answer, part by part.
2. Twelve pictures at once: opening and laying them out, encoding, prefill, pruning.
3. A second question about the same pictures, beside the first.
4. The same picture twelve times: it is encoded once.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from csp_edge import EdgeVLM
from csp_edge.results import ChatResult

SCENES = sorted((Path(__file__).parents[1] / "csp_edge/pictures").glob("scene*.png"))
QUESTIONS = "What is in image 2?", "What is in image 7?"


def seconds(code: str) -> float:
    """Of a new Python process."""
    t0 = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - t0


def cold_start(n_threads: int) -> float:
    command = [sys.executable, "-m", "csp_edge", "chat", "--threads", str(n_threads)]
    t0 = time.perf_counter()
    with subprocess.Popen(
        [*command, "-i", str(SCENES[0]), "What is in image 1?"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout and process.stdout.read(1), "it gave no answer"
        return time.perf_counter() - t0


def parts(result: ChatResult) -> dict[str, float]:
    """Seconds, all before the first token."""
    t = result.timings
    rest = t.first_token_s - t.encode_s - t.prefill_s
    return {
        "open and lay out": rest,
        "encode": t.encode_s,
        "prefill": t.prefill_s,
        "all": t.first_token_s,
    }


def chat(pictures: list[Path], n_threads: int) -> tuple[dict[str, float], dict[str, float]]:
    """Of the first question and of the second."""
    with EdgeVLM.demo(n_threads=n_threads) as vlm:
        first = vlm.chat(QUESTIONS[0], images=pictures, max_tokens=1)
        question = {"role": "user", "content": QUESTIONS[1]}
        second = vlm.chat([*vlm.messages, question], max_tokens=1)
    return parts(first), parts(second)


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    rounds = range(options.rounds)
    load = f"import csp_edge; csp_edge.EdgeVLM.demo(n_threads={options.threads})"
    codes = {
        "Python": "",
        "Python and numpy": "import numpy",
        "and csp_edge": "import csp_edge.vlm",
        "and the demo model": load,
    }
    print(f"A cold process, seconds, median (least to most) of {options.rounds}")
    found = {name: [seconds(code) for _ in rounds] for name, code in codes.items()}
    found["csp-edge chat, first byte"] = [cold_start(options.threads) for _ in rounds]
    for name, times in found.items():
        median = statistics.median(times)
        print(f"  {name:26}{median:7.3f}  ({min(times):.3f} to {max(times):.3f})")

    for title, pictures in {
        "12 pictures": SCENES[:12],
        "one picture 12 times": SCENES[:1] * 12,
    }.items():
        runs = [chat(pictures, options.threads) for _ in rounds]
        first, second = (medians([run[i] for run in runs]) for i in range(2))
        print(f"\n{title}: milliseconds to the first token of the answer")
        print(f"{'':18}{'first question':>16}{'':8}{'second':>10}")
        for name in first:
            share = first[name] / first["all"]
            print(f"  {name:16}{1e3 * first[name]:16.1f}{share:8.0%}{1e3 * second[name]:10.1f}")
        print(f"  second question / first: {second['all'] / first['all']:.1%}")


if __name__ == "__main__":
    main()
