"""Measure all sides in turns: python bench/peers/run.py FOLDER [--rounds N] [--threads N]

Every side is a process of its own for the whole time, and the sides take turns, every second round
in reverse. All that is found goes to FOLDER/log.jsonl.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from csp_edge.eval.log import Log

HERE = Path(__file__).parent
VENVS = HERE.parents[1] / "build" / "peers"
BUDGETS = "10%", "20%"
SNAPKV = "SnapKVPress"


class Side(NamedTuple):
    """A peer, or us, over one kind of cache. reference: the full cache that it is held against."""

    name: str
    cache: str
    venv: str
    script: str
    reference: str | None


class Worker:
    """A side's process."""

    def __init__(self, side: Side, case: Path, env: dict[str, str]) -> None:
        command = [_python(side.venv), str(HERE / side.script), str(case), side.cache]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.side = side
        self.said = case / f"{side.name} {side.cache}.txt".replace(":", " ")
        with self.said.open("w") as stderr:
            self.process = subprocess.Popen(command, env=env, text=True, stderr=stderr, **pipes)
        self.answer()

    def ask(self, command: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            sys.exit(f"{self.side.name} {self.side.cache} ended with {status}: see {self.said}")
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait()


def sides(case: str, best: str) -> list[Side]:
    """Ours between the peers. `best`: a press."""
    ours = [Side("csp-edge", budget, "", "csp.py", "llama.cpp") for budget in BUDGETS]
    found = [Side("llama.cpp", "f16", "llama", "llama.py", "llama.cpp"), ours[0]]
    found += [
        Side("llama.cpp", kind, "llama", "llama.py", "llama.cpp") for kind in ("q8_0", "q4_0")
    ]
    found += [ours[1]]
    if case == "text":
        # kvpress's presses look at 64 queries, and keep their cells
        found += [Side("csp-edge", f"{b}:64", "", "csp.py", "llama.cpp") for b in BUDGETS]
    if case == "demo":
        found.append(Side("llama-cpp-python", "f16", "llama", "handler.py", None))
    caches = ["full", "full:bfloat16"]
    caches += [f"{name}:{b}" for name in dict.fromkeys((SNAPKV, best)) for b in BUDGETS]
    return found + [Side("kvpress", c, "transformers", "presses.py", "kvpress") for c in caches]


def _python(venv: str) -> str:
    return str(VENVS / venv / "bin" / "python") if venv else sys.executable


def environment(n_threads: int) -> dict[str, str]:
    """For all sides: what csp_edge says of its libraries concerns its own process."""
    env = {k: v for k, v in os.environ.items() if k not in ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")}
    return env | {"OMP_NUM_THREADS": str(n_threads), "HF_HUB_OFFLINE": "1"}


def measure(case: Path, n_rounds: int, env: dict[str, str], log: Log) -> None:
    """All of one case."""
    name = case.name
    full = Side("kvpress", "full", "transformers", "presses.py", "kvpress")
    with Worker(full, case, env) as worker:
        worker.ask(["agree", str(case / "kvpress.npz")])
    screened = list(screen(case, env))
    for found in screened:
        log.append({"case": name, "screened": found})
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(side, case, env)) for side in sides(name, best(screened))
        ]
        for i in range(n_rounds):
            for worker in workers if i % 2 == 0 else workers[::-1]:
                log.append(_entry(name, worker, "turn", worker.ask("turn")))
        for worker in workers:
            log.append(_entry(name, worker, "memory", worker.ask("memory")))
        for worker in workers:
            if worker.side.reference:
                command = ["agree", str(case / f"{worker.side.reference}.npz")]
                log.append(_entry(name, worker, "agree", worker.ask(command)))
        # whether it is one model everywhere
        command = ["agree", str(case / "llama.cpp.npz")]
        same = next(w for w in workers if w.side.name == full.name and w.side.cache == full.cache)
        log.append(_entry(name, same, "same", same.ask(command)))


def _entry(case: str, worker: Worker, kind: str, found: dict[str, Any]) -> dict[str, Any]:
    print(f"{case}  {worker.side.name} {worker.side.cache}  {kind}  {found}", file=sys.stderr)
    return {"case": case, "side": worker.side.name, "cache": worker.side.cache, kind: found}


def screen(case: Path, env: dict[str, str]) -> Iterator[dict[str, Any]]:
    """What each press at each budget is good for."""
    command = [_python("transformers"), str(HERE / "presses.py"), str(case), "screen"]
    command.append(str(case / "kvpress.npz"))
    with subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            print(line, end="", file=sys.stderr)
            yield json.loads(line)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: ended with {process.returncode}: see its message above")


def best(screened: list[dict[str, Any]]) -> str:
    """The press with the least divergence over both budgets, of those that free what they evict."""
    found: dict[str, list[float]] = {}
    for each in screened:
        if "kl" in each and each["kv_share"] < 0.5:
            found.setdefault(each["press"], []).append(each["kl"])
    return min((sum(kl), press) for press, kl in found.items() if len(kl) == len(BUDGETS))[1]


def versions() -> dict[str, str]:
    """Of what is compared."""
    pinned = [line for name in ("llama", "transformers") for line in (HERE / f"{name}.txt").open()]
    return dict(line.strip().split("==") for line in pinned)


def processor() -> str:
    """Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


def prepare(folder: Path, n_threads: int, env: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What all are asked, and, by case, what there is to say of it. Nothing of an earlier run."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    command = [sys.executable, str(HERE / "prepare.py"), str(folder), str(n_threads)]
    subprocess.run(command, check=True)
    cases = {}
    for case in sorted(folder.iterdir(), reverse=True):
        command = [_python("transformers"), str(HERE / "presses.py"), str(case), "convert"]
        subprocess.run(command, env=env, check=True)
        settings = json.loads((case / "case.json").read_text())
        told = ("quantization", "n_prompt", "n_pictures", "n_compared")
        cases[case.name] = {name: settings[name] for name in told}
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--rounds", metavar="N", type=int, default=3, help="default: 3")
    parser.add_argument("--threads", metavar="N", type=int, default=os.cpu_count())
    args = parser.parse_args()
    env = environment(args.threads)
    header: dict[str, Any] = {"log": "peers", "versions": versions(), "processor": processor()}
    header |= {"threads": args.threads, "load": os.getloadavg()[0]}
    header["cases"] = prepare(args.folder / "cases", args.threads, env)
    path = args.folder / "log.jsonl"
    path.unlink(missing_ok=True)
    with Log(path, header) as log:
        # a short conversation takes more of them
        for name, n_rounds in (("text", args.rounds), ("demo", 5 * args.rounds)):
            measure(args.folder / "cases" / name, n_rounds, env, log)


if __name__ == "__main__":
    main()
