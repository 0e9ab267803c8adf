"""Memory that conversations take, weights aside, by the operating system's count.

    python bench/memory.py --plot docs/memory.png

1. The peak of one prompt of 4, 16, 64 and 256 pictures, pruned when it is there, and within
   max_cells. Every figure is a process of its own.
2. Memory over time, in a conversation of many turns with new pictures in each (drawn to --plot).
3. What pruning, resizing and recalling take beside a plain copy of the bytes that they move, of
   SmolLM2-135M, whose cells are 22.5 KiB.

Linux only. Memory is what the process has beyond the loaded model, files that are mapped left out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from csp_edge import CSP, EdgeVLM, Full
from csp_edge.engine import Engine
from csp_edge.eval.fidelity import default_text
from csp_edge.tokenizer import Prompt

sys.path.append(str(Path(__file__).parent))
from overhead import smollm2  # noqa: E402

MIB = 2**20
N_CTX = 2**15
SCENES = sorted((Path(__file__).parents[1] / "csp_edge/pictures").glob("scene*.png"))
QUESTION = "What is in image 2?"
BUDGET = 0.2

# the demo model's cache in f32, so that it is large beside all else
CACHES: dict[str, dict[str, Any]] = {
    "all cells at once": {"cache": Full()},
    "full": {"cache": Full()},
    "pruned": {"cache": CSP(BUDGET)},
    "bounded": {"cache": CSP(BUDGET), "max_cells": 512},
    "bounded, recall": {"cache": CSP(BUDGET), "max_cells": 512, "recall": True},
}
COLORS = ("#000000", "#7F7F7F", "#D55E00", "#0072B2", "#009E73")


#
# in a process of its own
#


def status(name: str) -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def user(images: list[str]) -> dict[str, Any]:
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}


def peak(name: str, images: list[str]) -> dict[str, float]:
    """MiB at the most, and seconds, of one prompt with all these pictures."""
    with EdgeVLM.demo(n_ctx=N_CTX, n_threads=1, kv_type="f32", **CACHES[name]) as vlm:
        loaded = status("RssAnon")
        t0 = time.perf_counter()
        result = vlm.chat([user(images)], max_tokens=4)
        seconds = time.perf_counter() - t0
        return {
            "peak": status("VmHWM") - status("RssFile") - loaded,
            "after": status("RssAnon") - loaded,
            "n_tokens": result.usage.prompt_tokens,
            "seconds": seconds,
        }


@contextmanager
def sampled(start: float, interval: float = 0.02) -> Iterator[list[tuple[float, float]]]:
    """(seconds, MiB beyond `start`) while the block runs."""
    found: list[tuple[float, float]] = []
    done = threading.Event()
    t0 = time.perf_counter()

    def sample() -> None:
        while not done.wait(interval):
            found.append((time.perf_counter() - t0, status("RssAnon") - start))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def conversation(name: str, images: list[str], n_turns: int) -> list[list[tuple[float, float]]]:
    """Of every turn (turn, MiB): within a turn time goes from 0 to 1."""
    n_ctx = N_CTX
    if name == "all cells at once":
        n_ctx = len(images) * 72 + n_turns * 64
        init = Engine._init_context
        # as llama.cpp does by itself
        Engine._init_context = lambda self, n_ubatch, n_ctx, n_cells=None: init(
            self, n_ubatch, n_ctx
        )
    with EdgeVLM.demo(n_ctx=n_ctx, n_threads=1, kv_type="f32", **CACHES[name]) as vlm:
        start = status("RssAnon")
        if name == "all cells at once":
            start -= vlm.engine.n_cells_max * vlm.engine.bytes_per_cell / MIB
        messages, turns = [], []
        per_turn = len(images) // n_turns
        for i in range(n_turns):
            messages.append(user(images[i * per_turn : (i + 1) * per_turn]))
            with sampled(start) as found:
                result = vlm.chat(messages, max_tokens=24)
            messages.append({"role": "assistant", "content": result.text})
            length = found[-1][0]
            turns.append([(i + t / length, mib) for t, mib in found])
        return turns


#
# what asks them
#


def ask(kind: str, **arguments: Any) -> Any:
    command = [sys.executable, __file__, "--work", json.dumps([kind, arguments])]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def draw_pictures(folder: Path, n: int) -> list[str]:
    """Files of `n` pictures, no two of them the same."""
    paths = []
    for i in range(n):
        scene = Image.open(SCENES[i % len(SCENES)]).convert("RGB")
        pixels = np.roll(np.asarray(scene), i // len(SCENES) * 3, axis=1)
        paths.append(str(folder / f"{i:03}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return paths


def peaks(images: list[str], counts: list[int]) -> None:
    print("Peak of a prompt, MiB beyond the loaded demo model, f32 cache, one thread")
    print(f"{'pictures':>8}{'cells':>8}{'pruned':>10}{'bounded':>10}{'ratio':>8}{'seconds':>18}")
    for n in counts:
        pruned, bounded = (ask("peak", name=k, images=images[:n]) for k in ("pruned", "bounded"))
        print(
            f"{n:8}{pruned['n_tokens']:8}{pruned['peak']:10.1f}{bounded['peak']:10.1f}"
            f"{pruned['peak'] / bounded['peak']:8.1f}"
            f"{pruned['seconds']:10.1f}{bounded['seconds']:8.1f}",
            flush=True,
        )


def plot(images: list[str], n_turns: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    print(
        f"\nA conversation of {n_turns} turns, {len(images) // n_turns} new pictures in each, MiB"
    )
    print(f"{'':20}{'most':>8}{'at the end':>12}")
    for (name, settings), color in zip(CACHES.items(), COLORS, strict=True):
        turns = ask("conversation", name=name, images=images, n_turns=n_turns)
        samples = np.array([sample for turn in turns for sample in turn])
        label = f"{name} ({settings['max_cells']} cells)" if "max_cells" in settings else name
        axes.plot(samples[:, 0] + 1, samples[:, 1], color=color, linewidth=1.2, label=label)
        print(f"{name:20}{samples[:, 1].max():8.1f}{samples[-1, 1]:12.1f}", flush=True)
    axes.set(
        xlabel=f"turn, with {len(images) // n_turns} new pictures",
        ylabel="memory beyond the loaded model, MiB",
        title=f"A long conversation, pruned to {BUDGET:.0%} of each prompt",
    )
    axes.set_ylim(bottom=0)
    axes.grid(color="0.9", linewidth=0.8)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def copy_seconds(n_bytes: int) -> float:
    """To copy that many bytes into memory that the process has already."""
    source, target = np.ones(n_bytes, np.uint8), np.zeros(n_bytes, np.uint8)
    times = []
    for _ in range(5):
        t0 = time.perf_counter()
        target[:] = source
        times.append(time.perf_counter() - t0)
    return statistics.median(times)


def fresh_copy_seconds(n_bytes: int, n_parts: int) -> float:
    """To copy that many bytes into new memory, part by part, which a move cannot do without."""
    source = np.ones(n_bytes // n_parts, np.uint8)
    times = []
    for _ in range(5):
        t0 = time.perf_counter()
        parts = [source.copy() for _ in range(n_parts)]
        times.append(time.perf_counter() - t0)
        del parts
    return statistics.median(times)


def read(n_tokens: int, **options: Any) -> Engine:
    """An engine that has read so many tokens of text, and observes."""
    engine = Engine(Path(smollm2()), n_ctx=16384, n_threads=1, prune=True, **options)
    items = engine.tokenizer.tokenize([default_text()[: 6 * n_tokens]]).items[:n_tokens]
    amounts = CSP(BUDGET).resolve(n_tokens, has_pictures=False)
    engine.prefill(Prompt(items), window=amounts.window)
    return engine


def costs(n_tokens: int, rounds: int) -> None:
    engine = read(n_tokens)
    snapshot = engine.snapshot()
    n_bytes = int(engine.bytes_per_cell)
    hook, n_layer = engine._hook, engine.info.n_layer
    found: dict[str, list[tuple[float, int]]] = {}

    def timed(what: str, call: Any, n_moved: int) -> None:
        t0 = time.perf_counter()
        call()
        found.setdefault(what, []).append((time.perf_counter() - t0, n_moved))

    policy = CSP(BUDGET)
    amounts = policy.resolve(n_tokens, has_pictures=False)
    n_kept = amounts.budget
    for _ in range(rounds):
        engine.restore(snapshot)
        engine._resize(n_tokens)
        timed("grow to twice the cells", lambda: hook.resize(2 * n_tokens), n_tokens * n_bytes)
        timed("shrink to what is used", lambda: hook.resize(n_tokens), n_tokens * n_bytes)
        # the keys are read once, what is kept is read and written
        n_moved = (n_tokens // 2 + n_kept) * n_bytes
        timed(f"prune to {BUDGET:.0%}", lambda: hook.prune(policy, amounts), n_moved)
        timed("shrink after that", lambda: hook.resize(n_kept + 256), n_kept * n_bytes)

    engine.close()
    engine = read(n_tokens, recall="f16")
    engine.prune(policy)
    items = [item for item in engine.items[: amounts.window] if isinstance(item, int)]
    for _ in range(rounds):
        engine.observe(len(items))
        engine._hook.probe(items, range(engine.n_past, engine.n_past + len(items)))
        timed(f"recall {BUDGET:.0%}", lambda: engine._hook.recall(policy, amounts), n_moved)

    print(f"\nSmolLM2-135M, {n_tokens} tokens, f16 cache, one thread, medians of {rounds}")
    print(
        f"{'':26}{'moved':>10}{'seconds':>10}{'a copy':>10}{'ratio':>7}"
        f"{'new memory':>12}{'ratio':>7}"
    )
    for what, runs in found.items():
        seconds, n_moved = statistics.median(t for t, _ in runs), runs[0][1]
        plain, fresh = copy_seconds(n_moved), fresh_copy_seconds(n_moved, 2 * n_layer)
        print(
            f"{what:26}{n_moved / MIB:6.1f} MiB{seconds:10.4f}{plain:10.4f}{seconds / plain:7.1f}"
            f"{fresh:12.4f}{seconds / fresh:7.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pictures", type=int, nargs="*", default=[4, 16, 64, 256])
    add("--turns", type=int, default=12)
    add("--per-turn", type=int, default=6)
    add("--plot", type=Path, help="draw the conversation to this file (.png, .svg)")
    add("--tokens", type=int, default=2048, help="for the time of pruning and resizing")
    add("--rounds", type=int, default=5)
    add("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        kind, arguments = json.loads(args.work)
        print(json.dumps({"peak": peak, "conversation": conversation}[kind](**arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        n_most = max([*args.pictures, args.turns * args.per_turn])
        images = draw_pictures(Path(folder), n_most)
        if args.pictures:
            peaks(images, args.pictures)
        if args.plot:
            plot(images[: args.turns * args.per_turn], args.turns, args.plot)
    if args.tokens:
        costs(args.tokens, args.rounds)


if __name__ == "__main__":
    main()
