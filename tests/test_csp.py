"""The hook in running models: observe, score, select, compact, decode.

Driven through llama.h and llama-csp.h, without the engine.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import csp_statement
import plain_llama
from csp_edge import native
from csp_edge.native import llama

PICTURES = Path(native.__file__).parent / "pictures"
TEXT = " ".join(
    f"The {a} {b} sees {i} {b}s." for i in range(12) for a in ("old", "red") for b in ("fox", "hen")
)


def view(pointer, *shape):
    return np.ctypeslib.as_array(pointer, shape).copy()


class Layer:
    """llama_csp_layer as arrays: of [n_head_kv] rows if those are of one length, else tuples."""

    def __init__(self, csp, i):
        stats, layer = native.csp_get_stats(csp), native.csp_get_layer(csp, i)
        heads, cells, dim = layer.n_head_kv, stats.n_cells, layer.n_embd_head_k
        self.scale = layer.kq_scale
        self.n_head_kv = heads
        self.kept = rows(view(layer.kept, heads, stats.n_kept), view(layer.n_kept, heads))
        self.sink = view(layer.sink, layer.n_head) if layer.sink else None
        if layer.q:
            n_cells = view(layer.n_cells, heads)
            self.token = rows(view(layer.token, heads, cells), n_cells)
            self.q = view(layer.q, stats.n_window, layer.n_head, dim).astype(np.float64)
            k = rows(view(layer.k, heads, cells, dim).astype(np.float64), n_cells)
            self.k = k.swapaxes(0, 1) if isinstance(k, np.ndarray) else k
            self.self = rows(view(layer.self, heads, cells), n_cells)
            self.cross = rows(view(layer.cross, heads, cells), n_cells)


def rows(array, lengths):
    heads = tuple(row[:n] for row, n in zip(array, lengths, strict=True))
    return np.stack(heads) if len(set(lengths)) == 1 else heads


class Pruned(plain_llama.Plain):
    """A plain model with the hook on its context."""

    csp = None

    def new_context(self):
        super().new_context()
        self.csp = native.csp_init(self.ctx)
        assert self.csp, native.csp_last_error()

    def observe(self, n_window):
        assert native.csp_observe(self.csp, n_window)

    def prune(self, budget, recent, ratio=None, n_score=1.0, n_decode=None, mass=False, **changes):
        params = native.csp_default_params()
        params.budget, params.recent, params.inspect = budget, recent, True
        settings = (ctypes.c_double * 2)(-1.0 if ratio is None else ratio, 0.0)
        params.policy_settings = ctypes.addressof(settings)
        params.n_score = n_score
        if n_decode is not None:
            params.sink, params.n_decode = native.SINK_FIXED, n_decode
        if mass:
            params.sink = native.SINK_MASS
        for name, value in changes.items():
            setattr(params, name, value)
        assert native.csp_prune(self.csp, params), native.csp_last_error()
        self.stats = native.csp_get_stats(self.csp)
        return [Layer(self.csp, i) for i in range(self.stats.n_layer)]

    @property
    def n_cells(self):
        # what a state holds are the cells in use
        return int(np.frombuffer(self.state()[12:16], np.uint32)[0])

    @property
    def modality(self):
        return view(self.stats.modality, self.stats.n_tokens)

    def greedy(self, logits, n):
        rows, tokens = [logits], []
        for _ in range(n):
            tokens.append(int(rows[-1].argmax()))
            rows.append(self.decode([tokens[-1]], self.n_past))
            self.n_past += 1
        return np.stack(rows), tokens

    def __del__(self):
        native.csp_free(self.csp)
        llama.llama_free(self.ctx)
        llama.llama_model_free(self.model)


def pictures(n):
    return [
        np.asarray(Image.open(PICTURES / f"scene{i + 1:02}.png").convert("RGB")) for i in range(n)
    ]


def question(n, text="What color is the star in image 2?"):
    """The prompt as the demo model's template writes it."""
    images = "".join(f" image {i + 1}:<__media__>" for i in range(n))
    return f"{images}<|user|> {text}<|assistant|>"


@pytest.fixture(params=["demo", "smollm2"])
def prompt(request, demo_paths, smollm2_path):
    """(model, mmproj, prompt, pictures)"""
    if request.param == "demo":
        model, mmproj = demo_paths
        return str(model), str(mmproj), question(4), pictures(4)
    return str(smollm2_path), "", TEXT, []


def check_scores(model, layers, n_score=1.0):
    """Scores of the last prune against the statement, from the queries and keys it saw."""
    stats = model.stats
    window_modality = view(stats.window_modality, stats.n_window)
    window_pos = view(stats.window_pos, stats.n_window)
    for layer in layers:
        pos = view(stats.pos, stats.n_tokens)[layer.token[0]]
        seen = csp_statement.visible(window_pos, pos)
        x = csp_statement.logits(layer.q, layer.k, layer.scale)
        self, cross = csp_statement.scores(
            x, seen, window_modality, model.modality[layer.token], n_score
        )
        np.testing.assert_allclose(layer.self, self, rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(layer.cross, cross, rtol=2e-4, atol=1e-6)
        yield self, cross


def check_kept(model, layers, budget, recent, ratio, n_score=1.0):
    """Every kept index of every head against the statement."""
    for layer, (self, cross) in zip(layers, check_scores(model, layers, n_score), strict=True):
        for h in range(layer.n_head_kv):
            # from the very scores: no doubt at all
            exact = csp_statement.select(
                layer.self[h].astype(np.float64),
                layer.cross[h].astype(np.float64),
                budget,
                recent,
                ratio,
            )
            assert layer.kept[h].tolist() == layer.token[h][exact].tolist()
            # from queries and keys, in float64
            stated = csp_statement.select(self[h], cross[h], budget, recent, ratio)
            assert layer.kept[h].tolist() == layer.token[h][stated].tolist()


@pytest.mark.parametrize("ratio", [None, 0.0, 0.5, 1.0])
def test_kept_equals_the_statement(prompt, ratio):
    path, mmproj, text, images = prompt
    model = Pruned(path, mmproj, "f16")
    model.observe(16)
    model.prefill(text, images)
    layers = model.prune(40, 12, ratio)
    check_kept(model, layers, 40, 12, ratio)
    assert model.n_cells == 40
    assert (model.modality == 1).sum() == 64 * len(images)


@pytest.mark.parametrize("kv_type", ["f32", "bf16", "q8_0", "q4_0"])
def test_kept_equals_the_statement_for_every_kv_type(demo_paths, kv_type):
    model = Pruned(*map(str, demo_paths), kv_type)
    model.observe(16)
    model.prefill(question(3), pictures(3))
    check_kept(model, model.prune(30, 10), 30, 10, None)


@pytest.mark.parametrize("n_score", [0.0, 1.0, 50.0])
def test_n_of_the_scoring_softmax(demo_paths, n_score):
    model = Pruned(*map(str, demo_paths), "f16")
    model.observe(16)
    model.prefill(question(2), pictures(2))
    check_kept(model, model.prune(20, 8, n_score=n_score), 20, 8, None, n_score)


def test_the_window_spans_ubatches(demo_paths, smollm2_path, monkeypatch):
    seen = []
    for n_ubatch in (512, 24):
        monkeypatch.setattr(plain_llama, "N_UBATCH", n_ubatch)
        model = Pruned(str(smollm2_path), "", "f32")
        model.observe(40)
        model.prefill(TEXT, [])
        seen.append(model.prune(60, 10)[0].q)
    assert seen[0].shape[0] == 40
    np.testing.assert_allclose(*seen, atol=2e-2)  # the ubatch decides how products are summed

    # a few text tokens after a picture, and pictures of some ubatches: the window holds both kinds
    model = Pruned(*map(str, demo_paths), "f16")
    model.observe(80)
    model.prefill(question(2, "?"), pictures(2))
    check_kept(model, model.prune(24, 4), 24, 4, None)
    modality = view(model.stats.window_modality, 80)
    assert 64 < (modality == 1).sum() < 80


def test_a_window_longer_than_the_prompt_is_the_prompt(demo_paths):
    model = Pruned(*map(str, demo_paths), "f16")
    model.observe(5000)
    model.prefill(question(1), pictures(1))
    layers = model.prune(20, 4)
    assert model.stats.n_window == model.stats.n_cells == model.n_past
    check_kept(model, layers, 20, 4, None)


def test_text_alone_is_all_self(smollm2_path):
    model = Pruned(str(smollm2_path), "", "f16")
    model.observe(8)
    model.prefill(TEXT, [])
    for layer in model.prune(50, 8):
        assert not layer.cross.any() and layer.self.sum() > 0


def run_plain(lib, tmp_path, **job):
    np.savez(tmp_path / "job.npz", **job)
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(lib), "MTMD_CPP_LIB": str(lib)}
    command = [sys.executable, plain_llama.__file__, tmp_path / "job.npz", tmp_path / "result.npz"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(np.load(tmp_path / "result.npz"))


def job_of(prompt, kv_type):
    path, mmproj, text, images = prompt
    named = {f"picture_{i}": p for i, p in enumerate(images)}
    return {"model": path, "mmproj": mmproj, "prompt": text, "kv_type": kv_type, **named}


def test_without_pruning_logits_are_those_of_the_unpatched_library(prompt, unpatched_lib, tmp_path):
    path, mmproj, text, images = prompt
    for observed in (False, True):
        model = Pruned(path, mmproj, "f16")
        if observed:
            model.observe(16)
        logits = model.prefill(text, images)
        model.observe(0)
        logits, tokens = model.greedy(logits, 8)
        plain = run_plain(unpatched_lib, tmp_path, **job_of(prompt, "f16"), tokens=tokens)
        np.testing.assert_array_equal(logits, plain["logits"])


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
def test_decoding_equals_an_oracle_that_shares_no_code(prompt, kv_type, unpatched_lib, tmp_path):
    path, mmproj, text, images = prompt
    model = Pruned(path, mmproj, kv_type)
    model.observe(16)
    logits = model.prefill(text, images)
    layers = model.prune(48, 12)
    model.observe(0)
    logits, tokens = model.greedy(logits, 32)

    kept = {f"kept_{i}": layer.kept for i, layer in enumerate(layers)}
    plain = run_plain(unpatched_lib, tmp_path, **job_of(prompt, kv_type), **kept, n_decode=32)
    assert tokens == plain["tokens"].tolist()
    np.testing.assert_allclose(logits, plain["logits"], atol=1e-3)
    full = run_plain(unpatched_lib, tmp_path, **job_of(prompt, kv_type), tokens=tokens)
    assert np.abs(logits - full["logits"]).max() > 0.1  # and pruning did change something


def test_compaction_of_quantized_rows_changes_no_bit(demo_paths):
    for kv_type in ("q8_0", "q4_0", "bf16", "f16"):
        model = Pruned(*map(str, demo_paths), kv_type)
        model.observe(16)
        model.prefill(question(3), pictures(3))
        before = model.state()
        layers = model.prune(40, 8)
        gathered = plain_llama.gather(before, [layer.kept for layer in layers])
        after = model.state()
        n = 16 + 40 * 12  # positions differ, rows may not
        assert after[n:] == gathered[n:]


def test_a_sink_of_n_is_n_cells_of_zeros(demo_paths, unpatched_lib, tmp_path):
    """exp(q . 0) = 1 and a value of 0: what softmax_n adds to the denominator."""
    model = Pruned(*map(str, demo_paths), "f32")
    model.observe(16)
    text, images = question(4), pictures(4)
    logits = model.prefill(text, images)
    layers = model.prune(40, 12, n_decode=1900.0)
    np.testing.assert_allclose(layers[0].sink, np.log(1900), rtol=1e-6)
    logits, tokens = model.greedy(logits, 6)

    prompt = (*map(str, demo_paths), text, images)
    kept = {f"kept_{i}": layer.kept for i, layer in enumerate(layers)}
    runs = [
        run_plain(unpatched_lib, tmp_path, **job_of(prompt, "f32"), **kept, n_decode=6, n_zero=n)
        for n in (1900, 0)
    ]
    assert tokens == runs[0]["tokens"].tolist()
    # values are summed up in f16, and here in another order
    assert np.abs(logits - runs[0]["logits"]).max() < 0.05
    assert np.abs(logits - runs[1]["logits"])[:2].max() > 0.25  # before tokens may part


def test_the_mass_of_the_evicted_cells(demo_paths):
    model = Pruned(*map(str, demo_paths), "f16")
    model.observe(16)
    logits = model.prefill(question(3), pictures(3))
    layers = model.prune(30, 10, mass=True)
    stats = model.stats
    window_pos, pos = view(stats.window_pos, stats.n_window), view(stats.pos, stats.n_tokens)
    for layer in layers:
        x = csp_statement.logits(layer.q, layer.k, layer.scale)
        mass = csp_statement.evicted_mass(
            x, csp_statement.visible(window_pos, pos), layer.kept.tolist(), layer.n_head_kv
        )
        np.testing.assert_allclose(layer.sink, mass, rtol=1e-3, atol=1e-3)

    # it is seen by attention, and gone with the sequence
    token = int(logits.argmax())
    with_mass = model.decode([token], model.n_past)
    llama.llama_memory_clear(llama.llama_get_memory(model.ctx), False)
    model.observe(16)
    np.testing.assert_array_equal(model.prefill(question(3), pictures(3)), logits)
    model.prune(30, 10)
    assert np.abs(model.decode([token], model.n_past) - with_mass).max() > 1e-3


def test_sinks_go_with_the_sequence_they_stand_for(demo_paths):
    model = Pruned(*map(str, demo_paths), "f16")
    model.observe(16)
    logits = model.prefill(question(3), pictures(3))
    model.prune(30, 10, n_decode=100.0)
    model.observe(0)
    model.greedy(logits, 2)
    memory = llama.llama_get_memory(model.ctx)
    llama.llama_memory_clear(memory, False)
    # of the same shape as the last ubatch: its graph, with the sinks in it, could be used again
    token = [int(logits.argmax())]
    alone = Pruned(*map(str, demo_paths), "f16").decode(token, 0)
    np.testing.assert_array_equal(model.decode(token, 0), alone)
    llama.llama_memory_clear(memory, False)
    np.testing.assert_array_equal(model.prefill(question(3), pictures(3)), logits)


def test_a_budget_beyond_the_prompt_changes_nothing(demo_paths):
    runs = []
    for prune in (False, True):
        model = Pruned(*map(str, demo_paths), "f16")
        model.observe(16)
        logits = model.prefill(question(2), pictures(2))
        if prune:
            layers = model.prune(1000, 1000)
            assert layers[0].kept.tolist() == [[*range(model.n_past)]] * 2
        runs.append(model.greedy(logits, 5)[0])
    np.testing.assert_array_equal(*runs)


def append(model, text):
    """One more turn of text."""
    tokens = (llama.llama_token * 500)()
    n = llama.llama_tokenize(
        model.vocab, text.encode(), len(text.encode()), tokens, 500, False, True
    )
    logits = model.decode(tokens[:n], model.n_past)
    model.n_past += n
    return logits


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_a_second_turn_is_pruned_again(demo_paths, kv_type):
    model = Pruned(*map(str, demo_paths), kv_type)
    model.observe(16)
    logits = model.prefill(question(4), pictures(4))
    first = model.prune(60, 12)
    n_first = model.stats.n_tokens
    keys = [layer.k for layer in first]  # of every token so far
    model.observe(0)
    _, tokens = model.greedy(logits, 2)

    model.observe(16)
    append(model, "<|user|> What is in image 3?<|assistant|>")
    second = model.prune(50, 14)
    n_tokens = model.stats.n_tokens
    assert n_tokens == model.n_past and model.stats.n_cells == 60 + n_tokens - n_first
    assert model.n_cells == 50
    assert (model.modality == 1).sum() == 64 * 4

    for layer, before, k in zip(second, first, keys, strict=True):
        for h in range(layer.n_head_kv):
            # what scoring saw: the kept cells of the first turn, then the new ones
            assert layer.token[h].tolist() == [*before.kept[h], *range(n_first, n_tokens)]
            # and their keys are still where the index says
            np.testing.assert_array_equal(layer.k[:60, h], k[before.kept[h], h])
            assert layer.kept[h][-14:].tolist() == [*range(n_tokens - 14, n_tokens)]
    check_kept_again(model, second, 50, 14)

    # a third one, with recent cells that reach into the pruned part
    model.observe(16)
    append(model, "<|user|> What")
    third = model.prune(40, 30)
    assert third[0].kept.shape == (2, 40)
    check_kept_again(model, third, 40, 30)


def check_kept_again(model, layers, budget, recent):
    """Kept cells of a sequence that was pruned before: heads hold different tokens."""
    stats = model.stats
    window_modality = view(stats.window_modality, stats.n_window)
    window_pos, pos = view(stats.window_pos, stats.n_window), view(stats.pos, stats.n_tokens)
    for layer in layers:
        x = csp_statement.logits(layer.q, layer.k, layer.scale)
        for h in range(layer.n_head_kv):
            seen = csp_statement.visible(window_pos, pos[layer.token[h]])
            self, cross = csp_statement.scores(
                x, seen, window_modality, model.modality[layer.token], 1.0
            )
            chosen = csp_statement.select(self[h], cross[h], budget, recent, None)
            assert layer.kept[h].tolist() == layer.token[h][chosen].tolist()


def test_pruning_again_goes_by_the_queries_since(demo_paths):
    """Those from before saw cells that are gone, and chosen cells would be ahead of them."""
    model = Pruned(*map(str, demo_paths), "f16")
    model.observe(32)
    logits = model.prefill(question(4), pictures(4))
    model.prune(60, 4)
    n_past = model.n_past
    model.greedy(logits, 3)
    layers = model.prune(50, 4)
    window_pos = view(model.stats.window_pos, model.stats.n_window)
    assert window_pos.tolist() == [*range(n_past - 4, n_past + 3)]
    check_kept_again(model, layers, 50, 4)


def test_a_prune_that_fails_leaves_the_cache_as_it_was(demo_paths):
    model = Pruned(*map(str, demo_paths), "f16")
    model.observe(16)
    logits = model.prefill(question(3), pictures(3))
    before = model.state()
    params = native.csp_default_params()
    params.budget, params.recent, params.inspect = 30, 10, True

    abort = llama.ggml_abort_callback(lambda _: True)
    llama.llama_set_abort_callback(model.ctx, abort, None)
    assert not native.csp_prune(model.csp, params)
    assert b"aborted" in native.csp_last_error()
    llama.llama_set_abort_callback(model.ctx, llama.ggml_abort_callback(), None)
    assert not native.csp_get_layer(model.csp, 0).q
    assert native.csp_get_stats(model.csp).n_cells == 0
    assert model.state() == before
    check_kept(model, model.prune(30, 10), 30, 10, None)
    model.greedy(logits, 2)


def test_shifted_positions_are_refused(demo_paths):
    model = Pruned(*map(str, demo_paths), "f16")
    model.observe(16)
    model.prefill(question(1), pictures(1))
    llama.llama_memory_seq_add(llama.llama_get_memory(model.ctx), 0, 0, -1, 5)
    params = native.csp_default_params()
    params.budget = 10
    assert not native.csp_prune(model.csp, params)
    assert b"positions were shifted" in native.csp_last_error()


def test_a_new_sequence_starts_a_new_index(demo_paths):
    model = Pruned(*map(str, demo_paths), "f16")
    for n, budget, recent in ((4, 60, 12), (2, 20, 20), (3, 30, 0), (1, 1, 1), (1, 10, 5)):
        llama.llama_memory_clear(llama.llama_get_memory(model.ctx), False)
        model.observe(16)
        model.prefill(question(n), pictures(n))
        layers = model.prune(budget, recent)
        assert model.stats.n_tokens == model.stats.n_cells == model.n_past
        check_kept(model, layers, budget, recent, None)


def test_the_last_token_can_be_decoded_again(demo_paths):
    """The protocol that measures pruning: the answer's first token sees the pruned cache too."""
    model = Pruned(*map(str, demo_paths), "f16")
    model.observe(16)
    full = model.prefill(question(4), pictures(4))
    model.prune(40, 12)
    last = model.n_past - 1
    assert llama.llama_memory_seq_rm(llama.llama_get_memory(model.ctx), 0, last, -1)
    token = (llama.llama_token * 8)()
    assert llama.llama_tokenize(model.vocab, b"<|assistant|>", 13, token, 8, False, True) == 1
    logits = model.decode([token[0]], last)
    assert model.n_cells == 40
    assert np.abs(logits - full).max() > 0

    # the index went along
    model.observe(4)
    append(model, "<|user|> What")
    model.prune(38, 10)
    assert model.stats.n_tokens == model.n_past
    assert (model.modality == 1).sum() == 64 * 4


def test_keys_keep_their_positions_and_decoding_goes_on_at_the_next_one(demo_paths):
    model = Pruned(*map(str, demo_paths), "f16")
    for recent in (12, 0):
        llama.llama_memory_clear(llama.llama_get_memory(model.ctx), False)
        model.observe(16)
        logits = model.prefill(question(4), pictures(4))
        model.prune(40, recent)
        memory = llama.llama_get_memory(model.ctx)
        assert llama.llama_memory_seq_pos_max(memory, 0) == model.n_past - 1
        model.greedy(logits, 1)  # llama_decode() refuses a position that does not follow


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "budget = 0"),
        ({"recent": 41}, "recent = 41"),
        ({"n_score": -1}, "n_score = -1"),
        ({"n_score": float("inf")}, "n_score = inf"),
        ({"sink": native.SINK_FIXED, "n_decode": 0}, "n_decode = 0"),
        ({"sink": native.SINK_FIXED, "n_decode": float("nan")}, "n_decode = nan"),
        ({"sink": 7}, "sink = 7"),
    ],
)
def test_a_wrong_setting_changes_nothing(demo_paths, change, message):
    model = Pruned(*map(str, demo_paths), "f16")
    model.observe(16)
    logits = model.prefill(question(2), pictures(2))
    params = native.csp_default_params()
    params.budget, params.recent = 40, 8
    for name, value in change.items():
        setattr(params, name, value)
    before = model.state()
    assert not native.csp_prune(model.csp, params)
    assert message in native.csp_last_error().decode()
    assert model.state() == before
    model.prune(40, 8)
    model.greedy(logits, 2)


def test_nothing_observed_is_said(demo_paths):
    model = Pruned(*map(str, demo_paths), "f16")
    params = native.csp_default_params()
    params.budget = 10
    assert not native.csp_prune(model.csp, params)
    assert b"the cache is empty" in native.csp_last_error()
    model.prefill(question(1), pictures(1))
    assert not native.csp_prune(model.csp, params)
    assert b"no query was observed" in native.csp_last_error()
    assert native.csp_observe(model.csp, 2**31)  # no more than there are cells
    assert not native.csp_prune(model.csp, params)
    assert b"no query was observed" in native.csp_last_error()
    model.observe(8)
    model.greedy(append(model, "<|user|> What"), 2)
    model.prune(10, 5)


def test_a_context_takes_one_hook(demo_paths):
    model = Pruned(*map(str, demo_paths), "f16")
    assert not native.csp_init(model.ctx)
    assert b"already" in native.csp_last_error()
