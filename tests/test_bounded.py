"""Prompts and answers of any length in a cache that never holds more than max_cells."""

import ctypes
import itertools

import numpy as np
import pytest

import csp_statement
import tiny_models
from csp_edge import CSP, EdgeVLM, Full
from csp_edge.engine import Engine
from csp_edge.errors import MemoryLimitError, ModelError, OptionError, PolicyError
from csp_edge.images import Pictures
from csp_edge.native import llama
from csp_edge.policies import AdaKV, LookM, SnapKV, Streaming
from test_csp_engine import greedy, tokenize

MAX_CELLS = 256
POLICY = CSP(60, window=8, recent=8, distance=0)
COLOR = "What color is the star in image 2?"


def state(engine):
    """The cells in use, with all that is in them."""
    size = llama.llama_state_seq_get_size(engine._ctx, 0)
    data = (ctypes.c_uint8 * size)()
    assert llama.llama_state_seq_get_data(engine._ctx, data, size, 0) == size
    return bytes(data)


def n_used(engine):
    return int(np.frombuffer(state(engine)[12:16], np.uint32)[0])


class Bounded(Engine):
    """Sees to it that the bound holds, and keeps what prunings saw."""

    def __init__(self, *args, **options):
        super().__init__(*args, n_threads=1, **options)
        self.prunings = []
        self.most = 0
        prune = self._hook.prune

        def inspected(policy, amounts, *, inspect=False):
            self.prunings.append(prune(policy, amounts, inspect=True))
            return self.prunings[-1]

        self._hook.prune = inspected

    def _check_bound(self):
        assert n_used(self) == self.n_cells <= self.max_cells
        assert self.n_cells_max <= self.max_cells
        self.most = max(self.most, self.n_cells)

    def _decode_text(self, tokens, *, want_logits):
        super()._decode_text(tokens, want_logits=want_logits)
        self._check_bound()

    def _decode_picture(self, handle, item, embedding):
        super()._decode_picture(handle, item, embedding)
        self._check_bound()


@pytest.fixture(scope="module", params=[True, False], ids=["probe", "no-probe"])
def engines(request, demo_paths):
    engine = Bounded(*demo_paths, max_cells=MAX_CELLS, probe=request.param)
    yield engine
    engine.close()


@pytest.fixture
def engine(engines):
    engines.clear()
    engines.prunings.clear()
    engines.most = 0
    yield engines


@pytest.fixture
def probing(demo_paths):
    engine = Bounded(*demo_paths, max_cells=MAX_CELLS)
    yield engine
    engine.close()


@pytest.fixture
def tiny(request, demo_paths, tmp_path):
    """The files of a model, and the parts of a prompt of some 1000 tokens for it."""
    path, mmproj = tmp_path / "tiny.gguf", None
    getattr(tiny_models, request.param)(path, demo_paths[0])
    text = "What is in image 2? "
    parts = [text * 150]
    if request.param == "qwen2vl":
        mmproj = tmp_path / "mmproj.gguf"
        tiny_models.qwen2vl_projector(mmproj)
        rng = np.random.default_rng(0)
        pictures = [rng.integers(0, 256, (48, 64 + i, 3), dtype=np.uint8) for i in range(20)]
        parts = [*(x for p in Pictures().open(pictures) for x in (p, text)), text]
    return (path, mmproj), parts


@pytest.mark.parametrize("n_pictures", [3, 4, 8, 12])
@pytest.mark.parametrize("policy", [POLICY, CSP(0.2, sink="mass"), Streaming(60), LookM(60)])
def test_many_pictures_in_few_cells(engine, n_pictures, policy):
    with tokenize(engine, n_pictures) as prompt:
        prefill = engine.prefill(prompt, window=8, policy=policy)
        n_tokens = prompt.n_tokens
    assert prefill.n_cells == prefill.n_decoded == engine.n_tokens == engine.n_past == n_tokens
    assert MAX_CELLS // 2 < engine.n_cells <= MAX_CELLS and engine.most > MAX_CELLS * 3 // 4
    assert (not engine.prunings) == (n_tokens <= MAX_CELLS)
    engine.prune(policy)
    engine.redecode()
    assert np.isfinite(greedy(engine, 20)).all()
    assert engine.n_past == n_tokens + 20


def check(pruning, recent):
    """One pruning against the statement. All that it pruned stands before its queries."""
    assert pruning.pos.max() < pruning.window_pos.min()
    for layer in pruning.layers:
        n_head = layer.q.shape[1]
        n_group = n_head // len(layer.kept)
        for h, token in enumerate(layer.token):
            q = layer.q[:, h * n_group : (h + 1) * n_group].astype(float)
            x = csp_statement.logits(q, layer.k[h][:, None].astype(float), layer.kq_scale)
            seen = np.ones((len(q), len(token)), dtype=bool)
            modality = pruning.modality[token]
            (self,), (cross,) = csp_statement.scores(
                x, seen, pruning.window_modality, modality[None], 1.0
            )
            np.testing.assert_allclose(layer.self_[h], self, rtol=2e-3, atol=1e-5)
            np.testing.assert_allclose(layer.cross[h], cross, rtol=2e-3, atol=1e-5)
            # by the scores as they are: where they are equal, the lower index
            expected = csp_statement.select(
                layer.self_[h], layer.cross[h], pruning.n_kept, recent, None
            )
            assert layer.kept[h].tolist() == token[expected].tolist()


def test_every_pruning_is_by_the_question(probing):
    with tokenize(probing, 8) as prompt:
        probing.prefill(prompt, window=8, policy=POLICY)
        window = [*range(prompt.n_tokens - 8, prompt.n_tokens)]
        n_question = [isinstance(item, int) for item in prompt.items[::-1]].index(False)
    assert len(probing.prunings) > 3
    for pruning in probing.prunings:
        assert pruning.window_pos.tolist() == window
        assert not pruning.window_modality.any()
        # room for a picture and the question, or for the words between two
        assert pruning.n_kept in (MAX_CELLS - 64 - n_question, MAX_CELLS - 32)
        check(pruning, 0)
    # each time it is asked with what was read since in sight
    first, second = (pruning.layers for pruning in probing.prunings[:2])
    np.testing.assert_allclose(first[0].q, second[0].q, rtol=1e-2, atol=1e-2)
    assert np.abs(first[-1].q - second[-1].q).max() > 0.1
    # the last one is by the question itself
    engine = probing
    n_before = len(engine.prunings)
    engine.prune(POLICY)
    assert engine.prunings[n_before].n_kept == 60
    assert engine.prunings[n_before].n_recent == 8


@pytest.mark.parametrize("n_swa", [0, 64])
def test_a_sliding_window_is_asked_once(probing, monkeypatch, n_swa):
    """Asked ahead again, the question would take the place of cells that are still in sight."""
    calls = []
    ask = probing._ask_ahead
    monkeypatch.setattr(probing, "_ask_ahead", lambda *args: (calls.append(args), ask(*args)))
    monkeypatch.setattr(probing, "_n_swa", n_swa)
    with tokenize(probing, 8) as prompt:
        probing.prefill(prompt, window=8, policy=POLICY)
    assert len(probing.prunings) > 3
    assert len(calls) == (1 if n_swa else 1 + len(probing.prunings))


def test_without_probing_by_what_came_last(demo_paths):
    engine = Bounded(*demo_paths, max_cells=MAX_CELLS, probe=False)
    with tokenize(engine, 8) as prompt:
        engine.prefill(prompt, window=8, policy=POLICY)
    for pruning in engine.prunings:
        n = pruning.n_tokens
        assert pruning.window_pos.tolist() == [*range(n - 8, n)]
        assert pruning.n_recent == 8 and pruning.n_kept in (MAX_CELLS - 64, MAX_CELLS - 32)
    engine.close()


def test_the_queries_of_a_probe_are_those_of_the_prompt(demo_paths):
    """Text alone: nothing is missing when it is probed, so they are the same to the last bit."""
    engine = Engine(*demo_paths, n_ctx=1024, n_ubatch=128, n_threads=1, prune=True)
    with engine.tokenizer.tokenize([f"<|user|> {COLOR}" * 20]) as prompt:
        assert 128 < prompt.n_tokens < 1024
        engine.prefill(prompt, window=12)
        logits = engine.logits.copy()
        observed = engine.prune(POLICY, inspect=True)
        engine.clear()
        engine._resize(prompt.n_tokens)
        engine.observe(12)
        engine._hook.probe(prompt.items, [*range(prompt.n_tokens)])
        assert n_used(engine) == 0
        engine._decode_items(prompt, 0)
    np.testing.assert_array_equal(engine.logits, logits)
    probed = engine.prune(POLICY, inspect=True)
    np.testing.assert_array_equal(probed.window_pos, observed.window_pos)
    for a, b in zip(observed.layers, probed.layers, strict=True):
        np.testing.assert_array_equal(a.q, b.q)
        np.testing.assert_array_equal(a.k, b.k)
        np.testing.assert_array_equal(a.kept, b.kept)
    engine.close()


def test_the_first_layer_of_a_probe_knows_no_pictures(demo_paths):
    """A query of the first layer is its token at its position, whatever came before it."""
    found = []
    for options in ({"max_cells": MAX_CELLS}, {"max_cells": 1024}):
        engine = Bounded(*demo_paths, **options)
        with tokenize(engine, 8) as prompt:
            engine.prefill(prompt, window=8, policy=POLICY)
        engine.prune(POLICY)
        found.append((engine.prunings[0].window_pos, engine.prunings[0].layers))
        engine.close()
    (probed_pos, probed), (pos, observed) = found
    np.testing.assert_array_equal(probed_pos, pos)
    np.testing.assert_allclose(probed[0].q, observed[0].q, rtol=1e-2, atol=1e-2)
    assert np.abs(probed[-1].q - observed[-1].q).max() > 0.1


@pytest.mark.parametrize("policy", [None, CSP(60, sink="mass"), SnapKV(60, recent=0), AdaKV(60)])
@pytest.mark.parametrize("tiny", ["qwen2vl", "gemma2"], indirect=True)
def test_a_probe_leaves_no_trace(tiny, policy):
    (path, mmproj), parts = tiny
    engine = Engine(path, mmproj, n_ctx=2048, n_threads=1, prune=True)
    with engine.tokenizer.tokenize(parts) as prompt:
        engine.prefill(prompt, window=8)
    if policy:
        engine.prune(policy)
        engine.redecode() if policy.recent != 0 else engine.decode(engine.items[-1])
    token, n_past = engine.items[-1], engine.n_past

    def go_on():
        engine.observe(8)
        engine.decode(token)
        return greedy(engine, 9), engine.prune(CSP(40)).layers, greedy(engine, 3)

    snapshot = engine.snapshot()
    expected = go_on()
    engine.restore(snapshot)
    before = state(engine)
    engine.observe(8)
    positions = [n_past, n_past + 1, n_past + 70, n_past + 71, n_past + 72, n_past + 500]
    engine._hook.probe([token] * 6, positions)
    assert state(engine) == before
    for a, b in zip(expected, go_on(), strict=True):
        if isinstance(a, tuple):
            a, b = ([kept for layer in found for kept in layer.kept] for found in (a, b))
        np.testing.assert_array_equal(a, b)
    engine.close()


@pytest.mark.parametrize("tiny", ["qwen2vl", "gemma2"], indirect=True)
@pytest.mark.parametrize("probe", [True, False])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_other_kinds_of_attention(tiny, probe, kv_type):
    (path, mmproj), parts = tiny
    engine = Bounded(path, mmproj, max_cells=MAX_CELLS, probe=probe, kv_type=kv_type)
    with engine.tokenizer.tokenize(parts) as prompt:
        engine.prefill(prompt, window=8, policy=POLICY)
        assert engine.n_tokens == prompt.n_tokens > 3 * MAX_CELLS
        assert engine.n_past == prompt.n_pos
    for pruning in engine.prunings:
        assert pruning.n_window > 0
        # a picture's tokens share a position where it has rows and columns
        assert (pruning.window_pos.max() == prompt.n_pos - 1) == probe
    greedy(engine, 300)
    assert engine.n_past == prompt.n_pos + 300
    engine.close()


def test_a_probe_longer_than_a_sliding_window(demo_paths, tmp_path):
    """It overwrites the ring, and what was there comes again."""
    tiny_models.gemma2(tmp_path / "tiny.gguf", demo_paths[0])
    engine = Bounded(tmp_path / "tiny.gguf", n_ubatch=32, max_cells=1024)
    text = "What is in image 2? "
    with engine.tokenizer.tokenize([text * 100]) as prompt:
        engine.prefill(prompt, window=8, policy=POLICY)
    n_most = 0
    with engine.tokenizer.tokenize([text * 100 + "And in image 3? " * 100]) as prompt:
        prefill = engine.prefill(prompt, window=8, policy=POLICY)
        n_most = prompt.n_tokens
    assert prefill.n_reused == 0 and prefill.n_decoded == n_most > 1024
    assert np.isfinite(greedy(engine, 3)).all()
    engine.close()


@pytest.fixture(scope="module")
def vlm():
    with EdgeVLM.demo(cache=CSP(0.2), max_cells=MAX_CELLS, n_threads=1) as vlm:
        yield vlm


@pytest.fixture
def bounded(vlm, monkeypatch):
    vlm.reset()
    engine = vlm.engine

    def checked(decode):
        def call(*args, **options):
            decode(*args, **options)
            assert n_used(engine) == engine.n_cells <= MAX_CELLS == engine.n_cells_max

        return call

    for name in ("_decode_text", "_decode_picture"):
        monkeypatch.setattr(engine, name, checked(getattr(engine, name)))
    yield vlm
    vlm.reset()


def user(text, images=()):
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def test_a_conversation_within_the_bound(bounded, scenes):
    messages = [user(COLOR, scenes[:6])]
    n_tokens = 0
    for i in range(4):
        result = bounded.chat(messages, max_tokens=40)
        assert result.usage.prompt_tokens > n_tokens + 2 * 64
        # all that was there stays: a prompt goes on where the last one ended
        assert result.usage.cached_tokens >= n_tokens
        n_tokens = result.usage.prompt_tokens
        assert bounded.engine.n_tokens >= n_tokens
        answer = {"role": "assistant", "content": result.text}
        messages += [answer, user(COLOR, scenes[6 + 2 * i : 8 + 2 * i] or scenes[:2])]


def test_figures_and_progress(bounded, scenes, monkeypatch):
    steps = []
    monkeypatch.setattr(bounded.engine, "_progress", lambda *step: steps.append(step))
    result = bounded.chat(COLOR, scenes[:8], max_tokens=4)
    figures, n_tokens = result.cache, result.usage.prompt_tokens
    assert n_tokens > 8 * 64
    assert figures.cells_before == n_tokens
    assert figures.cells_after == n_tokens // 5
    assert figures.bytes_before == n_tokens * bounded.engine.bytes_per_cell
    assert figures.bytes_after == figures.cells_after * bounded.engine.bytes_per_cell
    assert len(figures.pictures) == len(figures.patches()) == 8
    assert figures.n_tokens == n_tokens
    for layer in figures.kept:
        for head in layer:
            assert len(head) == figures.cells_after and (np.diff(head.astype(int)) > 0).all()
            assert head[-1] == n_tokens - 1
    # of several pictures something is left
    assert sum(patches.max() > 0 for patches in figures.patches()) > 4
    for stage, n_steps in (("encode", 8), ("prefill", n_tokens)):
        done = [(at, total) for name, at, total in steps if name == stage]
        assert {total for _, total in done} == {n_steps} and done[-1][0] == n_steps
        assert all(a <= b for a, b in itertools.pairwise(done))


def test_what_fits_is_not_touched(bounded, scenes):
    """Up to the bound nothing differs from a cache without one."""
    result = bounded.chat(COLOR, scenes[:2], max_tokens=1)
    assert result.cache.cells_before == result.usage.prompt_tokens < MAX_CELLS
    logits = bounded.engine.logits.copy()
    with EdgeVLM.demo(cache=CSP(0.2), n_threads=1) as free:
        expected = free.chat(COLOR, scenes[:2], max_tokens=1)
        # the text comes in other batches
        np.testing.assert_allclose(logits, free.engine.logits, atol=0.1)
    assert result.cache.cells_after == expected.cache.cells_after


def test_an_interrupted_prefill(bounded, scenes, monkeypatch):
    expected = bounded.chat(COLOR, scenes[:8], max_tokens=4)
    bounded.reset()

    def interrupt(stage, done, total):
        if stage == "prefill" and done > 300:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bounded.engine, "_progress", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bounded.chat(COLOR, scenes[:8], max_tokens=4)
    assert n_used(bounded.engine) == bounded.engine.n_cells <= MAX_CELLS
    again = bounded.chat(COLOR, scenes[:8], max_tokens=4)
    assert again.usage.prompt_tokens == expected.usage.prompt_tokens
    bounded.reset()
    assert bounded.chat(COLOR, scenes[:8], max_tokens=4).text == expected.text


def test_a_policy_that_gives_one_head_more(engine):
    with tokenize(engine, 8) as prompt:
        with pytest.raises(PolicyError, match=r"AdaKV keeps \d+ cells in one head, when asked for"):
            engine.prefill(prompt, window=8, policy=AdaKV(60))
        assert engine.n_cells == engine.n_tokens == n_used(engine) == 0
        with pytest.raises(PolicyError, match="max_cells=256 need a policy to prune by"):
            engine.prefill(prompt, window=8)
        engine.prefill(prompt, window=8, policy=POLICY)
    logits = greedy(engine, 3)
    engine.clear()
    with tokenize(engine, 8) as prompt:
        engine.prefill(prompt, window=8, policy=POLICY)
    np.testing.assert_array_equal(greedy(engine, 3), logits)


@pytest.mark.parametrize(
    "policy", [CSP(0.1, recent=40), CSP(window=300), CSP(0.5, recent=150), Streaming(0.5)]
)
def test_settings_are_of_the_whole_prompt(policy, scenes):
    images = [*scenes, *scenes]
    with EdgeVLM.demo(cache=policy, max_cells=256, n_threads=1) as vlm:
        answer = vlm.chat("What is in image 3?", images=images, max_tokens=8)
        assert answer.usage.prompt_tokens > 512
        assert vlm.engine.n_cells <= 256
    with EdgeVLM.demo(cache=policy, memory="16GiB", n_threads=1) as vlm:
        assert vlm.chat("What is in image 3?", images=images, max_tokens=8).text


@pytest.mark.parametrize("tiny", ["qwen2vl"], indirect=True)
def test_a_picture_too_large_for_the_bound(tiny):
    (path, mmproj), parts = tiny
    engine = Bounded(path, mmproj, max_cells=MAX_CELLS)
    large = np.zeros((128, 128, 3), np.uint8)
    (picture,) = Pictures().open([large])
    message = "picture 2 takes 256 cells, more than half of max_cells=256: give at least 512"
    prompt = engine.tokenizer.tokenize([*parts[:2], picture, "What is it?"])
    with prompt, pytest.raises(MemoryLimitError, match=message):
        engine.prefill(prompt, window=8, policy=POLICY)
    with engine.tokenizer.tokenize(parts) as prompt:
        engine.prefill(prompt, window=8, policy=POLICY)
    greedy(engine, 3)
    engine.close()


@pytest.mark.parametrize("max_cells", [0, -1, 255, 2**31, 256.0, "256", True])
def test_bounds_that_make_no_sense(max_cells):
    with pytest.raises(OptionError, match="max_cells=.*give an integer from 256 to 2147483647"):
        EdgeVLM.demo(max_cells=max_cells)


@pytest.mark.parametrize("max_cells", [257, 300, 511, 600])
def test_bounds_between_two_sizes(demo_paths, max_cells, monkeypatch):
    """Memory comes in steps of 256 cells, the bound on cells in use is exact."""
    engine = Bounded(*demo_paths, max_cells=max_cells)
    monkeypatch.setattr(Bounded, "n_cells_max", max_cells)
    with tokenize(engine, 10) as prompt:
        engine.prefill(prompt, window=8, policy=POLICY)
    greedy(engine, 60)
    assert engine.most <= max_cells and engine._hook.n_cells < max_cells + 256
    engine.close()


def test_a_bound_beyond_the_context(demo_paths):
    engine = Bounded(*demo_paths, n_ctx=256, max_cells=1000)
    assert engine.max_cells == 256
    with tokenize(engine, 8) as prompt:
        engine.prefill(prompt, window=8, policy=POLICY)
    greedy(engine, 40)
    engine.close()


def test_what_cannot_be_bounded(demo_paths, tmp_path):
    with pytest.raises(PolicyError, match=r"max_cells=512: cache=Full\(\) can't hold it"):
        EdgeVLM.demo(max_cells=512, cache=Full())
    tiny_models.mamba(tmp_path / "tiny.gguf", demo_paths[0])
    with pytest.raises(ModelError, match="can't be pruned"):
        Engine(tmp_path / "tiny.gguf", max_cells=512)
