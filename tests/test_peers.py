"""bench/peers: all sides are asked the same, and the page says what the log does."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csp_edge.errors import OptionError
from csp_edge.eval.log import read_log

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "bench" / "peers"
LOG = PEERS / "log.jsonl"


def load(name: str) -> Any:
    """A module of that folder, whose names are too common for sys.path."""
    spec = importlib.util.spec_from_file_location(f"peers_{name}", PEERS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_of_the_log() -> None:
    assert load("page").page(*read_log(LOG)) == (ROOT / "docs" / "benchmarks.md").read_text()


def test_ratios_are_of_medians() -> None:
    header, entries = read_log(LOG)
    for side, cache, seconds in (
        ("llama.cpp", "f16", (1.0, 2.0, 9.0)),
        ("csp-edge", "20%", (5.0, 0.1, 1.0)),
    ):
        turns = [e for e in entries if "turn" in e and (e["side"], e["cache"]) == (side, cache)]
        turn = next(e for e in turns if e["case"] == "text")
        entries = [e for e in entries if e["case"] != "text" or e not in turns]
        entries += [turn | {"turn": turn["turn"] | {"second_s": s}} for s in seconds]
    rows = load("page").page(header, entries).splitlines()
    row = next(row for row in rows if row.startswith("| csp-edge, 20% |"))
    assert row.split(" | ")[4] == "0.50"


@pytest.mark.parametrize("kind", ["memory", "agree", "same", "screened", "turn"])
def test_page_refuses_a_log_that_is_not_whole(kind: str) -> None:
    header, entries = read_log(LOG)
    with pytest.raises(OptionError, match="not whole"):
        load("page").page(header, [entry for entry in entries if kind not in entry])


def test_page_refuses_another_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"log": "fidelity"}) + "\n")
    command = [sys.executable, str(PEERS / "page.py"), str(path), str(tmp_path / "page.md")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "a log of fidelity" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "page.md").exists()


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
    # both take the ring for a circle, one of eight tokens
    assert peer["as_given"] == 7 / 8
    assert full["answer"] == "green cross, orange square, purple circle"
    assert full["kl"] == 0 and full["kv_bytes"] == peer["kv_bytes"]
    assert full["n_decode"] == peer["n_decode"] and full["n_steps"] > 100
    assert 0 < pruned["kl"] < 1 and pruned["kv_bytes"] < 0.21 * full["kv_bytes"]
