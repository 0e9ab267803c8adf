"""Policies, snapshots and decoding again, through the engine."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import csp_statement
import tiny_models
from csp_edge.engine import Engine
from csp_edge.errors import CspEdgeError, PolicyError, PromptError
from csp_edge.images import Pictures
from csp_edge.policies import CSP, AdaKV, LookM, Policy, Pyramid, Resolved, SnapKV
from test_csp import pictures, question


def engine_on(paths: tuple[Path, Path], **options) -> Engine:
    return Engine(*paths, n_ctx=512, n_threads=1, prune=True, **options)


@pytest.fixture(scope="module")
def engine(demo_paths):
    engine = engine_on(demo_paths)
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def cleared(engine):
    yield
    engine.clear()


def tokenize(engine, n, text="What color is the star in image 2?"):
    texts = question(n, text).split("<__media__>")
    parts = [texts[0]]
    for picture, after in zip(Pictures().open(pictures(n)), texts[1:], strict=True):
        parts += [picture, after]
    return engine.tokenizer.tokenize(parts)


def prefill(engine, n=3, window=16):
    with tokenize(engine, n) as prompt:
        engine.prefill(prompt, window=window)


def greedy(engine, n):
    """Logits of `n` tokens of an answer."""
    rows = [engine.logits.copy()]
    for _ in range(n):
        engine.decode(int(rows[-1].argmax()))
        rows.append(engine.logits.copy())
    return np.stack(rows)


POLICIES = [
    CSP(40, sink="mass"),
    CSP(30, cross_ratio=0.5, n_score=0.0),
    SnapKV(40),
    LookM(40),
    Pyramid(40),
    AdaKV(40),
]


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_one_prefill_and_many_prunings(demo_paths, kv_type):
    engine = engine_on(demo_paths, kv_type=kv_type)
    fresh = []
    for policy in POLICIES:
        engine.clear()
        prefill(engine)
        pruning = engine.prune(policy)
        engine.redecode()
        fresh.append((pruning, greedy(engine, 4)))

    engine.clear()
    prefill(engine)
    full = engine.logits.copy()
    snapshot = engine.snapshot()
    items, n_tokens = list(engine.items), engine.n_tokens
    # there and back again, past prunings of all kinds
    for policy, (pruning, logits) in [*zip(POLICIES, fresh, strict=True)] * 2:
        engine.restore(snapshot)
        assert engine.items == items
        assert engine.n_tokens == engine.n_cells == engine.n_past == n_tokens
        again = engine.prune(policy)
        for a, b in zip(pruning.layers, again.layers, strict=True):
            for x, y in zip(a.kept, b.kept, strict=True):
                np.testing.assert_array_equal(x, y)
        assert engine.n_cells == again.n_kept < n_tokens
        engine.redecode()
        np.testing.assert_array_equal(greedy(engine, 4), logits)
    engine.restore(snapshot)
    engine.redecode()
    np.testing.assert_allclose(engine.logits, full, atol=2e-2)  # alone, not in a batch
    engine.close()


@pytest.mark.parametrize("policy", [CSP(40, sink="mass"), AdaKV(40)])
def test_a_pruned_cache_is_restored(engine, policy):
    prefill(engine)
    engine.prune(policy)
    engine.observe(16)
    greedy(engine, 5)
    user = engine.tokenizer.tokenize(["<|user|>"]).items[-1]
    snapshot = engine.snapshot()

    def go_on():
        engine.decode(user)
        answer = greedy(engine, 3)
        # by the queries since the first pruning
        second = engine.prune(CSP(30, sink="mass"))
        return answer, second.window_pos, np.stack(second.layers[0].kept), greedy(engine, 2)

    once = go_on()
    engine.clear()
    prefill(engine, 1)
    engine.prune(Pyramid(20))
    engine.restore(snapshot)
    assert engine.items == list(snapshot.items) and engine.n_cells < engine.n_tokens
    for a, b in zip(once, go_on(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_sliding_windows_are_restored(demo_paths, tmp_path):
    tiny_models.gemma2(tmp_path / "tiny.gguf", demo_paths[0])
    engine = Engine(tmp_path / "tiny.gguf", n_ctx=1024, n_threads=1, prune=True)
    with engine.tokenizer.tokenize(["What is in image 2? " * 100]) as prompt:
        engine.prefill(prompt, window=16)
    snapshot = engine.snapshot()
    token = prompt.items[-1]
    runs = []
    for _ in range(2):
        engine.prune(AdaKV(40))
        engine.decode(token)
        runs.append(greedy(engine, 50))  # past the sliding window
        engine.restore(snapshot)
    np.testing.assert_array_equal(*runs)
    engine.close()


def test_a_snapshot_needs_a_cache_of_its_size(demo_paths, engine):
    prefill(engine)
    snapshot = engine.snapshot()
    other = Engine(*demo_paths, n_ctx=1024, n_threads=1, prune=True)
    with pytest.raises(CspEdgeError, match="another kind of context"):
        other.restore(snapshot)
    prefill(other)  # goes on
    other.close()
    engine.restore(snapshot)


# a row of bf16 is as long as one of f16
@pytest.mark.parametrize(("name", "value"), [("kv_type", "bf16"), ("n_ctx_max", 256)])
def test_a_snapshot_needs_a_context_of_its_kind(demo_paths, name, value):
    engine = engine_on(demo_paths)
    prefill(engine)
    snapshot = engine.snapshot()
    # another engine would have another model, which is reason enough to refuse
    setattr(engine, name, value)
    engine._new_context(256)
    with pytest.raises(CspEdgeError, match="another kind of context"):
        engine.restore(snapshot)
    prefill(engine, 2)  # goes on
    engine.close()


def test_an_empty_cache_is_restored(engine):
    snapshot = engine.snapshot()
    prefill(engine)
    logits = engine.logits.copy()
    engine.prune(AdaKV(40, window=8))
    engine.restore(snapshot)
    assert engine.n_cells == 0 and engine.items == []
    prefill(engine)
    np.testing.assert_array_equal(engine.logits, logits)


def test_the_last_token_is_decoded_over_the_pruned_cache(engine):
    prefill(engine)
    full = engine.logits.copy()
    engine.redecode()
    np.testing.assert_allclose(engine.logits, full, atol=2e-2)
    engine.prune(CSP(30))
    n_past, items = engine.n_past, list(engine.items)
    engine.redecode()
    assert (engine.n_past, engine.n_cells, engine.items) == (n_past, 30, items)
    first = engine.logits.copy()
    assert np.abs(first - full).max() > 1e-2
    engine.redecode()  # any number of times
    np.testing.assert_array_equal(engine.logits, first)
    greedy(engine, 2)
    engine.redecode()
    assert engine.n_cells == 32


def test_what_cannot_be_decoded_again(engine):
    with pytest.raises(PromptError, match="no token"):
        engine.redecode()
    prefill(engine)
    engine.prune(CSP(30, recent=0))
    n_cells = engine.n_cells
    with pytest.raises(PromptError, match="last token is evicted"):
        engine.redecode()
    assert engine.n_cells == n_cells
    greedy(engine, 1)
    engine.redecode()  # this one is there
    assert engine.n_cells == n_cells + 1


def test_pruning_some_tokens_later(engine):
    """The answer's first queries score too, and recent cells are counted from its end."""
    prefill(engine)
    n_prompt = engine.n_tokens
    greedy(engine, 5)
    policy = CSP(30, window=16, recent=8, distance=0, lookahead=0)
    pruning = engine.prune(policy, inspect=True)
    assert pruning.n_tokens == n_prompt + 5
    assert pruning.window_pos.tolist() == [*range(n_prompt + 5 - 16, n_prompt + 5)]
    for layer in pruning.layers:
        x = csp_statement.logits(
            layer.q.astype(float), np.stack(layer.k, axis=1).astype(float), layer.kq_scale
        )
        seen = csp_statement.visible(pruning.window_pos, pruning.pos)
        modality = np.stack([pruning.modality] * 2)
        self, cross = csp_statement.scores(x, seen, pruning.window_modality, modality, 1.0)
        for h in range(2):
            np.testing.assert_allclose(layer.self_[h], self[h], rtol=1e-3, atol=1e-5)
            expected = csp_statement.select(self[h], cross[h], 30, 8, None)
            assert layer.kept[h].tolist() == expected
            assert layer.kept[h][-8:].tolist() == [*range(n_prompt - 3, n_prompt + 5)]
    assert engine.n_cells == 30
    engine.decode(engine.items[-1])


@pytest.mark.parametrize("taken_back", [False, True])
def test_looking_ahead(engine, taken_back):
    """The queries of the answer weigh 0.95 of all, and its cells stay beside the budget."""
    policy = CSP(30, window=8, recent=4, distance=0, lookahead=5)
    with tokenize(engine, 3) as prompt:
        engine.prefill(prompt, window=8, lookahead=5)
    n_prompt, snapshot = engine.n_tokens, engine.snapshot()
    answer = []
    for _ in range(5):
        answer.append(int(engine.logits.argmax()))
        engine.decode(answer[-1])
    if taken_back:
        engine.restore(snapshot)
        engine.look_ahead(answer)
        assert engine.n_tokens == n_prompt
    pruning = engine.prune(policy, inspect=True)
    n_more = 0 if taken_back else 5
    assert pruning.n_tokens == n_prompt + n_more
    assert pruning.window_pos.tolist() == [*range(n_prompt - 8, n_prompt + 5)]
    for layer in pruning.layers:
        x = csp_statement.logits(
            layer.q.astype(float), np.stack(layer.k, axis=1).astype(float), layer.kq_scale
        )
        seen = csp_statement.visible(pruning.window_pos, pruning.pos)
        modality = np.stack([pruning.modality] * 2)
        weights = np.array([0.05 / 7] * 7 + [0.95 / 6] * 6) * 13
        self, cross = csp_statement.scores(
            x, seen, pruning.window_modality, modality, 1.0, weights=weights
        )
        for h in range(2):
            np.testing.assert_allclose(layer.self_[h], self[h], rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(layer.cross[h], cross[h], rtol=1e-3, atol=1e-5)
            expected = csp_statement.select(self[h], cross[h], 30 + n_more, 4 + n_more, None)
            assert layer.kept[h].tolist() == expected
    assert engine.n_cells == 30 + n_more
    engine.decode(engine.items[-1])


# policies in Python


@dataclass(frozen=True)
class Mine(Policy):
    """CSP, by its plain statement."""

    def select(self, layer):
        rows = zip(layer.self_.astype(float), layer.cross.astype(float), strict=True)
        return [
            np.array(csp_statement.select(own, other, layer.budget, layer.recent, None))
            for own, other in rows
        ]


def test_a_policy_of_ones_own(engine):
    runs = []
    settings = {"window": 16, "recent": 16, "n_score": 0.0, "distance": 0, "lookahead": 0}
    for policy in (CSP(40, **settings), Mine(40)):
        engine.clear()
        prefill(engine)
        pruning = engine.prune(policy)
        runs.append(([layer.kept for layer in pruning.layers], greedy(engine, 3)))
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    np.testing.assert_array_equal(runs[0][1], runs[1][1])


def test_a_head_that_keeps_no_cell(engine):
    class Uneven(Policy):
        def select(self, layer):
            n = layer.self_.shape[1]
            recent = [*range(n - layer.recent, n)]
            return [recent, [*range(10), *recent]]

    prefill(engine)
    engine.prune(Uneven(20, recent=4))
    engine.cut(len(engine.items) - 4)
    engine.observe(8)
    engine._hook.probe([5] * 8, range(engine.n_past, engine.n_past + 8))
    pruning = engine._hook.prune(CSP(5, distance=0), Resolved(5, 8, 0))
    assert [len(kept) for kept in pruning.layers[0].kept] == [0, 5]
    engine._set_pruned(pruning, 5)
    engine.decode(5)
    assert np.isfinite(engine.logits).all()


def test_what_a_policy_is_shown(engine):
    shown = []

    class Watching(Policy):
        needs_keys = True

        def select(self, layer):
            shown.append(layer)
            return [[0, 1], np.array([2, 3, 4])]

    prefill(engine)
    n = engine.n_tokens
    pruning = engine.prune(Watching(30, recent=5), inspect=True)
    assert [layer.i_layer for layer in shown] == [*range(6)]
    for view, layer in zip(shown, pruning.layers, strict=True):
        assert (view.n_layer, view.budget, view.recent) == (6, 30, 5)
        assert view.token.tolist() == [[*range(n)]] * 2
        assert view.modality.tolist() == [pruning.modality.tolist()] * 2
        np.testing.assert_array_equal(view.self_, layer.self_)
        np.testing.assert_array_equal(view.cross, layer.cross)
        np.testing.assert_array_equal(view.k, layer.k)
        assert [kept.tolist() for kept in layer.kept] == [[0, 1], [2, 3, 4]]
    assert engine.n_cells == 3


@pytest.mark.parametrize("needs", [False, "pictures", True])
@pytest.mark.parametrize("n_pictures", [0, 1])
def test_keys_where_they_are_needed(engine, needs, n_pictures):
    shown = []

    class Watching(Policy):
        needs_keys = needs

        def select(self, layer):
            shown.append(layer.k is not None)
            return [[0]] * len(layer.token)

    prefill(engine, n_pictures, window=8)
    engine.prune(Watching(8))
    assert shown == [needs is True or (needs == "pictures" and n_pictures == 1)] * 6


ROWS = [
    (lambda: None, "returned None for layer 0: give an array of cells for each of its 2 KV heads"),
    (lambda: np.array(7), r"returned \[\] for layer 0: .* for each of its 2 KV heads"),
    (lambda: [[1]], r"returned \[\[1\]\] for layer 0"),
    (lambda: [[1], []], r"returned \[\] for KV head 1 of layer 0: give one or more integers from"),
    (lambda: [[1], 7], "returned 7 for KV head 1"),
    (lambda: [[1], [0.5]], r"returned \[0.5\] for KV head 1"),
    (lambda: [[1], [True, False]], "for KV head 1"),
    (lambda: [[1], "ab"], "returned 'ab' for KV head 1"),
    (lambda: [[1], [-1, 3]], r"from 0 to \d+, ascending"),
    (lambda: [[1], [3, 10**5]], "for KV head 1"),
    (lambda: [[1], [3, 2**40]], "for KV head 1"),
    (lambda: [[1], np.array([3, 2], np.uint8)], "for KV head 1"),
    (lambda: [[1], [2, 2]], "for KV head 1"),
    (lambda: [[1], [[0, 1], [2, 3]]], "for KV head 1"),
    (lambda: [[1], [[0], [1, 2]]], "for KV head 1"),
]


@pytest.mark.parametrize(("rows", "message"), ROWS)
def test_a_choice_that_makes_no_sense(engine, rows, message):
    class Bad(Policy):
        def select(self, layer):
            return rows()

    prefill(engine)
    with pytest.raises(PolicyError, match=message) as raised:
        engine.prune(Bad(30))
    assert str(raised.value).startswith("Bad.select() returned") and "\n" not in str(raised.value)
    prefill(engine)
    engine.prune(CSP(30))


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("mine"), SystemExit(3)])
def test_what_a_policy_raises_passes_through(engine, failure):
    class Failing(Policy):
        def select(self, layer):
            if layer.i_layer == 2:
                raise failure
            return [[0]] * len(layer.token)

    prefill(engine)
    snapshot = engine.snapshot()
    with pytest.raises(type(failure)) as raised:
        engine.prune(Failing(30))
    assert raised.value is failure
    engine.restore(snapshot)
    engine.prune(CSP(30))
    assert engine.n_cells == 30


def test_a_policy_without_select(engine):
    prefill(engine)
    with pytest.raises(PolicyError, match="Policy has no select"):
        engine.prune(Policy(30))
