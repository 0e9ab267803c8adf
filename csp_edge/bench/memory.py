"""What memory a prompt and its answer take, by the operating system's count.

A process's peak only ever rises, so every cache has a process of its own, which does nothing else.
"""

import json
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import asdict, dataclass

from csp_edge.bench.case import N_ANSWER, Case, policy
from csp_edge.errors import CspEdgeError, MemoryLimitError
from csp_edge.eval.contenders import Budget
from csp_edge.memory import peak_memory, resident_memory


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the host's memory, all of the process.

    peak: at any time. answer: at the answer's end. kv: K and V of the cells in use after the
    prompt.
    """

    peak: int
    answer: int
    kv: int


def measure(case: Case, n_tokens: int, budget: Budget | None) -> Memory | None:
    """Of a prompt of that many tokens, over one cache. None: this system doesn't tell.

    Raises:
        MemoryLimitError: the system killed it, as where there is not enough.
        KeyboardInterrupt: Ctrl-C.
        CspEdgeError: whatever else the process ended with.
    """
    if peak_memory() is None:
        return None
    command = [sys.executable, "-m", __name__, json.dumps([asdict(case), n_tokens, budget])]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode == -signal.SIGINT:
        raise KeyboardInterrupt
    if done.returncode < 0:
        raise MemoryLimitError(
            f"a process with a prompt of {n_tokens} tokens was killed by signal "
            f"{-done.returncode}, as when memory runs out: give smaller --lengths"
        )
    try:
        found = json.loads(done.stdout)
    except ValueError:
        raise CspEdgeError(
            f"a process that measures memory ended with status {done.returncode}: "
            "run the command again"
        ) from None
    if "error" in found:
        raise CspEdgeError(found["error"])
    return Memory(**found)


def _measure(case: Case, n_tokens: int, budget: Budget | None) -> Memory:
    pruning = None if budget is None else policy(budget, n_tokens)
    with closing(case.engine()) as engine, case.prompt(engine, n_tokens) as prompt:
        window = 0
        if pruning:
            window = pruning.resolve(n_tokens, has_pictures=prompt.has_pictures).window
        engine.prefill(prompt, room=N_ANSWER, window=window)
        share = 1.0
        if pruning:
            # layers with a sliding window are not pruned
            share = len(engine.prune(pruning).layers) / engine.info.n_layer
        n_cells = engine.n_cells * share + n_tokens * (1 - share)
        last = prompt.items[-1]
        assert isinstance(last, int)
        for _ in range(N_ANSWER):
            engine.decode(last)
        answer, peak = resident_memory(), peak_memory()
        assert peak is not None and answer is not None
        return Memory(peak, answer, round(n_cells * engine.bytes_per_cell))


def _main() -> None:
    case, n_tokens, budget = json.loads(sys.argv[1])
    try:
        print(json.dumps(asdict(_measure(Case(**case), n_tokens, budget))))
    except CspEdgeError as error:
        print(json.dumps({"error": str(error)}))


if __name__ == "__main__":
    _main()
