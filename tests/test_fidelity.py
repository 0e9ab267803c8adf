"""csp-edge eval fidelity: pruned caches against the full one, along the continuation of a text."""

import re
import shlex

import numpy as np
import pytest

from csp_edge import CSP, EdgeVLM
from csp_edge.cli import main
from csp_edge.errors import OptionError, PromptError
from csp_edge.eval.contenders import parse_contenders
from csp_edge.eval.fidelity import Window, default_text, diverge, keys, read_text, windows
from csp_edge.eval.log import read_log
from csp_edge.eval.page import page, read_runs

SIZES = {"n_windows": 2, "n_prompt": 60, "n_continuation": 4}


@pytest.fixture(scope="module")
def engine(smollm2_path):
    """SmolLM2, to be pruned."""
    with EdgeVLM(smollm2_path, cache=CSP(), n_threads=1) as vlm:
        yield vlm.engine


@pytest.fixture(scope="module")
def two(engine):
    return windows(engine, "reference", default_text()[:20_000], **SIZES)


def test_the_default_text_is_long_and_english():
    text = default_text()
    assert len(text) > 300_000
    assert "Compound statements contain (groups of) other statements" in text


def test_windows_are_of_the_text_and_apart(engine, two):
    text = default_text()[:20_000]
    with engine.tokenizer.tokenize([text]) as whole:
        tokens = whole.items
    for window in two:
        found = window.prompt + window.continuation
        assert tokens[window.start : window.start + len(found)] == found
        assert (len(window.prompt), len(window.continuation)) == (60, 4)
    # the first begins the text and the last ends it
    assert two[0].start == 0
    assert two[-1].start + 64 == len(tokens)
    many = windows(engine, "reference", text, n_windows=10**6, n_prompt=60, n_continuation=4)
    assert len(many) == len(tokens) // 64
    assert all(b.start - a.start >= 64 for a, b in zip(many, many[1:], strict=False))


def test_a_vocabularys_first_token_begins_every_window(demo):
    text = "what is in the picture ? " * 40
    with demo.engine.tokenizer.tokenize([text]) as whole:
        bos, *tokens = whole.items
    assert demo.engine.tokenizer.piece(bos) == b""
    for window in windows(demo.engine, "t", text, n_windows=3, n_prompt=20, n_continuation=5):
        assert window.prompt[0] == bos and len(window.prompt) == 20
        found = window.prompt[1:] + window.continuation
        assert tokens[window.start : window.start + 24] == found


def test_a_text_that_is_too_short(engine):
    with pytest.raises(OptionError, match="t: 2 tokens, and a window is 64: give a longer text"):
        windows(engine, "t", "Hello world", **SIZES)


def log_softmax(logits):
    x = logits.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def along(engine, window, policy):
    """The distributions of every step, over a cache made for it alone."""
    engine.clear()
    with engine.tokenizer.tokenize(["a"]) as prompt:
        prompt.items[:] = window.prompt
        prompt.n_tokens = prompt.n_pos = len(window.prompt)
        engine.prefill(
            prompt, room=9, window=policy.resolve(60, has_pictures=False).window if policy else 0
        )
    if policy:
        engine.prune(policy)
    assert engine.cut(59)
    steps = []
    for token in [window.prompt[-1], *window.continuation[:-1]]:
        engine.decode(token)
        steps.append(log_softmax(engine.logits))
    return steps


def test_divergence_is_that_of_the_definition(engine, two):
    found = list(diverge(engine, two, parse_contenders("csp,random"), [0.2, 0.9]))
    assert {d.key for d in found} == keys(two, parse_contenders("csp,random"), [0.2, 0.9])
    assert len(found) == 8
    full = along(engine, two[1], None)
    pruned = along(engine, two[1], CSP(0.2))
    [csp] = [d for d in found if d.key == ("reference", two[1].start, "csp", 0.2)]
    divergences = [(np.exp(p) * (p - q)).sum() for p, q in zip(full, pruned, strict=True)]
    assert csp.kl == pytest.approx(np.mean(divergences), rel=1e-9)
    same = [p.argmax() == q.argmax() for p, q in zip(full, pruned, strict=True)]
    assert csp.top1 == np.mean(same)
    assert (csp.n_tokens, csp.n_kept, csp.error) == (60, 12, None)
    # what one knows of any model: few random cells are worse than most by score
    random = [d.kl for d in found if (d.policy, d.budget) == ("random", 0.2)]
    best = [d.kl for d in found if (d.policy, d.budget) == ("csp", 0.9)]
    assert min(random) > 5 * max(best) > 0


def test_a_budget_of_everything_diverges_by_nothing(engine, two):
    [found] = diverge(engine, two[:1], parse_contenders("csp"), [1.0])
    assert (found.kl, found.top1, found.n_kept) == (0.0, 1.0, 60)


def test_who_cannot_run_is_told(engine, two):
    contenders = parse_contenders("csp:recent=40,csp")
    found = list(diverge(engine, two[:1], contenders, [0.2]))
    assert "recent=40 is larger than the budget" in found[0].error
    assert found[0].kl is None and found[1].kl > 0


def test_what_is_done_is_not_measured_again(engine, two):
    contenders = parse_contenders("csp")
    found = list(diverge(engine, two, contenders, [0.2, 0.5]))
    missing = list(diverge(engine, two, contenders, [0.2, 0.5], done={d.key for d in found[1:]}))
    assert missing == found[:1]


#
# the command
#


@pytest.fixture
def run(capsys, tmp_path, monkeypatch, smollm2_path):
    """Run the command on SmolLM2, briefly: what it prints."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(default_text()[:20_000])

    def run(options, status=0):
        line = f"eval fidelity -m {smollm2_path} --threads 1 --text book.txt --tokens 50 {options}"
        assert main(shlex.split(f"{line} --continuation 3 --windows 2")) == status
        return capsys.readouterr()

    return run


def test_fidelity(run, tmp_path):
    out, err = run("--policies csp,streaming --budgets 20%,25 --log a.jsonl")
    assert err == "" and out.startswith("8 of 8 measured now")
    for title in ("KL divergence", "Top-1 agreement"):
        assert re.search(rf"^{title}.*\n +20% +25\ncsp +\d+\.\d", out, re.MULTILINE)
    header, entries = read_log(tmp_path / "a.jsonl")
    assert (header["data"], header["n_prompt"]) == ("book.txt", 50)
    assert [e["n_kept"] for e in entries[:4]] == [10, 25, 10, 25]

    # goes on
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:4]))
    out, _ = run("--policies csp,streaming --budgets 20%,25 --log a.jsonl")
    assert out.startswith("5 of 8 measured now")
    assert (tmp_path / "a.jsonl").read_bytes() == b"".join(lines)
    text = page(read_runs([tmp_path / "a.jsonl"]), {}, tmp_path)
    assert "KL divergence" in text and "on book.txt" in text

    (tmp_path / "book.txt").write_text(default_text()[:30_000])
    _, err = run("--policies csp --budgets 20% --log a.jsonl", status=1)
    assert "a.jsonl: of another run, whose data_sha256 is" in err


def test_a_text_that_cannot_be_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(OptionError, match="a.txt: not UTF-8 at byte 3: give a text file"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(OptionError, match="nosuch.txt: No such file"):
        read_text(tmp_path / "nosuch.txt")


def test_beyond_the_context(engine, two):
    window = Window("t", 0, two[0].prompt * 200, [1, 2])
    with pytest.raises(PromptError, match="beyond the context"):
        list(diverge(engine, [window], parse_contenders("csp"), [0.2]))
