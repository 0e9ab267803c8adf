"""Any policy through the hook: budgets by layer and head, merging, answers that make no sense.

Driven through llama.h and llama-csp.h, without the engine.
"""

import ctypes
import re
import struct

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

import csp_statement
import tiny_models
from csp_edge import native
from csp_edge.native import llama
from test_csp import Pruned, append, pictures, question, view

LIB = llama._lib
LIB.ggml_get_name.restype = ctypes.c_char_p
LIB.ggml_get_name.argtypes = [ctypes.c_void_p]
LIB.ggml_nbytes.restype = ctypes.c_size_t
LIB.ggml_nbytes.argtypes = [ctypes.c_void_p]
LIB.ggml_backend_tensor_get.restype = None
LIB.ggml_backend_tensor_get.argtypes = [
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_size_t,
]


def policy(choose):
    """A llama_csp_policy of choose(view) -> (kept cells per head, {evicted: kept} per head)."""

    @native.CspPolicy
    def function(view, choice, _):
        v, c = view.contents, choice.contents
        heads, merges = choose(v)
        for h, cells in enumerate(heads):
            c.n_kept[h] = len(cells)
            for i, cell in enumerate(cells[: v.n_cells]):
                c.kept[h * v.n_cells + i] = cell
            for evicted, kept in merges[h].items() if merges else ():
                c.merge[h * v.n_cells + evicted] = kept
        return True

    return function


def lengths(i_layer, n_head_kv, budget):
    """Cells of every head: no two alike in a layer."""
    return [budget - 5 * i_layer - 3 * h for h in range(n_head_kv)]


@policy
def ragged(view):
    """Every other cell from the first on, and the recent ones, as many as `lengths` says."""
    recent = range(view.n_cells - view.recent, view.n_cells)
    counts = lengths(view.i_layer, view.n_head_kv, view.budget)
    old = [[*range(view.n_cells - view.recent)][::2][: n - view.recent] for n in counts]
    return [[*cells, *recent] for cells in old], None


class Traced(Pruned):
    """Keeps what attention gave in the last decode."""

    def __init__(self, model, mmproj, kv_type):
        @llama.ggml_backend_sched_eval_callback
        def trace(tensor, ask, _):
            name = re.fullmatch(rb"kqv_out-(\d+)", LIB.ggml_get_name(tensor))
            if ask or not name:
                return not ask or name is not None
            data = np.empty(LIB.ggml_nbytes(tensor) // 4, np.float32)
            LIB.ggml_backend_tensor_get(tensor, data.ctypes.data, 0, data.nbytes)
            self.out[int(name[1])] = data
            return True

        self.out = {}
        self.trace = trace
        super().__init__(model, mmproj, kv_type)

    def new_context(self):
        defaults = llama.llama_context_default_params

        def traced():
            params = defaults()
            params.cb_eval = self.trace
            return params

        llama.llama_context_default_params = traced
        try:
            super().new_context()
        finally:
            llama.llama_context_default_params = defaults


def rows_of(state, n_head_kv, kind):
    """K and V, [n_layer, n_cells, n_head_kv, head_dim], of a state of one sequence."""
    n_cells = struct.unpack_from("<I", state, 12)[0]
    offset = 16 + n_cells * 12
    _, n_layer = struct.unpack_from("<II", state, offset)
    offset += 8
    result = []
    for _ in range(2 * n_layer):
        size = struct.unpack_from("<Q", state, offset + 4)[0]
        offset += 12
        data = np.frombuffer(state, np.uint8, n_cells * size, offset).reshape(n_cells, size)
        result.append(dequantize(data, kind).reshape(n_cells, n_head_kv, -1))
        offset += n_cells * size
    return np.stack(result[:n_layer]), np.stack(result[n_layer:])


def check_attention(model, token, cap=None, sinks=None):
    """One more token: what its attention gives, from the very q, K and V, in float64."""
    model.observe(1)
    model.decode([token], model.n_past)
    out = dict(model.out)
    layers = model.prune(10**6, 0, policy=ragged)  # evicts nothing, and shows q and K
    state = model.state()
    _, values = rows_of(state, layers[0].n_head_kv, model.kv_type)
    for i, layer in enumerate(layers):
        got = out[native.csp_get_layer(model.csp, i).il].reshape(layer.q.shape[1], -1)
        n_group = layer.q.shape[1] // layer.n_head_kv
        for head in range(layer.q.shape[1]):
            h = head // n_group
            n_cells = len(layer.token[h])
            keys = layer.k[:, h] if isinstance(layer.k, np.ndarray) else layer.k[h]
            x = layer.scale * keys @ layer.q[0, head]
            x = x if cap is None else cap * np.tanh(x / cap)
            sink = -np.inf if sinks is None else sinks[i][head]
            weights = np.exp(x - max(x.max(), sink))
            weights /= weights.sum() + np.exp(sink - max(x.max(), sink))
            # the cells of a head: the chosen, padding, and those that all heads have
            n_own = model.n_own[i][h]
            v = np.delete(values[i][:, h], range(n_own, model.n_chosen), axis=0)
            assert len(v) == n_cells == len(keys)
            np.testing.assert_allclose(got[head], weights @ v, rtol=2e-2, atol=4e-3)


def prune_ragged(model, budget, recent, **changes):
    layers = model.prune(budget, recent, policy=ragged, **changes)
    assert model.stats.n_recent == recent
    model.n_chosen = model.stats.n_kept - recent
    model.n_own = [[len(kept) - recent for kept in layer.kept] for layer in layers]
    return layers


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_heads_of_different_budgets_see_their_own_cells(demo_paths, kv_type):
    model = Traced(*map(str, demo_paths), kv_type)
    model.observe(16)
    model.prefill(question(3), pictures(3))
    n = model.n_past
    layers = prune_ragged(model, 60, 8)
    for i, layer in enumerate(layers):
        expected = lengths(i, 2, 60)
        assert [len(kept) for kept in layer.kept] == expected
        for kept, length in zip(layer.kept, expected, strict=True):
            assert kept.tolist() == [*range(0, n - 8, 2)][: length - 8] + [*range(n - 8, n)]
    assert model.n_cells == 60
    check_attention(model, 5)


@pytest.mark.parametrize("sink", ["fixed", "mass"])
def test_sinks_beside_different_budgets(demo_paths, sink):
    model = Traced(*map(str, demo_paths), "f16")
    model.observe(16)
    model.prefill(question(3), pictures(3))
    n_decode, mass = (300.0, False) if sink == "fixed" else (None, True)
    layers = prune_ragged(model, 60, 8, n_decode=n_decode, mass=mass)
    if mass:
        stats = model.stats
        window_pos, pos = view(stats.window_pos, stats.n_window), view(stats.pos, stats.n_tokens)
        for layer in layers:
            x = csp_statement.logits(layer.q, layer.k, layer.scale)
            seen = csp_statement.visible(window_pos, pos)
            kept = [kept.tolist() for kept in layer.kept]
            expected = csp_statement.evicted_mass(x, seen, kept, layer.n_head_kv)
            np.testing.assert_allclose(layer.sink, expected, rtol=1e-3, atol=1e-3)
    check_attention(model, 5, sinks=[layer.sink for layer in layers])


@pytest.mark.parametrize(
    ("tiny", "cap", "sinks"), [("gemma2", 20.0, None), ("gpt_oss", None, [np.ones(4)])]
)
def test_different_budgets_beside_sliding_windows(tmp_path, tiny, cap, sinks):
    """And of capped logits, or beside the sinks of the model."""
    getattr(tiny_models, tiny)(tmp_path / "tiny.gguf")
    model = Traced(str(tmp_path / "tiny.gguf"), "", "f16")
    model.observe(12)
    model.decode(np.random.default_rng(0).integers(0, 64, 200).tolist(), 0)
    model.n_past = 200
    layers = prune_ragged(model, 40, 10)
    assert [[len(kept) for kept in layer.kept] for layer in layers] == [[40, 37]]
    check_attention(model, 5, cap, sinks)


@pytest.mark.parametrize("n_decode", [None, 50.0])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
def test_padding_is_never_seen(demo_paths, kv_type, n_decode):
    """Whatever stands there: in scoring, in decoding one token, and in decoding several."""
    model = Pruned(*map(str, demo_paths), kv_type)
    model.observe(16)
    model.prefill(question(3), pictures(3))
    layers = prune_ragged(model, 60, 8, n_decode=n_decode)
    state = model.state()

    def spoil(cell_of):
        """The state with the rows of one head's cell replaced by another's, in every layer."""
        spoiled = bytearray(state)
        offset = 16 + 60 * 12 + 8
        for i in range(2 * len(layers)):
            row = struct.unpack_from("<Q", state, offset + 4)[0]
            offset += 12
            at = offset + cell_of(i % len(layers)) * row + row // 2
            spoiled[at : at + row // 2] = spoiled[offset : offset + row // 2]
            offset += 60 * row
        return bytes(spoiled)

    logits, scores = [], []
    # the first padding cell of the second head, and the last cell that it holds
    for changed in (
        state,
        spoil(lambda i: model.n_own[i][1]),
        spoil(lambda i: model.n_own[i][1] - 1),
    ):
        model.set_state(changed)
        model.observe(4)
        several = model.decode([5, 6, 7, 8], model.n_past)
        one = model.decode([9], model.n_past + 4)
        logits.append(np.stack([several, one]))
        scores.append(np.concatenate([s for y in model.prune(10**6, 0) for s in y.self]))
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(scores[0], scores[1])
    assert np.abs(logits[0] - logits[2]).max() > 1e-4
    assert np.abs(scores[0] - scores[2]).max() > 1e-4


@pytest.mark.parametrize("n_decode", [None, 50.0])
def test_heads_that_differ_by_nothing_give_what_equal_ones_give(demo_paths, n_decode):
    """A cell that no query attends to, in one head more: by another path, the same attention."""

    def run(i_longer=None, cell=None):
        @policy
        def choose(view):
            recent = [*range(view.n_cells - 20, view.n_cells)]
            heads = [recent] * view.n_head_kv
            if view.i_layer == i_longer:
                heads[1] = [cell, *recent]
            return heads, None

        model = Pruned(*map(str, demo_paths), "f16")
        model.observe(16)
        logits = model.prefill(question(3), pictures(3))
        layers = model.prune(30, 8, policy=choose, n_decode=n_decode)
        assert [len(layer.kept[1]) for layer in layers] == [20 + (i == i_longer) for i in range(6)]
        model.observe(3)
        return model.greedy(logits, 3)[0], layers, model.prune(10**6, 0)

    equal, layers, decoding = run()
    # by the queries that decode, the evicted cell of the second head that all see least
    least = []
    for i, (before, now) in enumerate(zip(layers, decoding, strict=True)):
        q = now.q[:, 2:].reshape(-1, now.q.shape[2])
        sums = np.exp(now.scale * q @ now.k[:, 1].T).sum(axis=1, keepdims=True)
        seen = (np.exp(before.scale * q @ before.k[:-20, 1].T) / sums).max(axis=0)
        least.append((seen.min(), i, int(seen.argmin())))
    weight, i_longer, cell = min(least)
    assert weight < 1e-4
    np.testing.assert_allclose(run(i_longer, cell)[0], equal, atol=2e-2)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_a_ragged_cache_is_pruned_again(demo_paths, kv_type):
    model = Traced(*map(str, demo_paths), kv_type)
    model.observe(16)
    model.prefill(question(4), pictures(4))
    first = prune_ragged(model, 60, 8)
    n_first = model.stats.n_tokens
    keys = [layer.k for layer in first]
    model.observe(16)
    append(model, "<|user|> What is in image 3?<|assistant|>")
    n_tokens = model.n_past
    second = model.prune(50, 6)
    stats = model.stats
    assert (stats.n_tokens, stats.n_cells) == (n_tokens, 60 + n_tokens - n_first)
    window_pos, pos = view(stats.window_pos, stats.n_window), view(stats.pos, stats.n_tokens)
    for layer, before, k in zip(second, first, keys, strict=True):
        for h in range(2):
            # the cells that this head kept, and the new ones: never padding
            assert layer.token[h].tolist() == [*before.kept[h], *range(n_first, n_tokens)]
            own = len(before.kept[h])
            np.testing.assert_array_equal(layer.k[h][:own], k[before.kept[h], h])
            # scored over those alone
            x = csp_statement.logits(
                layer.q[:, 2 * h : 2 * h + 2], layer.k[h][:, None], layer.scale
            )
            seen = csp_statement.visible(window_pos, pos[layer.token[h]])
            (self,), (cross,) = csp_statement.scores(
                x,
                seen,
                view(stats.window_modality, stats.n_window),
                model.modality[layer.token[h]][None],
                1.0,
            )
            np.testing.assert_allclose(layer.self[h], self, rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(layer.cross[h], cross, rtol=1e-3, atol=1e-5)
            # a head that has no more than the budget keeps all
            chosen = csp_statement.select(self, cross, 50, 6, None)
            assert layer.kept[h].tolist() == layer.token[h][chosen].tolist()
    assert model.n_cells == 50

    model.observe(16)
    append(model, "<|user|> What is in image 1?<|assistant|>")
    prune_ragged(model, 40, 5)
    if kv_type == "f16":
        check_attention(model, 5)


def test_mass_counts_the_cells_of_each_head(demo_paths):
    """What a second pruning evicts is added to what the first did, head by head."""
    model = Pruned(*map(str, demo_paths), "f16")
    model.observe(16)
    model.prefill(question(4), pictures(4))
    first = prune_ragged(model, 60, 8, mass=True)
    model.observe(16)
    append(model, "<|user|> What is in image 3?<|assistant|>")
    second = model.prune(35, 6, mass=True)
    stats = model.stats
    window_pos, pos = view(stats.window_pos, stats.n_window), view(stats.pos, stats.n_tokens)
    for layer, before in zip(second, first, strict=True):
        for head in range(4):
            h = head // 2
            x = csp_statement.logits(layer.q[:, head : head + 1], layer.k[h][:, None], layer.scale)
            seen = csp_statement.visible(window_pos, pos[layer.token[h]])
            kept = [np.searchsorted(layer.token[h], layer.kept[h]).tolist()]
            if len(layer.kept[h]) == len(layer.token[h]):
                expected = before.sink[head]
            else:
                mass = csp_statement.evicted_mass(x, seen, kept, 1)[0]
                expected = np.logaddexp(before.sink[head], mass)
            np.testing.assert_allclose(layer.sink[head], expected, rtol=1e-3, atol=1e-3)


def test_a_policy_that_drops_recent_cells(demo_paths):
    model = Traced(*map(str, demo_paths), "f16")
    model.observe(16)
    model.prefill(question(2), pictures(2))

    @policy
    def choose(view):
        return [[0, 5, 7], [1, 2, 3, view.n_cells - 1]], None

    layers = model.prune(20, 6, policy=choose)
    assert [kept.tolist() for kept in layers[0].kept] == [[0, 5, 7], [1, 2, 3, model.n_past - 1]]
    assert (model.stats.n_kept, model.stats.n_recent) == (4, 0)
    model.n_chosen, model.n_own = 4, [[3, 4]] * len(layers)
    check_attention(model, 5)


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0", "q4_0"])
def test_merging(demo_paths, kv_type):
    """k_p' = (k_p + sum of (k_p + k_e) / 2) / (n + 1) over the n cells e merged into p."""
    model = Pruned(*map(str, demo_paths), kv_type)
    model.observe(16)
    model.prefill(question(2), pictures(2))
    before = rows_of(model.state(), 2, model.kv_type)

    # 3 is kept by the first head, and merged by the second
    kept = [[1, 3, 4, 50, 51], [0, 2, 20, 50, 51]]
    merges = [{0: 3, 7: 3, 9: 3, 20: 50, 49: 4}, {3: 2, 30: 20}]

    @policy
    def choose(view):
        last = [view.n_cells - 2, view.n_cells - 1]
        return [cells + last for cells in kept], merges if view.i_layer != 1 else None

    layers = model.prune(10, 2, policy=choose)
    after = rows_of(model.state(), 2, model.kv_type)
    kind = GGMLQuantizationType[kv_type.upper()]
    for was, now in zip(before, after, strict=True):
        for i in range(len(layers)):
            for h in range(2):
                expected = was[i, layers[i].kept[h], h].copy()
                for j, cell in enumerate(kept[h] if i != 1 else []):
                    into = [was[i, e, h] for e, p in merges[h].items() if p == cell]
                    x = was[i, cell, h]
                    expected[j] = (x + sum((x + e) / 2 for e in into)) / (len(into) + 1)
                written = dequantize(quantize(expected, kind), kind)
                step = np.abs(expected).max(axis=-1, keepdims=True) / {"q8_0": 127, "q4_0": 7}.get(
                    kv_type, 2000
                )
                assert (np.abs(now[i, :, h] - written) <= step + 1e-6).all()
                moved = [
                    j for j, cell in enumerate(kept[h]) if i != 1 and cell in merges[h].values()
                ]
                for j in range(len(expected)):
                    same = (now[i, j, h] == was[i, layers[i].kept[h][j], h]).all()
                    assert same == (j not in moved)


BAD = [
    ("2 heads", lambda n: ([[0, 1], []], None), "keeps 0 of the {n} cells"),
    ("too many", lambda n: ([[0, 1], [0] * (n + 1)], None), "keeps {m} of the {n} cells"),
    ("beyond", lambda n: ([[0, 1], [0, n]], None), "keeps cell {n} of the {n}"),
    ("descending", lambda n: ([[0, 1], [5, 4]], None), "keeps cell 4 after cell 5"),
    ("twice", lambda n: ([[0, 1], [5, 5]], None), "keeps cell 5 after cell 5"),
    ("into evicted", lambda n: ([[0], [1]], [{}, {0: 2}]), "merges cell 0 into cell 2"),
    ("beyond", lambda n: ([[0], [1]], [{}, {0: n}]), "merges cell 0 into cell {n}"),
    ("kept and merged", lambda n: ([[0], [1, 2]], [{}, {1: 2}]), "keeps cell 1"),
]


@pytest.mark.parametrize(("answer", "message"), [bad[1:] for bad in BAD], ids=[b[0] for b in BAD])
def test_an_answer_that_makes_no_sense_changes_nothing(demo_paths, answer, message):
    model = Pruned(*map(str, demo_paths), "f16")
    model.observe(16)
    logits = model.prefill(question(2), pictures(2))
    n = model.n_past
    before = model.state()

    @policy
    def choose(view):  # sense in all layers but one
        return answer(view.n_cells) if view.i_layer == 3 else ([[0], [1]], None)

    params = native.csp_default_params()
    params.budget, params.recent, params.policy = 40, 8, choose
    assert not native.csp_prune(model.csp, params)
    error = native.csp_last_error().decode()
    assert message.format(n=n, m=n + 1) in error and "layer 3, KV head 1" in error
    assert model.state() == before
    model.prune(40, 8)  # the queries are still there
    model.greedy(logits, 2)


def test_a_policy_that_cannot_choose_changes_nothing(demo_paths):
    model = Pruned(*map(str, demo_paths), "f16")
    model.observe(16)
    model.prefill(question(2), pictures(2))
    before = model.state()
    params = native.csp_default_params()
    params.budget, params.recent = 40, 8
    for ratio, distance in ((1.5, 0.0), (float("nan"), 0.0), (0.5, 2.0)):  # distance needs keys
        settings = (ctypes.c_double * 2)(ratio, distance)
        params.policy_settings = ctypes.addressof(settings)
        assert not native.csp_prune(model.csp, params)
        assert b"could not choose in layer 0" in native.csp_last_error()
        assert model.state() == before


@pytest.mark.parametrize("n_pictures", [0, 2])
def test_keys_are_shown_if_asked_for(demo_paths, n_pictures):
    model = Pruned(*map(str, demo_paths), "q8_0")
    model.observe(16)
    model.prefill(question(n_pictures), pictures(n_pictures))
    snapshot = native.csp_take_snapshot(model.csp)
    seen = []

    @policy
    def choose(view):
        shape = view.n_head_kv, view.n_cells, view.n_embd_head_k
        seen.append(np.ctypeslib.as_array(view.k, shape).copy() if view.k else None)
        return [[0], [1]], None

    for keys, shown in (
        (native.KEYS_NONE, False),
        (native.KEYS_MEDIA, n_pictures > 0),
        (native.KEYS_ALL, True),
    ):
        assert native.csp_restore(model.csp, snapshot)
        layers = model.prune(10, 8, policy=choose, keys=keys)
        assert len(seen) == len(layers)
        for layer, k in zip(layers, seen, strict=True):
            assert (k is not None) == shown
            if shown:
                np.testing.assert_array_equal(k.swapaxes(0, 1), layer.k)
        seen.clear()

    # no cell of a picture is left
    model.observe(16)
    append(model, "<|user|> What")
    layers = model.prune(2, 1, policy=choose, keys=native.KEYS_MEDIA)
    assert seen == [None] * len(layers)
    native.csp_free_snapshot(snapshot)


def test_the_window_is_the_newest_of_the_observed_queries(demo_paths):
    layers, stats = [], []
    for observed, window in ((10, 0), (10**6, 10)):
        model = Pruned(*map(str, demo_paths), "f16")
        model.observe(observed)
        model.prefill(question(2), pictures(2))
        layers.append(model.prune(40, 8, window=window))
        stats.append(view(model.stats.window_pos, model.stats.n_window).tolist())
    assert stats[0] == stats[1] and len(stats[0]) == 10
    for a, b in zip(*layers, strict=True):
        np.testing.assert_array_equal(a.q, b.q)
        np.testing.assert_array_equal(a.self, b.self)
        np.testing.assert_array_equal(a.kept, b.kept)
