"""What every side of the comparison does, in a process and a virtual environment of its own.

A side reads commands from stdin, a line of JSON each, and answers each with a line on stdout:

  "turn"           one conversation, timed
  "memory"         the process, by the operating system's count
  ["agree", FILE]  the divergence from the logits in the file, over all compared windows. Where
                   there is no such file, this side's own are written to it, for the others.

A side is given its case (a folder that prepare.py wrote) and its cache by the command line.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

N_WARM = 2  # tokens decoded before the clock runs: the first ones lay out a graph anew


class Window(NamedTuple):
    """A prompt, and what follows it.

    tokens: int32 [n], -1 where a picture's embeddings go. embeddings: float32 [n_pictures' tokens,
    n_embd]. continuation: int32 [m], decoded token by token, whatever the model would have said.
    counts: bool [m], after which of these the next token's distribution is compared.
    """

    tokens: np.ndarray
    embeddings: np.ndarray
    continuation: np.ndarray
    counts: np.ndarray

    def parts(self) -> list[list[int] | np.ndarray]:
        """Runs of text, and of embeddings, in order."""
        is_text = self.tokens >= 0
        edges = np.flatnonzero(np.diff(is_text)) + 1
        found: list[list[int] | np.ndarray] = []
        n_embedded = 0
        for part in np.split(self.tokens, edges):
            if part[0] >= 0:
                found.append(part.tolist())
            else:
                found.append(self.embeddings[n_embedded : n_embedded + len(part)])
                n_embedded += len(part)
        return found


class Case(NamedTuple):
    """What is asked of all sides: the first window is timed, the others are compared."""

    settings: dict[str, Any]
    windows: list[Window]

    @classmethod
    def read(cls, folder: Path) -> "Case":
        data = np.load(folder / "windows.npz")
        windows = [
            Window(*(data[f"{field}_{i}"] for field in Window._fields))
            for i in range(len(data.files) // len(Window._fields))
        ]
        return cls(json.loads((folder / "case.json").read_text()), windows)


class Side(Protocol):
    """One library, with a model loaded, over one kind of cache."""

    def turn(self) -> dict[str, Any]:
        """Seconds, and what else there is to say of a conversation, from an empty cache on.

        prefill_s (reading and pruning, the encoding of pictures aside), first_token_s (all before
        the answer), decode_s of n_decode tokens, second_s (from the second question to its first
        token), kv_bytes (K and V of the cells in use after the first prompt). None: it isn't told.
        """

    def logits(self, window: Window) -> np.ndarray:
        """float32 [counts.sum(), n_vocab], over the cache that the prompt left."""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def divergence(full: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> dict[str, float]:
    """KL(full || other) in nats, and the share of the same likeliest tokens, means of all steps."""
    p, q = log_softmax(np.concatenate(full)), log_softmax(np.concatenate(other))
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    same = p.argmax(axis=-1) == q.argmax(axis=-1)
    return {"kl": float(kl.mean()), "top1": float(same.mean()), "n_steps": len(kl)}


def memory() -> dict[str, int]:
    """Bytes in memory, mapped files included: at any time, and now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Vm")}
    return {"peak": kib["VmHWM"] * 1024, "now": kib["VmRSS"] * 1024}


def agree(side: Side, case: Case, path: Path) -> dict[str, float]:
    found = [side.logits(window) for window in case.windows[1:]]
    if not path.exists():
        np.savez(path, *found)
    return divergence(reference(path), found)


def reference(path: Path) -> list[np.ndarray]:
    """The logits in a file, one array for each compared window."""
    data = np.load(path)
    return [data[name] for name in data.files]


def serve(make: Callable[[Case, str], Side]) -> None:
    """Load what the command line names, and answer until stdin ends."""
    # libraries print to stdout, too
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    case = Case.read(Path(sys.argv[1]))
    side = make(case, sys.argv[2])
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        match json.loads(line):
            case "turn":
                found: Any = side.turn()
            case "memory":
                found = memory()
            case ["agree", path]:
                found = agree(side, case, Path(path))
        print(json.dumps(found), file=answers, flush=True)
