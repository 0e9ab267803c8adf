"""csp-edge bench: what is timed, what stands in the tables, the file and the plot."""

import json
import re
import shlex
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType, GGUFReader
from PIL import Image

from csp_edge import CSP, CspEdgeError
from csp_edge.bench import memory, run
from csp_edge.bench.case import N_ANSWER, N_DECODE, Case, n_image_tokens, policy
from csp_edge.bench.memory import Memory
from csp_edge.bench.plot import plot
from csp_edge.bench.report import tables
from csp_edge.bench.run import Run, bench
from csp_edge.bench.speed import N_LAPS, Cache, Length, measure
from csp_edge.bench.spread import Spread, spread
from csp_edge.cli import main
from csp_edge.engine import Engine
from csp_edge.errors import MemoryLimitError, OptionError, ProjectorError
from csp_edge.tokenizer import Patches

LINE = "bench --threads 1 --rounds 2"


@pytest.fixture(scope="module")
def case(demo_paths) -> Case:
    """The embedded model."""
    model, mmproj = demo_paths
    return Case(str(model), str(mmproj), n_threads=1)


@pytest.fixture(scope="module")
def engine(case):
    with closing(case.engine()) as engine:
        yield engine


@pytest.fixture
def no_processes(monkeypatch):
    """Memory is made up: 100 MiB, and 1 MiB for every token kept."""

    def found(case, n_tokens, budget):
        n_cells = n_tokens if budget is None else policy(budget, n_tokens).resolve(n_tokens).budget
        return Memory(peak=2**27, answer=(100 + n_cells) * 2**20, kv=n_cells * 2**20)

    monkeypatch.setattr(memory, "measure", found)


#
# prompts
#


def test_a_prompt_has_the_length_that_was_asked_for(case, engine):
    with case.prompt(engine, 100) as prompt:
        assert len(prompt.items) == prompt.n_tokens == prompt.n_pos == 100
        assert len(set(prompt.items)) > 20


def test_pictures_are_part_of_the_length(case, engine):
    with replace(case, n_images=3).prompt(engine, 250) as prompt:
        pictures = [item for item in prompt.items if isinstance(item, Patches)]
        assert len({item.key for item in pictures}) == len(pictures) == 3
        assert prompt.n_tokens == 250
        assert engine.prefill(prompt).n_encoded == 3
        assert engine.n_cells == engine.n_past == 250


def test_without_a_length_pictures_are_most_of_a_prompt(case, engine):
    with replace(case, n_images=2).prompt(engine, None) as prompt:
        assert n_image_tokens(prompt) == 128
        assert prompt.n_tokens == 1 + 128 + 64  # the vocabulary begins every text


def test_many_pictures_are_a_prompt_of_the_length_that_they_take(case, engine):
    many = replace(case, n_images=62)  # what the context holds
    with many.prompt(engine, None) as prompt:
        n_tokens = prompt.n_tokens
    assert n_tokens == 1 + 62 * 64 + 64
    with many.prompt(engine, n_tokens) as prompt:
        assert prompt.n_tokens == n_tokens


def test_lengths_up_to_the_end_of_the_context(case, engine):
    n_most = engine.n_ctx_max - N_ANSWER
    with case.prompt(engine, n_most) as prompt:
        assert prompt.n_tokens == n_most
    with pytest.raises(OptionError, match=f"length {n_most + 1}: .*give at most {n_most}"):
        case.prompt(engine, n_most + 1)


#
# what is timed
#


class Recorder:
    """Calls of an engine's methods, in order."""

    def __init__(self, monkeypatch, engine: Engine) -> None:
        self.calls: list[str] = []
        self.n_cells: list[int] = []  # whenever decoding begins
        for name in ("prefill", "restore", "prune", "decode"):
            monkeypatch.setattr(engine, name, self._recorded(engine, name))

    def _recorded(self, engine, name):
        method = getattr(engine, name)

        def call(*args, **kwargs):
            if name == "decode" and self.calls[-1] != name:
                self.n_cells.append(engine.n_cells)
            if name != "decode" or self.calls[-1] != name:
                self.calls.append(name)
            return method(*args, **kwargs)

        return call


def test_caches_take_turns(case, engine, monkeypatch):
    recorder = Recorder(monkeypatch, engine)
    progress = []
    with case.prompt(engine, 80) as prompt:
        found = measure(
            engine,
            prompt,
            [0.1, 20],
            n_rounds=2,
            progress=lambda *step: progress.append(step),
        )
    forth = [80, 8, 8, 20, 20]  # full, pruned, as many cells, pruned, as many cells
    back = forth[::-1]
    assert recorder.n_cells == [*forth, *back, *forth] + [*back, *forth, *back]
    # two contexts of as many cells, then the prompt in every round
    assert recorder.calls.count("prefill") == 2 + 2
    assert recorder.calls.count("prune") == 2 * 2 * N_LAPS
    lap = ["restore", "decode"] + 2 * ["restore", "prune", "decode", "restore", "decode"]
    assert recorder.calls[3 : 3 + len(lap)] == lap
    assert progress[0] == ("decode", 0, 15) and progress[-1] == ("decode", 15, 15)

    full, tenth, twenty = found.caches
    assert [cache.budget for cache in found.caches] == [None, 0.1, 20]
    assert [cache.n_cells for cache in found.caches] == [80, 8, 20]
    assert (found.n_tokens, found.n_image_tokens) == (80, 0)
    assert len(found.prefill_s) == len(found.encode_s) == 2 and found.encode_s == [0, 0]
    assert len(full.decode_s) == 2 * N_LAPS and full.even_s == full.prune_s == []
    for cache in (tenth, twenty):
        columns = (cache.decode_s, cache.even_s, cache.prune_s, cache.score_s, cache.compact_s)
        assert all(len(column) == 2 * N_LAPS and min(column) > 0 for column in columns)
        parts = zip(cache.prune_s, cache.score_s, cache.select_s, cache.compact_s, strict=True)
        assert all(sum(rest) <= whole for whole, *rest in parts)


def test_pictures_are_encoded_in_every_round(case, engine):
    with replace(case, n_images=2).prompt(engine, 140) as prompt:
        found = measure(engine, prompt, [30], n_rounds=2, progress=lambda *step: None)
    assert found.n_image_tokens == 128
    assert len(found.encode_s) == 2 and min(found.encode_s) > 0


def made_up(n_tokens: int = 100) -> Length:
    """Two rounds. The pruned cache is twice as fast as the full one, and 1 % slower than even."""
    full = Cache(None, n_tokens, decode_s=[0.32, 0.64] * N_LAPS)
    pruned = Cache(
        0.1,
        n_tokens // 10,
        decode_s=[0.16, 0.32] * N_LAPS,
        even_s=[0.1584, 0.3168] * N_LAPS,
        prune_s=[0.5, 9, 9, 0.25, 9, 9],
    )
    return Length(n_tokens, 0, [full, pruned], encode_s=[1.0, 2.0], prefill_s=[4.0, 5.0])


def test_figures():
    length = made_up()
    full, pruned = length.caches
    assert length.prefill_speed == [25, 20]
    assert full.speed[:2] == [N_DECODE / 0.32, N_DECODE / 0.64]
    assert length.speedup(pruned) == [2.0] * 6
    assert pruned.speed_over_even == pytest.approx([0.99] * 6)
    # a pruned cache answers when it has been pruned, which it is first in a round's first lap
    assert length.first_token_s(full) == [5, 7]
    assert length.first_token_s(pruned) == [5.5, 7.25]
    assert spread([1, 2, 3, 4, 10]) == Spread(3, 2, 4)
    assert spread([1, 2, 3, 4, 10]).text(1) == "3.0 ±1.0"


#
# memory
#


@pytest.mark.skipif(memory.peak_memory() is None, reason="this system doesn't tell")
def test_memory_is_a_process_of_its_own(case):
    case = replace(case, kv_type="f32")
    full = memory.measure(case, 2000, None)
    pruned = memory.measure(case, 2000, 0.1)
    per_token = 6 * 2 * 2 * 64 * 4
    assert (full.kv, pruned.kv) == (2000 * per_token, 200 * per_token)
    # what was evicted is given back, and the attention masks with it
    freed = full.answer - pruned.answer
    assert 0.7 * 1800 * per_token < freed < 1.2 * 1800 * (per_token + 6 * 512)
    for found in (full, pruned):
        assert found.peak >= found.answer > found.kv
        assert found.peak > 2000 * per_token + 2**25


@pytest.mark.skipif(memory.peak_memory() is None, reason="this system doesn't tell")
def test_an_error_of_the_process_is_told(case):
    with pytest.raises(CspEdgeError, match="^length 9000: with 34 tokens .* give at most 4062$"):
        memory.measure(case, 9000, None)


@pytest.mark.parametrize(
    ("status", "error", "match"),
    [
        (-9, MemoryLimitError, "100 tokens was killed by signal 9, .*: give smaller --lengths"),
        (3, CspEdgeError, "ended with status 3: run the command again"),
        (-2, KeyboardInterrupt, None),
    ],
)
def test_a_process_that_ends_otherwise(status, error, match, case, monkeypatch):
    monkeypatch.setattr(memory, "peak_memory", lambda: 1)
    ended = subprocess.CompletedProcess([], status, stdout=b"")
    monkeypatch.setattr(memory.subprocess, "run", lambda *args, **kwargs: ended)
    with pytest.raises(error, match=match):
        memory.measure(case, 100, None)


#
# what is written
#


def made_up_run(found: list[Memory | None] | None = None) -> Run:
    found = found or [Memory(300 * 2**20, 200 * 2**20, 2**20), Memory(2**28, 2**27, 2**19)]
    lengths = [made_up(100), made_up(200)]
    return Run(
        Case("m.gguf", None, n_threads=2), "m", "Q8_0", 2, lengths, [found, found], (0.5, 1.5)
    )


def test_tables():
    speed, rest = tables(made_up_run())
    assert speed.title == "Speed of m, Q8_0, f16 cache, 2 threads"
    assert len({len(row) for row in [speed.columns, *speed.rows]}) == 1
    full, pruned, *_ = (dict(zip(speed.columns, row, strict=True)) for row in speed.rows)
    assert full == {
        "prompt": "100",
        "kept": "full",
        "cells": "100",
        "prefill, tokens/s": "22.5 ±1.2",
        "first token, s": "6.00 ±0.50",
        "prune, s": "",
        "of prefill": "",
        "decode, tokens/s": "75.0 ±25.0",
        "full = 1": "",
        "as many cells = 1": "",
    }
    assert (pruned["kept"], pruned["cells"], pruned["prefill, tokens/s"]) == ("10%", "10", "")
    assert pruned["of prefill"] == "200.0%"
    assert (pruned["full = 1"], pruned["as many cells = 1"]) == ("2.00 ±0.00", "0.99 ±0.00")
    assert speed.notes[-1] == "Load average 0.5 before and 1.5 after."
    assert rest.rows[:2] == [
        ["100", "full", "100", "1.0", "300.0", "200.0"],
        ["100", "10%", "10", "0.5", "256.0", "128.0"],
    ]


def test_tables_where_memory_is_not_told(tmp_path):
    unknown = made_up_run([None, None])
    [speed] = tables(unknown)
    assert "prefill, tokens/s" in speed.columns
    plot(unknown, tmp_path / "a.png")
    assert unknown.as_dict()["lengths"][0]["caches"][0]["memory"] is None


def test_dict_has_every_measurement():
    found = json.loads(json.dumps(made_up_run().as_dict()))
    assert (found["model"], found["kv_type"], found["n_decode"]) == ("m", "f16", N_DECODE)
    length = found["lengths"][0]
    assert length["prefill_s"] == [4, 5]
    assert length["prefill_tokens_per_second"] == {"median": 22.5, "low": 21.25, "high": 23.75}
    full, pruned = length["caches"]
    assert full["budget"] is None and pruned["budget"] == "10%"
    assert pruned["prune_s"] == [0.5, 9, 9, 0.25, 9, 9]
    assert pruned["first_token_s"] == [5.5, 7.25]
    assert pruned["speedup"] == {"median": 2, "low": 2, "high": 2}
    assert pruned["speed_over_even"]["median"] == pytest.approx(0.99)
    assert pruned["memory"] == {"peak": 2**28, "answer": 2**27, "kv": 2**19}
    assert "speedup" not in full


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_plot(name, tmp_path):
    plot(made_up_run(), tmp_path / name)
    if name == "a.png":
        image = Image.open(tmp_path / name)
        assert image.width > 1000 and len(image.convert("RGB").getcolors(2**20)) > 20
    else:
        text = (tmp_path / name).read_text()
        assert text.startswith("<?xml") and text.count("<path") > 20


def test_bench_tells_nonsense_before_it_measures(case, monkeypatch):
    monkeypatch.setattr(run.speed, "measure", lambda *args, **kwargs: pytest.fail("measured"))
    with pytest.raises(OptionError, match="budget 90: keeps all of a prompt of 80 tokens"):
        bench(case, [100, 80], [90])
    with pytest.raises(OptionError, match="length 9000: "):
        bench(case, [100, 9000], [0.1])


#
# the command
#


def test_command(capsys, tmp_path, monkeypatch, no_processes):
    monkeypatch.chdir(tmp_path)
    line = f"{LINE} --lengths 60,30,60 --budgets 20%,10 --json a.json --plot a.png"
    assert main(shlex.split(line)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = re.findall(r"^(30|60) +(full|20%|10) +(\d+) +\d", out, re.MULTILINE)
    each = [("full", "30"), ("20%", "6"), ("10", "10"), ("full", "60"), ("20%", "12"), ("10", "10")]
    assert [row[1:] for row in rows] == each + each  # of speed and of memory
    assert "Speed of csp-demo, Q8_0, f16 cache, 1 thread\n" in out and "\nMemory\n" in out
    found = json.loads((tmp_path / "a.json").read_text())
    assert [length["n_tokens"] for length in found["lengths"]] == [30, 60]
    assert len(found["lengths"][0]["caches"][1]["decode_s"]) == 2 * N_LAPS
    assert Image.open(tmp_path / "a.png").format == "PNG"


def test_command_with_pictures(capsys, no_processes):
    assert main(shlex.split(f"{LINE} --images 2 --budgets 10%")) == 0
    out, _ = capsys.readouterr()
    assert "encode, s" in out and "Tokens of pictures: 128 of 193." in out


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ("--lengths 4096", "length 4096: with 34 tokens of answer beyond the context of 4096: "),
        ("--lengths 99999999999999", "length 99999999999999: "),
        ("--lengths 1", "budget 10%: keeps all of a prompt of 1 tokens: give a smaller one"),
        ("--lengths 40 --budgets 40", "budget 40: keeps all of a prompt of 40 tokens"),
        ("--budgets 100%", "budget 100%: keeps all of a prompt of 512 tokens"),
        ("--budgets 0", "budget=0: give"),
        ("--budgets few", "budget 'few': give a share"),
        ("--images 2 --lengths 129", "2 pictures take 128 tokens, and a prompt has room for 128 "),
        ("--images 63", "63 pictures take 4032 tokens, and a prompt has room for 3998 beside its"),
        ("--images 1000000000", "1000000000 pictures take 64000000000 tokens"),
        ("--kv-type q9", "unknown kv_type 'q9'"),
        ("--threads 0", "n_threads=0: give"),
        ("-m nosuch.gguf", "nosuch.gguf: no such file"),
        ("--json nosuch/a.json", "nosuch/a.json: can't be written: no folder nosuch"),
        ("--plot nosuch/a.png", "nosuch/a.png: can't be written: no folder nosuch"),
        ("--plot a.pdf", "a.pdf: give a name that ends with .png or .svg"),
    ],
)
def test_bad_input(options, match, capsys):
    threads = "" if "--threads" in options else "--threads 1"
    assert main(shlex.split(f"bench {threads} {options}")) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert re.match(f"csp-edge: error: {match}", err)


@pytest.mark.parametrize("options", ["--lengths 0", "--lengths 2,x", "--images 0", "--rounds 0"])
def test_usage(options, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["bench", *options.split()])
    assert exit.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_pictures_without_a_projector(smollm2_path):
    case = Case(str(smollm2_path), None, n_images=1, n_threads=1)
    with closing(case.engine()) as engine, pytest.raises(ProjectorError, match="need a projector"):
        case.prompt(engine, None)


def test_without_matplotlib(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(shlex.split(f"{LINE} --plot a.png")) == 1
    assert "pip install csp-edge[eval]" in capsys.readouterr().err


def test_what_cannot_be_written(capsys, tmp_path, no_processes):
    line = f"{LINE} --lengths 30 --budgets 20% --json {tmp_path}"
    assert main(shlex.split(line)) == 1
    out, err = capsys.readouterr()
    assert out.startswith("Speed of csp-demo") and f"{tmp_path}: can't be written" in err


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom csp_edge.cli import main\n"
        "try: main(['bench', '--help'])\nexcept SystemExit: pass\n"
        "print(*{'numpy', 'PIL', 'llama_cpp', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == ""


def test_policy_is_csp():
    assert policy(0.5, 10) == CSP(0.5)
    assert policy(9, 10) == CSP(9)
    with pytest.raises(OptionError, match="budget 10: keeps all of a prompt of 10 tokens"):
        policy(10, 10)


def test_a_model_in_another_type(demo_paths, tmp_path):
    script = Path(__file__).parents[1] / "bench/requantize.py"
    out = tmp_path / "q4_0.gguf"
    command = [sys.executable, str(script), str(demo_paths[0]), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    types = {tensor.name: tensor.tensor_type for tensor in GGUFReader(out).tensors}
    assert types["blk.0.ffn_up.weight"] == GGMLQuantizationType.Q4_0
    with closing(Engine(out, n_threads=1)) as engine:
        assert engine.encoder.n_embd
    # nor over what is there, which may be the model
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and f"{out}: exists already" in again.stderr
