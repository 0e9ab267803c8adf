"""csp-edge eval: the protocol, the log, the figures, the command."""

import json
import math
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from csp_edge import CSP, EdgeVLM, Full
from csp_edge.cli import main
from csp_edge.engine import Engine
from csp_edge.errors import OptionError, PolicyError
from csp_edge.eval import cli, report
from csp_edge.eval.answers import Answer
from csp_edge.eval.contenders import (
    FULL,
    Contender,
    budget_name,
    by_size,
    parse_budgets,
    parse_contenders,
)
from csp_edge.eval.data import milebench_samples
from csp_edge.eval.intervals import bootstrap, wilson
from csp_edge.eval.log import Log, read_log
from csp_edge.eval.page import page, read_runs
from csp_edge.eval.plot import plot
from csp_edge.eval.run import Cell, cells, keys, sweep
from csp_edge.eval.samples import Sample, Turn
from csp_edge.eval.suite import suite
from csp_edge.policies import H2O, Random, SnapKV
from csp_edge.template import normalize_messages

COMMAND = [sys.executable, "-m", "csp_edge"]
FULL_CELL = Cell(FULL, None, None)


@pytest.fixture(scope="module")
def vlm():
    """The embedded model, to be pruned."""
    with EdgeVLM.demo(cache=CSP(), n_threads=1) as vlm:
        yield vlm


@pytest.fixture(scope="module")
def samples(scenes) -> list[Sample]:
    """Two conversations. No model says by chance what is right here."""

    def turn(question: str, skill: str) -> Turn:
        return Turn(question, "four green umbrellas", skill, "any")

    star = turn("What color is the star in image 2?", "attribute")
    content = turn("What is in image 1?", "list")
    which = turn("Which image shows the blue star?", "find")
    return [
        Sample("a", "made up", "exact", tuple(scenes[:3]), (star, content, which)),
        Sample("b", "made up", "exact", tuple(scenes[1:3]), (content, star)),
    ]


def said(answers):
    """What doesn't depend on the clock."""
    return [replace(answer, seconds=None) for answer in answers]


#
# the protocol
#


def test_the_full_cache_answers_as_a_chat_does(vlm, samples, scenes):
    found = list(sweep(vlm, samples, [FULL_CELL], max_tokens=12))
    assert [(a.sample, a.turn) for a in found] == [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2)]
    with EdgeVLM.demo(cache=Full(), n_threads=1) as plain:
        for answer in found:
            sample = next(s for s in samples if s.id == answer.sample)
            rights = [turn.answer for turn in sample.turns[: answer.turn - 1]]
            chat = plain.chat(sample.messages(rights), max_tokens=12)
            assert answer.answer == chat.text
            assert answer.n_answer == chat.usage.completion_tokens
        first = plain.chat(samples[0].messages(), max_tokens=1).usage.prompt_tokens
    assert found[0].n_tokens == found[0].n_kept == first
    assert (found[0].policy, found[0].budget, found[0].n_images) == (FULL, None, 3)


def by_hand(vlm, sample, policy, max_tokens):
    """The protocol step by step, without snapshots: the answers to all turns."""
    engine = vlm.engine
    engine.clear()
    answers = []
    for turn in range(len(sample.turns)):
        rights = [t.answer for t in sample.turns[:turn]]
        with vlm.tokenize(normalize_messages(sample.messages(rights))) as prompt:
            if turn == 0:
                n_first = prompt.n_tokens
                engine.prefill(prompt, room=400, window=policy.resolve(n_first).window)
                engine.prune(policy)
                assert engine.cut(len(prompt.items) - 1)
                engine.decode(prompt.items[-1])
            else:
                assert engine.prefill(prompt).n_reused >= n_first
        tokens = []
        while len(tokens) < max_tokens:
            token = int(np.argmax(engine.logits))
            if engine.tokenizer.ends(token):
                break
            tokens.append(token)
            engine.decode(token)
        answers.append(b"".join(map(engine.tokenizer.piece, tokens)).decode().strip())
    return answers


@pytest.mark.parametrize("policy", [CSP(0.2), SnapKV(30, window=8), H2O(0.3), Random(0.1)])
def test_answers_come_from_the_pruned_cache(vlm, samples, policy):
    # beside others of other windows, and after them
    others = [FULL_CELL, Cell("wide", 0.5, CSP(0.5, window=0.5)), Cell("it", 0.1, policy)]
    found = [a for a in sweep(vlm, samples, others, max_tokens=8) if a.policy == "it"]
    expected = [answer for s in samples for answer in by_hand(vlm, s, policy, 8)]
    assert [a.answer for a in found] == expected
    for answer in found:
        assert answer.n_kept == pytest.approx(policy.resolve(answer.n_tokens).budget)


def test_already_the_first_token_comes_from_the_pruned_cache(vlm, samples):
    policy = CSP(4, recent=1, window=4)
    [pruned] = sweep(vlm, samples[:1], [Cell("csp", 4, policy)], n_turns=1, max_tokens=1)
    engine = vlm.engine
    after = engine.logits.copy()
    with vlm.tokenize(normalize_messages(samples[0].messages())) as prompt:
        engine.clear()
        engine.prefill(prompt, window=4)
        before = engine.logits.copy()
    # logits of one token, over four cells and over all
    assert np.abs(after - before).max() > 0.5
    assert pruned.answer == engine.tokenizer.piece(int(after.argmax())).decode().strip()


def test_a_budget_of_everything_is_the_full_cache(vlm, samples):
    found = list(sweep(vlm, samples, [FULL_CELL, Cell("csp", 1.0, CSP(1.0))], max_tokens=12))
    by_policy = {
        policy: [(a.sample, a.turn, a.answer, a.n_kept) for a in found if a.policy == policy]
        for policy in (FULL, "csp")
    }
    assert by_policy[FULL] == by_policy["csp"]


def test_one_prefill_and_one_encoding_for_many_prunings(vlm, samples, monkeypatch):
    calls = []
    for name in ("prefill", "restore", "prune", "redecode"):
        method = getattr(Engine, name)

        def record(self, *args, _name=name, _method=method, **options):
            calls.append((_name, options.get("window", 0)))
            return _method(self, *args, **options)

        monkeypatch.setattr(Engine, name, record)
    columns = cells(parse_contenders("csp,snapkv:window=40"), [0.1, 0.2])
    n_encoded = vlm.engine.encoder.n_encoded
    list(sweep(vlm, samples[:1], columns, n_turns=1, max_tokens=2))
    # as many queries as the widest of them wants
    assert calls == [
        ("prefill", 40),
        ("restore", 0),
        ("redecode", 0),
        *[("restore", 0), ("prune", 0), ("redecode", 0)] * 4,
    ]
    assert vlm.engine.encoder.n_encoded - n_encoded <= samples[0].n_pictures


def test_every_policy_is_asked_after_the_right_answers(vlm, samples):
    list(sweep(vlm, samples[:1], [Cell("csp", 0.1, CSP(0.1))], max_tokens=3))
    rights = [turn.answer for turn in samples[0].turns[:2]]
    with vlm.tokenize(normalize_messages(samples[0].messages(rights))) as prompt:
        assert vlm.engine.items[: len(prompt.items)] == prompt.items
    # and nothing was pruned again
    n_evicted = vlm.engine.n_tokens - vlm.engine.n_cells
    with vlm.tokenize(normalize_messages(samples[0].messages())) as prompt:
        assert n_evicted == prompt.n_tokens - CSP(0.1).resolve(prompt.n_tokens).budget


def test_the_order_of_policies_changes_nothing(vlm, samples):
    columns = cells(parse_contenders("csp,random"), [0.1, 0.4])
    found = list(sweep(vlm, samples, columns, max_tokens=6))
    again = list(sweep(vlm, samples[::-1], columns[::-1], max_tokens=6))
    assert sorted(map(str, said(found))) == sorted(map(str, said(again)))


def test_what_is_done_is_not_asked_again(vlm, samples):
    columns = cells(parse_contenders("csp"), [0.1, 0.4])
    found = list(sweep(vlm, samples, columns, max_tokens=4))
    assert {a.key for a in found} == keys(samples, columns)
    done = {a.key for a in found[:4] + found[6:]}
    missing = list(sweep(vlm, samples, columns, max_tokens=4, done=done))
    assert said(missing) == said(found[4:6])
    assert not list(sweep(vlm, samples, columns, done={a.key for a in found}))
    assert [a.turn for a in sweep(vlm, samples, columns, n_turns=1)] == [1] * 6


def test_who_cannot_run_is_told_and_the_others_go_on(vlm, samples):
    columns = cells(parse_contenders("csp:recent=40,csp"), [0.1])
    found = list(sweep(vlm, samples[:1], columns, max_tokens=4))
    errors = [a.error for a in found if a.policy == "csp:recent=40"]
    assert len(errors) == 3 and all("recent=40 is larger than the budget" in e for e in errors)
    assert all(a.score is None and a.answer is None for a in found if a.error)
    assert [a.score for a in found if not a.error] == [0.0] * 6


def test_a_picture_that_cannot_be_read_is_told(vlm, samples, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    bad = replace(samples[0], id="bad", content=(broken, *samples[0].content[1:]))
    found = list(sweep(vlm, [bad, samples[1]], [FULL_CELL], max_tokens=2))
    assert [("not a picture" in (a.error or "")) for a in found] == [True] * 3 + [False] * 2


def test_a_prompt_beyond_the_context_loses_its_first_pictures(samples):
    with EdgeVLM.demo(cache=CSP(), n_threads=1) as large:
        sizes = []
        for n in range(4):
            shortened = samples[0].shortened(n)
            messages = shortened.messages([turn.answer for turn in shortened.turns[:2]])
            with large.tokenize(normalize_messages(messages)) as prompt:
                sizes.append(prompt.n_tokens)
        expected = list(sweep(large, [samples[0].shortened(2)], [FULL_CELL], max_tokens=5))
    with EdgeVLM.demo(cache=CSP(), n_threads=1, n_ctx=sizes[2] + 5) as small:
        found = list(sweep(small, samples[:1], [FULL_CELL], max_tokens=5))
        assert said(found) == said(expected)
        assert [a.n_images for a in found] == [2] * 3
    with EdgeVLM.demo(cache=CSP(), n_threads=1, n_ctx=8) as tiny:
        found = list(sweep(tiny, samples[:1], [FULL_CELL], max_tokens=5))
        assert all("beyond the context" in a.error for a in found)


def test_a_rewritten_history_is_told(vlm, samples, monkeypatch):
    # as by a template that dates a conversation by its length
    render = vlm._template.render
    dated = SimpleNamespace(render=lambda messages: f"{len(messages)} {render(messages)}")
    monkeypatch.setattr(vlm, "_template", dated)
    found = list(sweep(vlm, samples[1:], [Cell("csp", 0.2, CSP(0.2))], max_tokens=2))
    assert found[0].answer is not None
    assert "ask one turn" in found[1].error


def test_scored_by_the_metric_of_the_sample(vlm, samples):
    [found] = sweep(vlm, samples[:1], [FULL_CELL], n_turns=1, max_tokens=8)
    right = replace(samples[0].turns[0], answer=found.answer.upper())
    [found] = sweep(vlm, [replace(samples[0], turns=(right,))], [FULL_CELL], max_tokens=8)
    assert (found.score, found.right) == (1.0, right.answer)


#
# contenders and budgets
#


def test_contenders():
    assert parse_contenders("csp, snapkv:kernel=5,window=10%,full,csp:cross_ratio=none") == [
        Contender("csp", "csp"),
        Contender("snapkv:kernel=5,window=10%", "snapkv", (("kernel", 5), ("window", 0.1))),
        Contender("csp:cross_ratio=none", "csp", (("cross_ratio", None),)),
    ]
    assert parse_contenders("csp:sink=mass")[0].at(0.2) == CSP(0.2, sink="mass")
    assert parse_contenders("csp:cross_ratio=0.5")[0].at(64) == CSP(64, cross_ratio=0.5)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("best", "unknown policy 'best': choose one of csp, full"),
        ("", "unknown policy ''"),
        ("csp:window", "'csp:window': write its settings like csp:window=32"),
        ("csp:budget=5", "'csp:budget=5': write its settings"),
        ("csp:colour=5", "policy 'csp' has no setting 'colour'"),
        ("csp:window=wide", "window='wide': give"),
        ("csp:cross_ratio=2", "cross_ratio=2: give"),
        ("csp:window=nan", "window=nan: give"),
        ("full:window=5", "policy 'full' has no setting"),
        ("csp,h2o,csp", "'csp' stands there twice"),
    ],
)
def test_bad_contenders(text, match):
    with pytest.raises(PolicyError, match=match):
        parse_contenders(text)


def test_budgets():
    budgets = parse_budgets("512,20%,0.05,64,20%")
    assert budgets == [0.05, 0.2, 64, 512]
    assert [budget_name(b) for b in [*budgets, None]] == ["5%", "20%", "64", "512", "full"]
    assert sorted([None, *budgets[::-1]], key=by_size) == [*budgets, None]
    with pytest.raises(PolicyError, match="budget 'some': give a share"):
        parse_budgets("10%,some")


#
# the log
#

HEADER = {"log": "answers", "model": "m", "seed": 1}


def test_a_log_goes_on(tmp_path):
    path = tmp_path / "a.jsonl"
    with Log(path, HEADER) as log:
        assert log.entries == []
        log.append({"i": 1, "text": "ü\n\u2028"})
    with Log(path, HEADER) as log:
        assert log.entries == [{"i": 1, "text": "ü\n\u2028"}]
        log.append({"i": 2})
    assert read_log(path) == (HEADER, [{"i": 1, "text": "ü\n\u2028"}, {"i": 2}])
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("n_cut", [1, 5, 8])
def test_a_line_that_was_cut_off_is_dropped(tmp_path, n_cut):
    path = tmp_path / "a.jsonl"
    with Log(path, HEADER) as log:
        log.append({"i": 1})
        log.append({"i": 2})
    path.write_bytes(path.read_bytes()[:-n_cut])
    with Log(path, HEADER) as log:
        assert log.entries == [{"i": 1}]
        log.append({"i": 3})
    assert read_log(path)[1] == [{"i": 1}, {"i": 3}]


@pytest.mark.parametrize("content", [b"", b'{"lo', b'{"log": "answers", "mo'])
def test_a_log_that_was_cut_off_at_its_begin_begins_anew(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with Log(path, HEADER) as log:
        assert log.entries == []
    assert read_log(path) == (HEADER, [])


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (HEADER | {"seed": 2}, "a.jsonl: of another run, whose seed is 1 and not 2: give another"),
        (HEADER | {"data": "d"}, "of another run, whose data is None and not 'd'"),
        ({"log": "answers", "model": "m"}, "of another run, whose seed is 1 and not None"),
    ],
)
def test_another_runs_log_is_refused_and_left_alone(tmp_path, header, match):
    path = tmp_path / "a.jsonl"
    with Log(path, HEADER) as log:
        log.append({"i": 1})
    before = path.read_bytes()
    with pytest.raises(OptionError, match=match):
        Log(path, header)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"some text", "not a log"),
        (b"some\ntext\n", "line 1 is not of a log"),
        (b'{"a": 1}\n', "line 1 is not of a log"),
        (b'{"log": 1}\n[]\n', "line 2 is not of a log"),
        (b'{"log": 1}\n\xff\n{}\n', "line 2 is not of a log"),
    ],
)
def test_what_is_no_log_is_refused_and_left_alone(tmp_path, content, match):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    for use in (read_log, lambda path: Log(path, HEADER)):
        with pytest.raises(OptionError, match=match):
            use(path)
    assert path.read_bytes() == content


def test_a_log_that_cannot_be_opened(tmp_path):
    with pytest.raises(OptionError, match="nosuch.jsonl: No such file"):
        read_log(tmp_path / "nosuch.jsonl")
    with pytest.raises(OptionError, match="Is a directory"):
        Log(tmp_path, HEADER)


#
# figures
#


def test_wilson():
    # Newcombe (Statistics in Medicine 17, 1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for right, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        estimate = wilson([1.0] * right + [0.0] * (n - right))
        assert estimate.value == right / n
        assert estimate.low == pytest.approx(low, abs=5e-5)
        assert estimate.high == pytest.approx(high, abs=5e-5)
    assert wilson([1.0]).high == 1.0


def test_bootstrap_covers_and_pairs():
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(100):
        estimate = bootstrap(lambda x: x, rng.normal(3, 1, 50).tolist())
        inside += estimate.low <= 3 <= estimate.high
    assert 85 <= inside <= 99
    hard = rng.random(200)
    # what is always a tenth better, on rows of very different difficulty
    difference = bootstrap(lambda a, b: a - b, (hard + 0.1).tolist(), hard.tolist())
    assert difference == pytest.approx((0.1, 0.1, 0.1))
    assert bootstrap(lambda x: x, [0.5]) == (0.5, 0.5, 0.5)


def answer(sample, policy, budget, score, *, turn=1, skill="read", n_answer=2, **more):
    kept = None if score is None else 100 * (budget or 1)
    return Answer(
        "suite", str(sample), "any", skill, 2, turn, policy, budget, "x", 100, kept, "y",
        None if score is None else n_answer, score, 0.1, **more,
    )  # fmt: skip


def made_up():
    """60 samples: csp keeps 3 of 4 right at 10 %, and random 1 of 2, of what the full cache has."""
    found = []
    for i in range(60):
        skill = "read" if i % 2 else "list"
        right = i % 6 != 0
        found.append(answer(i, FULL, None, float(right), skill=skill, n_answer=1 + 6 * (i % 2)))
        found.append(answer(i, "csp", 0.1, float(right and i % 4 != 1), skill=skill))
        found.append(answer(i, "csp", 0.2, float(right), skill=skill))
        found.append(answer(i, "random", 0.1, float(right and i % 2 == 0), skill=skill))
    return found


def cell(table, row, column):
    [line] = [line for line in table.rows if line[0] == row]
    return line[table.columns.index(column)]


def test_accuracy_by_policy_and_budget():
    table = report.accuracy(made_up())
    assert table.columns == ["", "10%", "20%", "full"]
    assert [row[0] for row in table.rows] == [FULL, "csp", "random"]
    scores = [a.score for a in made_up() if a.policy == "csp" and a.budget == 0.1]
    value, low, high = (100 * x for x in wilson(scores))
    assert cell(table, "csp", "10%") == f"{value:.1f} [{low:.1f}, {high:.1f}]"
    assert cell(table, FULL, "full").startswith("83.3 [")
    assert cell(table, FULL, "10%") == cell(table, "random", "20%") == ""
    assert table.notes == []


def test_questions_of_one_sample_are_one_witness():
    once = [answer(i, "csp", 0.1, float(i < 5)) for i in range(10)]
    thrice = [replace(a, turn=turn) for a in once for turn in (1, 2, 3)]
    assert report.mean_score(thrice) == report.mean_score(once)
    assert report.mean_score([]) is None


def test_accuracy_by_skill_and_the_length_of_answers():
    table = report.accuracy_by(made_up(), "skill", 0.1)
    assert table.columns == ["", "list", "read"]
    assert cell(table, "random", "read").startswith("0.0 [0.0, ")
    assert cell(table, "random", "list").startswith(cell(table, FULL, "list").split()[0])
    assert table.rows[-1] == ["tokens", "1.0", "7.0"]


def test_share_of_full():
    table = report.share_of_full(made_up())
    found = {
        (a.sample, a.policy): a.score for a in made_up() if a.budget in (None, 0.1)
    }  # fmt: skip
    share = sum(v for (_, p), v in found.items() if p == "csp") / 50
    assert cell(table, "csp", "10%").startswith(f"{100 * share:.1f} [")
    assert cell(table, "csp", "20%") == "100.0 [100.0, 100.0]"
    assert [row[0] for row in table.rows] == ["csp", "random"]
    nothing = [replace(a, score=0.0) for a in made_up()]
    assert cell(report.share_of_full(nothing), "csp", "10%") == ""


def test_ahead_of_one():
    table = report.ahead_of(made_up(), "csp")
    assert [row[0] for row in table.rows] == ["random"]
    found = {(a.sample, a.policy): a.score for a in made_up() if a.budget == 0.1}
    ahead = np.mean([found[str(i), "random"] - found[str(i), "csp"] for i in range(60)])
    value, low, high = re.findall(r"[-+\d.]+", cell(table, "random", "10%"))
    assert float(value) == pytest.approx(100 * ahead, abs=0.05)
    assert float(low) < float(value) < float(high)


def test_comparisons_are_of_the_samples_that_both_were_asked():
    # csp alone was asked the easy ones
    found = [answer(i, "csp", 0.1, 1.0) for i in range(20)]
    found += [answer(i, "random", 0.1, 1.0) for i in range(10)]
    table = report.ahead_of(found, "csp")
    assert cell(table, "random", "10%") == "+0.0 [+0.0, +0.0]"
    assert table.notes == []
    assert report.accuracy(found).notes == ["random at 10%: 10 of 20 measured"]


def test_what_cannot_run_stands_below():
    found = [answer(i, "csp", 0.1, 1.0) for i in range(4)]
    found += [answer(i, "h2o", 0.1, None, error="recent=40 is too large") for i in range(4)]
    table = report.accuracy(found)
    assert cell(table, "h2o", "10%") == ""
    assert table.notes == ["h2o at 10%: 4 of 4 can't run, like: recent=40 is too large"]


def test_tables_for_a_terminal_and_for_markdown():
    table = report.accuracy(made_up(), "Title")
    title, *lines = table.text().splitlines()
    assert title == "Title"
    assert len({len(line) for line in lines}) == 1
    assert lines[1].startswith("full  ")
    rows = table.markdown().splitlines()
    assert rows[1] == "| --- | ---: | ---: | ---: |"
    assert all(row.count("|") == 5 for row in rows)


#
# plot and page
#


@pytest.mark.parametrize("name", ["a.png", "a.svg", "A.PNG"])
def test_plot(tmp_path, name):
    plot(made_up(), tmp_path / name, "Title")
    data = (tmp_path / name).read_bytes()
    if name == "a.svg":
        text = data.decode()
        assert "<svg" in text
        for word in ("Title", "csp", "random", "full", "10%", "20%", "accuracy, %"):
            assert f"<!-- {word} -->" in text
        plot(made_up(), tmp_path / "b.svg", "Title")
        assert (tmp_path / "b.svg").read_bytes() == data
    else:
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 500
            assert len(picture.convert("RGB").getcolors(2**20)) > 50


def test_a_plot_of_little(tmp_path):
    plot([answer(1, FULL, None, 1.0)], tmp_path / "full.png", "one answer")
    plot([], tmp_path / "none.png", "none")
    plot([answer(1, "csp", 0.1, None, error="no")], tmp_path / "errors.png", "none")


def test_what_cannot_be_plotted(tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="a.pdf: give a name that ends with .png or .svg"):
        plot(made_up(), tmp_path / "a.pdf", "")
    with pytest.raises(OptionError, match="can't be written: No such file"):
        plot(made_up(), tmp_path / "nosuch/a.png", "")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OptionError, match=r"pip install csp-edge\[eval\]"):
        plot(made_up(), tmp_path / "a.png", "")


def logged(path, found, **header):
    with Log(path, {"log": "answers", "model": "m", "data": "d", "seed": 0} | header) as log:
        for each in found:
            log.append(asdict(each))
    return path


def test_a_page_from_logs(tmp_path):
    first = logged(tmp_path / "0.jsonl", made_up())
    second = logged(tmp_path / "1.jsonl", made_up(), seed=1)
    other = logged(tmp_path / "2.jsonl", made_up(), model="n")
    runs = read_runs([first, second, other])
    assert [run.title for run in runs] == ["m on d", "n on d"]
    # samples of another seed are others
    assert len(runs[0].answers) == 2 * len(made_up())
    text = page(runs, {"m on d": tmp_path / "plots/a.svg"}, tmp_path)
    assert "120 conversations about 2 to 2 pictures, 100 to 100 tokens, 480 answers" in text
    assert "Seeds: 0, 1." in text and "![m on d](plots/a.svg)" in text
    for title in ("first questions", "Share of the full", "Points ahead of csp", "10% by skill"):
        assert re.search(rf"^### .*{title}", text, re.MULTILINE)
    twice = report.accuracy(runs[0].answers).markdown()
    once = report.accuracy(made_up()).markdown()
    assert twice in text and twice != once


def test_later_questions_have_their_own_table(tmp_path):
    found = made_up() + [replace(a, turn=2, score=0.0) for a in made_up()]
    text = page(read_runs([logged(tmp_path / "a.jsonl", found)]), {}, tmp_path)
    later = text.partition("### Accuracy, later questions")[2].partition("###")[0]
    assert "| csp | 0.0 [" in later


def test_policies_with_settings_stand_apart(tmp_path):
    other = [replace(a, policy="csp:window=4") for a in made_up() if a.policy == "csp"]
    text = page(read_runs([logged(tmp_path / "a.jsonl", made_up() + other)]), {}, tmp_path)
    first, apart = (
        text.partition(f"### Accuracy, first questions{title}, %")[2].partition("###")[0]
        for title in ("", ", with other settings")
    )
    assert [line.split(" | ")[0] for line in first.splitlines()[4:6]] == ["| full", "| csp"]
    assert "csp:window=4" not in first and "| random |" in first
    assert "| csp:window=4 |" in apart and "| csp |" in apart and "| random |" not in apart
    plain = text.partition("with other settings")[0]
    assert "csp:window=4" not in plain


#
# the command
#


@pytest.fixture
def folder(tmp_path, monkeypatch, scenes, demo_paths):
    """Where commands run: a model, a set of MileBench's, predictions, a log."""
    for name, path in zip(("model.gguf", "mmproj.gguf"), demo_paths, strict=True):
        (tmp_path / name).symlink_to(path)
    dataset = tmp_path / "MileBench/ActionSequence"
    (dataset / "images").mkdir(parents=True)
    for scene in scenes[:2]:
        (dataset / "images" / scene.name).symlink_to(scene)
    data = [
        {
            "sample_id": i,
            "task_instruction_id": 0,
            "task_instance": {
                "context": "{image#1}{image#2}What happened?",
                "images_path": [scene.name for scene in scenes[:2]],
                "choice_list": ["It fell.", "It rose."],
            },
            "response": "It rose.",
        }
        for i in range(2)
    ]
    meta = {"task_instruction": ["Choose."]}
    (dataset / "ActionSequence.json").write_text(json.dumps({"meta_data": meta, "data": data}))
    predictions = tmp_path / "ActionSequence"
    predictions.mkdir()
    entry = {"sample_id": 0, "gt_response": "It rose.", "choice_list": ["It fell.", "It rose."]}
    told = [entry | {"pred_response": "B"}, entry | {"sample_id": 1, "pred_response": "A"}]
    (predictions / "pred.json").write_text(json.dumps(told))
    logged(tmp_path / "csp.jsonl", made_up())
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUN = "eval --samples 1 --images 1 --skills find,attribute --policies csp,random --threads 1"


def run(capsys, line):
    assert main(shlex.split(line)) == 0
    return capsys.readouterr().out


def error_of(capsys, line):
    """The one line that a failing command prints."""
    assert main(shlex.split(line)) == 1
    out, err = capsys.readouterr()
    text, end, rest = err.partition("\n")
    assert text.startswith("csp-edge: error: ") and end and not rest and not out
    return text.removeprefix("csp-edge: error: ")


def test_eval(capsys, folder):
    out = run(
        capsys, f"{RUN} --budgets 20%,30 --by skill --log a.jsonl --plot a.svg --max-tokens 6"
    )
    assert re.match(r"30 of 30 measured now, in \d+\.\d s\n", out)
    for title in ("first questions", "later questions", "Share of the full", "30 by skill"):
        assert title in out
    assert re.search(r"^csp +\d+\.\d \[", out, re.MULTILINE)
    header, entries = read_log(folder / "a.jsonl")
    assert header["data"] == "the built-in suite" and len(header["model_sha256"]) == 64
    assert len(entries) == 2 * 3 * (1 + 2 * 2)
    assert "<svg" in (folder / "a.svg").read_text()


def test_eval_goes_on_from_its_log(capsys, folder):
    run(capsys, f"{RUN} --budgets 20% --log a.jsonl --max-tokens 6")
    lines = (folder / "a.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "a.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:9])
    out = run(capsys, f"{RUN} --budgets 20% --log a.jsonl --max-tokens 6")
    assert out.startswith("12 of 18 measured now")
    clock = re.compile(rb'"seconds": [^,]+')
    again = (folder / "a.jsonl").read_bytes()
    assert clock.sub(b"", again) == clock.sub(b"", b"".join(lines))
    # one more budget: what is there stays
    out = run(capsys, f"{RUN} --budgets 20%,40% --log a.jsonl --max-tokens 6")
    assert out.startswith("12 of 30 measured now")
    assert (folder / "a.jsonl").read_bytes().startswith(again)


def test_ctrl_c_leaves_a_log_to_go_on_from(folder):
    # far more than is done before the signal
    budgets = ",".join(str(n) for n in range(20, 80))
    argv = shlex.split(f"{RUN} --log a.jsonl --budgets {budgets}")
    process = subprocess.Popen([*COMMAND, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    log = folder / "a.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert err == b"stopped: the same command goes on from a.jsonl\n"
    assert 2 <= len(read_log(log)[1]) < 2 * 3 * (1 + 2 * 60)


def test_eval_of_milebench(capsys, folder):
    out = run(
        capsys,
        "eval -m model.gguf --data MileBench --policies csp --budgets 50% --threads 1 "
        "--max-tokens 2 --log m.jsonl",
    )
    assert out.startswith("4 of 4 measured now")
    header, entries = read_log(folder / "m.jsonl")
    assert (header["data"], header["seed"]) == ("MileBench", None)
    assert [(e["dataset"], e["sample"], e["skill"]) for e in entries[::2]] == [
        ("ActionSequence", "0", "actions"),
        ("ActionSequence", "1", "actions"),
    ]
    out = run(
        capsys,
        "eval --data MileBench/ActionSequence --samples 1 --skills actions --policies full "
        "--threads 1 --max-tokens 2",
    )
    assert out.startswith("1 of 1 measured now")


def test_milebench_samples(folder):
    sets = Path("MileBench")
    assert len(milebench_samples([sets], None, None)) == 2
    assert [s.id for s in milebench_samples([sets], ["ActionSequence"], 1)] == ["0"]
    with pytest.raises(OptionError, match="no skill 'dance' there: choose of ActionSequence, act"):
        milebench_samples([sets], ["dance"], None)
    with pytest.raises(OptionError, match="'ActionSequence' stands there twice"):
        milebench_samples([sets, sets / "ActionSequence"], None, None)


def test_score(capsys, folder):
    out = run(capsys, "eval score ActionSequence/pred.json")
    assert re.search(r"^ActionSequence +choice +0\.5 +2$", out, re.MULTILINE)


def test_report(capsys, folder):
    out = run(capsys, "eval report csp.jsonl")
    assert out.startswith("# Results\n") and report.accuracy(made_up()).markdown() in out
    assert run(capsys, "eval report csp.jsonl -o r.md --plot r.png") == ""
    text = (folder / "r.md").read_text()
    assert "![m on d](r.png)" in text and (folder / "r.png").exists()


EXAMPLES = [
    line.strip()
    for text in (cli.EVAL_EXAMPLES, cli.FIDELITY_EXAMPLES, cli.SCORE_EXAMPLES, cli.REPORT_EXAMPLES)
    for line in text.splitlines()[1:]
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example, capsys, folder, monkeypatch):
    name, *argv = shlex.split(example)
    assert name == "csp-edge"
    (folder / "book.txt").write_text("It was the best of times. " * 400)
    (folder / "csp.jsonl").rename(folder / "old.jsonl")
    if "report" in argv:
        (folder / "old.jsonl").rename(folder / "csp.jsonl")
    # as quick as can be, and all the same this command line
    monkeypatch.setattr(
        "csp_edge.eval.commands.suite",
        lambda *_, **__: suite(["attribute"], n_samples=1, n_images=[1]),
    )
    monkeypatch.setattr("csp_edge.eval.run.sweep", lambda *_, **__: iter(()))
    monkeypatch.setattr("csp_edge.eval.fidelity.diverge", lambda *_, **__: iter(()))
    assert main(argv) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "fidelity", "score", "report"])
def test_help_shows_the_examples(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["eval", *command.split(), "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert f"csp-edge eval {command}".strip() in out.partition("examples:")[2]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("eval --policies best", "unknown policy 'best'"),
        ("eval --budgets 0%", "budget=0.0: give"),
        ("eval --skills dance", "unknown skill 'dance'"),
        ("eval --vendor dance", "unknown vendor 'dance'"),
        ("eval --plot a.pdf", "a.pdf: give a name that ends with .png or .svg"),
        ("eval --data nosuch", "nosuch: no MileBench set"),
        ("eval --data MileBench --images 2", "--images is of the built-in suite"),
        ("eval --data MileBench --vendor noto", "--vendor is of the built-in suite"),
        (f"{RUN} -m nosuch.gguf", "nosuch.gguf: no such file"),
        (f"{RUN} --log model.gguf", "model.gguf: .*not .*log"),
        (f"{RUN} --log csp.jsonl", "csp.jsonl: of another run, whose model is 'm'"),
        (f"{RUN} --log nosuch/a.jsonl", "nosuch/a.jsonl: No such file"),
        ("eval --seed -1", "seed=-1: give"),
        ("eval score nosuch", "nosuch: no predictions"),
        ("eval report nosuch.jsonl", "nosuch.jsonl: No such file"),
        ("eval report ActionSequence/pred.json", "pred.json: (not a log|line 1 is not of a log)"),
        ("eval report csp.jsonl -o nosuch/a.md", "nosuch/a.md: can't be written: No such file"),
        ("eval report old.jsonl", "old.jsonl: not a log of this version .*: make it anew"),
        ("eval report empty.jsonl --plot a.svg", "--plot a.svg: there are no answers"),
    ],
)
def test_bad_input(line, match, capsys, folder):
    (folder / "old.jsonl").write_text('{"log": "answers"}\n{"i": 1}\n')
    (folder / "empty.jsonl").write_text('{"log": "answers"}\n')
    assert re.search(match, error_of(capsys, line))


@pytest.mark.parametrize("argv", ["--samples 0", "--images 2,x", "--max-tokens -1", "--by luck"])
def test_usage(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["eval", *argv.split()])
    assert exit.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_tqdm(capsys, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert "pip install csp-edge[eval]" in error_of(capsys, RUN)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom csp_edge.cli import main\n"
        "try: main(['eval', '--help'])\nexcept SystemExit: pass\n"
        "print(*{'numpy', 'PIL', 'llama_cpp', 'matplotlib', 'tqdm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == ""


def test_a_statistic_that_is_undefined_in_places():
    estimate = bootstrap(report._ratio, [1.0, 0.0, 1.0], [1.0, 0.0, 0.0])
    assert estimate.value == pytest.approx(2.0) and not math.isnan(estimate.high)


@pytest.mark.parametrize(
    "change", [{"score": "x"}, {"score": 5.0}, {"budget": [1]}, {"turn": "1"}, {"n_tokens": 0.5}]
)
def test_a_log_with_a_field_of_another_kind(change, tmp_path):
    answer = Answer("d", "s", "g", "k", 1, 1, "csp", 0.1, "cat", 10, 1.0, "cat", 1, 1.0, 0.1)
    header = {"log": "answers", "model": "m", "data": "d"}
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(json.dumps(x) for x in (header, asdict(answer) | change)) + "\n")
    with pytest.raises(OptionError, match="not a log of this version"):
        read_runs([path])


def test_skills_that_no_number_of_images_asks(capsys):
    assert main(["eval", "--skills", "compare", "--images", "1", "--samples", "1"]) == 1
    assert "nothing to ask: some skills need 2 images" in capsys.readouterr().err
