"""Recall: what was evicted comes back when a question needs it."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny_models
from csp_edge import CSP, EdgeVLM
from csp_edge.engine import Engine
from csp_edge.errors import CspEdgeError, MemoryLimitError, OptionError, PromptError
from csp_edge.native import llama
from csp_edge.policies import AdaKV, LookM, Pyramid, Resolved, SnapKV
from test_csp_engine import engine_on, greedy, prefill, tokenize

QUESTION = "What is in image 3?"


@pytest.fixture(params=["memory", "file"])
def kept_in(request, tmp_path):
    """Where evicted cells are: options of an engine."""
    return {"recall_folder": None if request.param == "memory" else str(tmp_path)}


def probe(engine, text=QUESTION):
    """Observe a question that does not stay."""
    tokens = [t for t in engine.tokenizer.tokenize([text]).items if isinstance(t, int)]
    engine.observe(len(tokens))
    engine._hook.probe(tokens, range(engine.n_past, engine.n_past + len(tokens)))


def recall(engine, policy, amounts):
    pruning = engine._hook.recall(policy, Resolved(*amounts))
    engine._set_pruned(pruning, amounts[0])
    return pruning


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("policy", [CSP(40, sink="mass"), AdaKV(40), LookM(40)])
def test_all_of_it_can_come_back(demo_paths, kv_type, policy, kept_in):
    engine = engine_on(demo_paths, kv_type=kv_type, recall=kv_type, **kept_in)
    prefill(engine)
    engine.redecode()
    full, n = greedy(engine, 6), engine.n_tokens
    engine.clear()
    prefill(engine)
    engine.prune(policy)
    assert engine.n_cells < n / 2
    engine.cut(len(engine.items) - 1)  # of the recent ones
    probe(engine)
    engine._resize(n)
    pruning = recall(engine, CSP(n), (n, 8, 0))
    assert pruning.n_kept == pruning.n_tokens == engine.n_tokens == engine.n_cells
    for layer in pruning.layers:
        for head in layer.kept:
            np.testing.assert_array_equal(head, range(engine.n_tokens))
    engine.decode(last(engine))
    np.testing.assert_array_equal(greedy(engine, 6), full)
    engine.close()


def last(engine):
    """The token that the prompt of prefill() ends with."""
    with tokenize(engine, 3) as prompt:
        return prompt.items[-1]


@pytest.mark.parametrize(
    "policy", [CSP(40), CSP(40, distance=0, cross_ratio=0.5), SnapKV(40), AdaKV(40), Pyramid(40)]
)
def test_the_choice_is_that_of_a_cache_that_was_never_pruned(demo_paths, policy, kept_in):
    engine = engine_on(demo_paths, kv_type="f32", recall="f32", **kept_in)
    prefill(engine)
    n = engine.n_tokens
    probe(engine)
    expected = engine._hook.prune(policy, Resolved(40, 8, 4), inspect=True)

    engine.clear()
    prefill(engine)
    engine.prune(CSP(30))
    # all of it first, so that the question sees what it saw before
    probe(engine)
    engine._resize(n)
    recall(engine, CSP(n), (n, 8, 0))
    probe(engine)
    found = engine._hook.recall(policy, Resolved(40, 8, 4), inspect=True)

    assert found.n_cells == expected.n_cells == n
    assert found.n_kept == expected.n_kept < n
    for a, b in zip(expected.layers, found.layers, strict=True):
        for h in range(len(a.kept)):
            np.testing.assert_allclose(b.self_[h], a.self_[h], rtol=1e-4, atol=1e-7)
            np.testing.assert_allclose(b.cross[h], a.cross[h], rtol=1e-4, atol=1e-7)
            np.testing.assert_array_equal(b.token[h], range(n))
            # float32 here, float64 there: a near tie may fall the other way
            assert len(np.setdiff1d(a.kept[h], b.kept[h])) <= 1
            assert len(a.kept[h]) == len(b.kept[h])
    engine.close()


def test_sinks_stand_for_what_is_still_gone(demo_paths):
    policy = CSP(40, sink="mass", distance=0)
    engine = engine_on(demo_paths, kv_type="f32", recall="f32")
    prefill(engine)
    n = engine.n_tokens
    probe(engine)
    expected = engine._hook.prune(policy, Resolved(40, 8, 4))
    engine.clear()
    prefill(engine)
    engine.prune(policy)
    probe(engine)
    engine._resize(n)
    recall(engine, CSP(n), (n, 8, 0))
    probe(engine)
    found = engine._hook.recall(policy, Resolved(40, 8, 4))
    for a, b in zip(expected.layers, found.layers, strict=True):
        np.testing.assert_allclose(b.sink, a.sink, atol=0.05)
    engine.close()


def test_a_question_about_what_was_evicted(scenes):
    star, others = "What color is the star in image 2?", "What is in image 4?"
    content = [{"type": "image", "image": picture} for picture in scenes]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": star}]}]
    shares = {}
    for recall_type in (False, True, "q8_0"):
        with EdgeVLM.demo(cache=CSP(0.1), recall=recall_type, n_threads=1) as vlm:
            first = vlm.chat(messages)
            assert vlm.engine.encoder.n_encoded == len(scenes)
            again = [
                *messages,
                {"role": "assistant", "content": first.text},
                {"role": "user", "content": others},
            ]
            second = vlm.chat(again)
            assert vlm.engine.encoder.n_encoded == len(scenes)
            assert second.usage.cached_tokens > 64 * len(scenes)
            # as many cells as without
            assert vlm.engine.n_cells <= 0.1 * vlm.engine.n_tokens + 32
            shares[recall_type] = second.cache.patches()[3].sum()
    # the picture that the second question is about
    assert shares[True] > 1.2 * shares[False]
    assert shares["q8_0"] > 1.2 * shares[False]


def test_a_recall_is_part_of_a_snapshot(demo_paths, kept_in):
    engine = engine_on(demo_paths, recall="f16", **kept_in)
    prefill(engine)
    engine.prune(CSP(40))
    greedy(engine, 3)
    snapshot = engine.snapshot()
    data = bytearray()
    snapshot.cache.write(data.extend)

    def go_on():
        probe(engine)
        pruning = recall(engine, CSP(60), (60, 8, 4))
        engine.decode(last(engine))
        return pruning, greedy(engine, 2)

    once, logits = go_on()
    # what takes the place of the evicted cells leaves those of the snapshot alone
    engine.clear()
    prefill(engine, 6)
    engine.prune(CSP(40))
    again = bytearray()
    snapshot.cache.write(again.extend)
    assert again == data
    engine.restore(snapshot)
    again, same = go_on()
    for a, b in zip(once.layers, again.layers, strict=True):
        np.testing.assert_array_equal(np.stack(a.kept), np.stack(b.kept))
    np.testing.assert_array_equal(logits, same)
    engine.close()


def open_files(folder):
    return [
        os.path.realpath(link)
        for link in Path("/proc/self/fd").iterdir()
        if os.path.realpath(link).startswith(str(folder))
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_file_is_gone_with_the_engine(demo_paths, tmp_path):
    engine = engine_on(demo_paths, recall="f16", recall_folder=str(tmp_path))
    prefill(engine)
    engine.prune(CSP(40))
    assert not list(tmp_path.iterdir())
    assert len(open_files(tmp_path)) == 1
    snapshot = engine.snapshot()
    engine.close()
    # the snapshot's cells are in it
    assert len(open_files(tmp_path)) == 1
    del snapshot
    assert not open_files(tmp_path)


def test_a_disk_that_is_full(demo_paths, tmp_path):
    resource = pytest.importorskip("resource")
    engine = engine_on(demo_paths, recall="f16", recall_folder=str(tmp_path))
    prefill(engine)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, old[1]))
    try:
        with pytest.raises(CspEdgeError, match="file of evicted cells can't be .*: File too large"):
            engine.prune(CSP(40))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert engine.n_tokens == 0
    prefill(engine)
    engine.prune(CSP(40))
    probe(engine)
    assert recall(engine, CSP(40), (40, 8, 4)).n_kept == 40
    engine.close()


def test_a_folder_that_is_none(demo_paths, tmp_path, monkeypatch):
    folder = tmp_path / "none"
    with pytest.raises(MemoryLimitError, match=f"in {folder}: No such file.*let TMPDIR name"):
        engine_on(demo_paths, recall="f16", recall_folder=str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    with pytest.raises(MemoryLimitError, match="let TMPDIR name"):
        EdgeVLM.demo(memory="16GiB", recall=True)
    # it is there alone that recall needs one
    EdgeVLM.demo(memory="16GiB").close()
    EdgeVLM.demo(recall=True).close()


def test_a_file_takes_no_more_tokens_than_were_planned_for(demo_paths, tmp_path):
    options = {"recall": "f16", "max_cells": 256}
    for folder, most in (None, 4096), (str(tmp_path), 512):
        engine = engine_on(demo_paths, recall_folder=folder, **options)
        policy = CSP(0.3)
        assert engine._n_pos_max == 4096
        engine.prefill(engine.tokenizer.tokenize(["a b " * 50]), window=8, policy=policy)
        assert engine.room == most - engine.n_tokens
        longer = engine.tokenizer.tokenize(["a b " * 400])
        assert longer.n_tokens > 512
        if folder is None:
            engine.prefill(longer, window=8, policy=policy)
        else:
            with pytest.raises(PromptError, match="beyond the context of 512"):
                engine.prefill(longer, window=8, policy=policy)
        engine.close()


@pytest.mark.parametrize("name", ["gemma2", "qwen2vl"])
def test_other_architectures(name, demo_paths, tmp_path):
    path = tmp_path / "tiny.gguf"
    getattr(tiny_models, name)(path, demo_paths[0])
    engine = Engine(path, n_threads=1, prune=True, recall="f16", max_cells=256)
    policy = CSP(0.3)
    text = "What is in image 2? " * 20
    for i in range(3):
        prompt = engine.tokenizer.tokenize([text * (i + 1) + QUESTION])
        engine.prefill(prompt, window=policy.resolve(prompt.n_tokens).window, policy=policy)
        engine.prune(policy)
        assert np.isfinite(greedy(engine, 12)).all()
        assert engine.n_cells <= 256
        assert engine.n_tokens == engine.n_past > prompt.n_tokens
    engine.close()


def test_what_cannot_be_kept(demo_paths, tmp_path):
    with pytest.raises(OptionError, match="recall='q5': choose one of f32"):
        engine_on(demo_paths, recall="q5")
    with pytest.raises(OptionError, match="recall"):
        EdgeVLM.demo(recall="yes")
    with pytest.raises(OptionError, match="recall"):
        EdgeVLM.demo(recall=["f16"])
    engine, forgetful = engine_on(demo_paths, recall="f16"), engine_on(demo_paths)
    # of ggml's types: one that is no more, one that needs a matrix of weights, and none at all
    for kv_type in (4, 16, 99, -1):
        with pytest.raises(OptionError, match=f"can't be kept as type {kv_type}"):
            forgetful._hook.keep_evicted(kv_type)
    prefill(forgetful)
    forgetful.prune(CSP(40))
    with pytest.raises(CspEdgeError, match="another kind of context"):
        engine.restore(forgetful.snapshot())
    # nothing to choose by, and nothing that fits
    prefill(engine, 6)
    engine.prune(CSP(40))
    engine._hook.resize(256)
    engine.observe(0)
    with pytest.raises(CspEdgeError, match="no query was observed"):
        engine._hook.recall(CSP(40), Resolved(40, 8, 4))
    probe(forgetful)
    with pytest.raises(CspEdgeError, match="is not kept"):
        forgetful._hook.recall(CSP(40), Resolved(40, 8, 4))
    assert engine.n_cells == 40
    engine.decode(last(engine))
    engine.close()
    forgetful.close()


def test_the_cache_grows_for_what_comes_back(demo_paths):
    engine = engine_on(demo_paths, recall="f16")
    prefill(engine, 6)
    engine.prune(CSP(40))
    engine._hook.resize(256)
    probe(engine)
    n = engine.n_tokens
    assert recall(engine, CSP(40), (10_000, 8, 4)).n_kept == n > 256
    # and nothing is evicted, nothing to come back
    probe(engine)
    assert recall(engine, CSP(40), (n + 8, 8, n + 8)).n_kept == n
    engine.decode(last(engine))
    assert np.isfinite(greedy(engine, 2)).all()
    engine.close()


def test_a_snapshot_without_an_archive(demo_paths):
    engine = engine_on(demo_paths)
    prefill(engine)
    snapshot = engine.snapshot()
    engine._hook.keep_evicted(1)
    with pytest.raises(CspEdgeError, match="holds nothing of what was evicted"):
        engine.restore(snapshot)
    engine.close()


@pytest.mark.parametrize("policy", [AdaKV(0.1), Pyramid(0.1)])
def test_heads_that_keep_differently_many_keep_to_the_budget(policy, scenes):
    with EdgeVLM.demo(cache=policy, recall=True, n_threads=1) as vlm:
        vlm.chat("What is in image 3?", images=scenes, max_tokens=1)
        cells = []
        for _ in range(24):
            vlm.engine.decode(vlm.engine.items[-1])
            cells.append(vlm.engine.n_cells)
        # shares of heads vary, their sum does not
        assert max(cells) < 1.5 * cells[0]
        vlm.reset()
        vlm.chat("What is in image 3?", images=scenes)
        again = vlm.chat([*vlm.messages, {"role": "user", "content": "What is in image 4?"}])
        assert again.usage.cached_tokens > 64 * len(scenes)


def test_an_answer_that_was_cut_off_is_not_read_anew(scenes):
    with EdgeVLM.demo(cache=CSP(0.2), recall=True, n_threads=1) as vlm:
        whole = vlm.chat(QUESTION, images=scenes).text
        vlm.reset()
        # of several tokens: those before its last one are in the cache, and not in the answer
        stop = "cross, orange"
        first = vlm.chat(QUESTION, images=scenes, stop=stop)
        assert first.text == whole[: whole.index(stop)]
        again = vlm.chat([*vlm.messages, {"role": "user", "content": QUESTION}])
        assert again.usage.cached_tokens > 64 * len(scenes)


def test_recalls_are_the_rarer_the_longer_the_answer(scenes, monkeypatch):
    with EdgeVLM.demo(cache=CSP(0.2), recall=True, n_threads=1) as vlm:
        engine, counts = vlm.engine, []
        vlm.chat("What is in image 1?", images=scenes, max_tokens=1)
        recall_once, n = engine._hook.recall, engine.n_tokens
        monkeypatch.setattr(
            engine._hook, "recall", lambda *a: counts.append(engine.n_tokens - n) or recall_once(*a)
        )
        for _ in range(100):
            engine.decode(last(engine))
        assert counts[:18] == [*range(1, 16), 17, 19, 21]
        # every one of the 8 observed queries has its say
        assert set(np.diff(counts[-3:])) == {8}


def test_a_recall_that_fails_leaves_a_conversation_to_go_on(scenes, monkeypatch):
    with EdgeVLM.demo(cache=CSP(0.2), recall=True, n_threads=1) as vlm:
        vlm.chat("What is in image 1?", images=scenes, max_tokens=4)
        question = [*vlm.messages, {"role": "user", "content": QUESTION}]
        engine = vlm.engine

        def fail(*_):
            # as where there is no memory to write what comes back
            llama.llama_memory_clear(engine._memory, False)
            raise CspEdgeError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(engine._hook, "recall", fail)
            with pytest.raises(CspEdgeError, match="no memory"):
                vlm.chat(question)
        assert vlm.chat(question, max_tokens=4).usage.cached_tokens == 0
