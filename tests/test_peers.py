"""bench/peers: all sides are asked the same."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "bench" / "peers"


def load(name: str) -> Any:
    """A module of that folder, whose names are too common for sys.path."""
    spec = importlib.util.spec_from_file_location(f"peers_{name}", PEERS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_best_press_frees_memory_and_runs_at_both_budgets() -> None:
    def found(press: str, budget: str, kl: float, kv_share: float) -> dict[str, Any]:
        return {"press": press, "budget": budget, "kl": kl, "kv_share": kv_share}

    screened = [found("A", "10%", 0.5, 0.1), found("A", "20%", 0.3, 0.2)]
    screened += [found("B", "10%", 0.6, 0.1), found("B", "20%", 0.1, 0.2)]
    screened += [found("masks", "10%", 0.0, 1.0), found("masks", "20%", 0.0, 1.0)]
    screened += [found("half", "10%", 0.0, 0.1), {"press": "half", "budget": "20%", "error": "no"}]
    assert load("run").best(screened) == "B"


def test_divergence() -> None:
    p, q = np.log([[0.5, 0.5], [0.25, 0.75]]), np.log([[0.25, 0.75], [0.25, 0.75]])
    found = load("worker").divergence([p[:1], p[1:] + 3], [q[:1] - 1, q[1:]])
    assert found["kl"] == pytest.approx((0.5 * np.log(2) + 0.5 * np.log(2 / 3)) / 2)
    assert (found["top1"], found["n_steps"]) == (0.5, 2)


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    subprocess.run([sys.executable, str(PEERS / "prepare.py"), str(folder), "1"], check=True)
    return folder


def ask(script: str, case: Path, cache: str, env: dict[str, str]) -> dict[str, Any]:
    commands = ["turn", ["agree", str(case / "full.npz")]]
    done = subprocess.run(
        [sys.executable, str(PEERS / script), str(case), cache],
        input="".join(json.dumps(command) + "\n" for command in commands),
        env=os.environ | env,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    _, turn, agree = map(json.loads, done.stdout.splitlines())
    return turn | agree


def test_sides_read_the_same(asked: Path, unpatched_lib: Path) -> None:
    lib = {"LLAMA_CPP_LIB_PATH": str(unpatched_lib), "MTMD_CPP_LIB": str(unpatched_lib)}
    peer = ask("llama.py", asked / "demo", "f16", lib)
    full = ask("csp.py", asked / "demo", "full", {})
    pruned = ask("csp.py", asked / "demo", "20%", {})
    assert peer["as_given"] == 1 and full["answer"] == "green cross, orange square, purple ring"
    assert full["kl"] == 0 and full["kv_bytes"] == peer["kv_bytes"]
    assert full["n_decode"] == peer["n_decode"] and full["n_steps"] > 100
    assert 0 < pruned["kl"] < 1 and pruned["kv_bytes"] < 0.21 * full["kv_bytes"]
