"""The policies in the library against their plain statements, and their settings in Python."""

import ctypes
import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import policy_statements as statement
from csp_edge import EdgeVLM, native
from csp_edge.errors import PolicyError
from csp_edge.policies import (
    CSP,
    H2O,
    POLICIES,
    AdaKV,
    Full,
    LayerView,
    LookM,
    Policy,
    Pyramid,
    Random,
    Resolved,
    SnapKV,
    Streaming,
    policy,
)

RIVALS = [CSP, SnapKV, H2O, Streaming, LookM, Pyramid, AdaKV, Random]

U32, I8, F32 = ctypes.c_uint32, ctypes.c_int8, ctypes.c_float
NONE = 0xFFFFFFFF


def layer(self_, cross, budget, recent, modality=None, k=None, i_layer=0, n_layer=1) -> LayerView:
    self_, cross = (np.atleast_2d(np.asarray(s, dtype=np.float32)) for s in (self_, cross))
    n_head_kv, n_cells = self_.shape
    token = np.tile(np.arange(n_cells, dtype=np.uint32), (n_head_kv, 1))
    if modality is None:
        modality = np.zeros((n_head_kv, n_cells))
    if k is not None:
        k = np.ascontiguousarray(k, dtype=np.float32)
    modality = np.ascontiguousarray(modality, dtype=np.int8)
    return LayerView(i_layer, n_layer, budget, recent, token, modality, self_, cross, k)


def call(name: str, settings: ctypes.Structure | None, view: LayerView, n_threads: int = 2) -> Any:
    """Kept cells and merges of every head, or None. What lies beyond them must stay as it was."""
    n_head_kv, n_cells = view.self_.shape
    guard = 5
    n_kept = np.full(n_head_kv + guard, NONE, dtype=np.uint32)
    kept, merge = (np.full(n_head_kv * n_cells + guard, NONE, dtype=np.uint32) for _ in range(2))

    def pointer(array: Any, kind: Any) -> Any:
        return None if array is None else array.ctypes.data_as(ctypes.POINTER(kind))

    sizes = n_head_kv, 0 if view.k is None else view.k.shape[2], n_cells, view.budget, view.recent
    done = native.csp_policy(name)(
        native.CspView(
            view.i_layer,
            view.n_layer,
            *sizes,
            n_threads,
            pointer(view.token, U32),
            pointer(view.modality, I8),
            pointer(view.self_, F32),
            pointer(view.cross, F32),
            pointer(view.k, F32),
        ),
        native.CspChoice(*(pointer(array, U32) for array in (n_kept, kept, merge))),
        None if settings is None else ctypes.addressof(settings),
    )
    assert (n_kept[n_head_kv:] == NONE).all()
    assert (kept[n_head_kv * n_cells :] == NONE).all()
    assert (merge[n_head_kv * n_cells :] == NONE).all()
    kept, merge = (a[: n_head_kv * n_cells].reshape(n_head_kv, -1) for a in (kept, merge))
    if not done:
        assert (kept == NONE).all() and (merge == NONE).all()
        return None
    rows = [row[:n] for row, n in zip(kept, n_kept[:n_head_kv], strict=True)]
    for row, n in zip(kept, n_kept[:n_head_kv], strict=True):
        assert (row[n:] == NONE).all()
    merges = [{i: int(j) for i, j in enumerate(row) if j != NONE} for row in merge]
    return [row.tolist() for row in rows], merges


def select(chosen: Policy, view: LayerView) -> list[list[int]]:
    kept, _ = call(*chosen.native_call(), view)
    return kept


def random_case(rng: np.random.Generator) -> LayerView:
    n_head_kv = int(rng.integers(1, 4))
    n_cells = int(rng.choice([2, 3, 5, 17, 40, 64]))
    # exact in every order of adding them up
    scores = rng.integers(0, 2**16, (2, n_head_kv, n_cells)) / 2**16
    match rng.integers(7):
        case 0:  # ties
            scores = rng.integers(0, 3, scores.shape) / 4
        case 1:  # nothing from another modality
            scores[1] = 0
        case 2:  # nothing but
            scores[0] = 0
        case 3:  # most was not attended to
            scores[:, rng.random((n_head_kv, n_cells)) < 0.8] = 0
        case 4:
            scores[rng.random(scores.shape) < 0.3] = np.nan
        case 5:  # far apart
            scores = 2.0 ** rng.integers(-40, 1, scores.shape)
    modality = rng.random((n_head_kv, n_cells)) < rng.choice([0, 0.2, 0.7, 1])
    # exact in float32, with keys that are equal, opposite and zero
    k = rng.integers(-2, 3, (n_head_kv, n_cells, int(rng.choice([1, 2, 4, 16, 21]))))
    budget = int(rng.integers(1, n_cells))
    recent = int(rng.choice([0, budget, rng.integers(0, budget + 1), budget // 2]))
    n_layer = int(rng.integers(1, 9))
    i_layer = int(rng.integers(n_layer))
    return layer(*scores, budget, recent, modality, k, i_layer, n_layer)


def expected(chosen: Policy, view: LayerView) -> Any:
    self, cross = (s.astype(np.float64) for s in (view.self_, view.cross))
    k = view.k.astype(np.float64)
    cells = view.budget, view.recent
    match chosen:
        case CSP(cross_ratio=ratio, distance=distance):
            return statement.csp(self, cross, *cells, ratio, distance, k, view.modality)
        case Pyramid(beta=beta, kernel=kernel, pooling=pooling):
            where = view.i_layer, view.n_layer
            return statement.pyramid(self, cross, *cells, *where, beta, kernel, pooling)
        case AdaKV(safeguard=safeguard, kernel=kernel, pooling=pooling):
            return statement.adakv(self, cross, *cells, safeguard, kernel, pooling)
        case SnapKV(kernel=kernel, pooling=pooling):
            return statement.snapkv(self, cross, *cells, kernel, pooling)
        case H2O():
            return statement.h2o(self, cross, *cells)
        case Streaming(sinks=sinks):
            return statement.streaming(self, *cells, sinks)
        case LookM():
            return statement.lookm(self, cross, *cells, view.modality, k)[0]
        case Random(seed=seed):
            return statement.random(self, *cells, view.i_layer, seed)


@pytest.mark.parametrize(
    "chosen",
    [
        CSP(),
        CSP(cross_ratio=0.0),
        CSP(cross_ratio=0.7),
        CSP(cross_ratio=1.0),
        CSP(distance=0.0),
        CSP(distance=4.0),
        CSP(distance=0.3, cross_ratio=0.5),
        CSP(distance=1e6),
        SnapKV(),
        SnapKV(kernel=1),
        SnapKV(kernel=5, pooling="average"),
        SnapKV(kernel=99, pooling="average"),
        H2O(),
        Streaming(),
        Streaming(sinks=0),
        Streaming(sinks=2**32 - 1),
        LookM(),
        Pyramid(),
        Pyramid(beta=1),
        Pyramid(beta=2.5, kernel=3, pooling="average"),
        Pyramid(beta=1e300),
        AdaKV(),
        AdaKV(safeguard=0),
        AdaKV(safeguard=1, kernel=3, pooling="average"),
        Random(),
        Random(seed=2**64 - 1),
    ],
    ids=repr,
)
def test_equals_the_statement(chosen: Policy) -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        view = random_case(rng)
        assert select(chosen, view) == expected(chosen, view)


@pytest.mark.parametrize("kind", RIVALS)
def test_keeps_the_budget(kind: type[Policy]) -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        view = random_case(rng)
        n_head_kv, n_cells = view.self_.shape
        kept = select(kind(), view)
        for cells in kept:
            assert cells == sorted(set(cells)) and cells[0] >= 0 and cells[-1] < n_cells
            assert cells[len(cells) - view.recent :] == [*range(n_cells - view.recent, n_cells)]
        if kind is AdaKV:
            assert sum(map(len, kept)) == n_head_kv * view.budget
        elif kind is not Pyramid:
            assert {len(cells) for cells in kept} == {view.budget}


@pytest.mark.parametrize("kind", RIVALS)
def test_no_settings_are_the_defaults(kind: type[Policy]) -> None:
    rng = np.random.default_rng(2)
    # the library keeps to the paper
    defaults = CSP(distance=0) if kind is CSP else kind()
    name, settings = defaults.native_call()
    for _ in range(30):
        view = random_case(rng)
        assert call(name, None, view) == call(name, settings, view)


@pytest.mark.parametrize("kind", [SnapKV, Pyramid, AdaKV])
@pytest.mark.parametrize("kernel", [0, 4, 101, 2**32 - 1])
def test_kernels_that_the_library_refuses(kind: type[Policy], kernel: int) -> None:
    name, settings = kind().native_call()
    score = settings if kind is SnapKV else settings.score
    score.kernel = kernel
    assert call(name, settings, layer([1, 2, 3], [0, 0, 0], 2, 1)) is None


@pytest.mark.parametrize(
    ("chosen", "setting", "value"),
    [
        (CSP(), "cross_ratio", 1.1),
        (CSP(), "cross_ratio", np.nan),
        (CSP(), "distance", -np.inf),
        (CSP(), "distance", np.nan),
        (CSP(), "distance", np.inf),
        (Pyramid(), "beta", 0.9),
        (Pyramid(), "beta", np.nan),
        (AdaKV(), "safeguard", -0.1),
        (AdaKV(), "safeguard", 1.1),
        (AdaKV(), "safeguard", np.nan),
    ],
)
def test_settings_that_the_library_refuses(chosen: Policy, setting: str, value: float) -> None:
    name, settings = chosen.native_call()
    view = layer([1, 2, 3], [0, 0, 0], 2, 1, k=np.ones((1, 3, 2)))
    assert call(name, settings, view)
    setattr(settings, setting, value)
    assert call(name, settings, view) is None


@pytest.mark.parametrize(
    ("chosen", "modality", "done"),
    [
        (CSP(distance=0), [1, 1, 1], True),
        (CSP(distance=1), [0, 0, 0], False),
        (CSP(), [0, 0, 1], True),  # no picture to choose from
        (CSP(), [0, 1, 0], False),
        (LookM(), [0, 0, 0], False),
    ],
)
def test_without_keys(chosen: Policy, modality: list[int], done: bool) -> None:
    view = layer([[1, 2, 3]] * 2, np.zeros((2, 3)), 2, 1, [[0, 0, 0], modality])
    expected = ([[1, 2]] * 2, [{}] * 2) if done else None
    assert call(*chosen.native_call(), view) == expected


def test_which_keys_are_needed() -> None:
    assert CSP().needs_keys == "pictures"
    assert CSP(distance=0.5).needs_keys is LookM().needs_keys is True
    assert CSP(distance=0).needs_keys is SnapKV().needs_keys is False


# distance between keys


@pytest.mark.parametrize("recent", [0, 5, 40])
def test_many_keys(recent: int) -> None:
    rng = np.random.default_rng(4)
    # a few directions, all products of two keys being exact in float32
    k = rng.integers(-60, 61, (2, 9, 64))[:, rng.integers(9, size=250)]
    k = k + rng.integers(-40, 41, k.shape)
    scores = np.exp(rng.normal(size=(2, 2, 250)))
    view = layer(*scores, 150, recent, rng.random((2, 250)) < 0.8, k)
    for chosen in CSP(), CSP(cross_ratio=0.4, distance=3), CSP(distance=200):
        kept = select(chosen, view)
        assert kept == expected(chosen, view) != select(CSP(distance=0), view)

    scores = (s.astype(np.float64) for s in (view.self_, view.cross))
    merges = statement.lookm(*scores, 150, recent, view.modality, view.k.astype(np.float64))
    assert call("llama_csp_policy_lookm", None, view) == merges


def test_any_number_of_threads() -> None:
    rng = np.random.default_rng(5)
    scores, modality = rng.random((2, 7, 90)), rng.random((7, 90)) < 0.5
    view = layer(*scores, 40, 4, modality, rng.normal(size=(7, 90, 8)))
    for chosen in CSP(), LookM():
        one, *others = (call(*chosen.native_call(), view, n) for n in (1, 0, 2, 3, 7, 50))
        assert others == [one] * 5


def test_keys_that_are_not_finite() -> None:
    k = np.ones((1, 80, 3))
    k[:, ::2] = np.nan
    k[:, ::3] = np.inf
    k[:, ::5] = 1e30
    for score in np.ones(80), np.full(80, np.inf):
        view = layer(score, np.zeros(80), 60, 4, np.ones((1, 80)), k)
        for chosen in CSP(), LookM():
            (kept,) = select(chosen, view)
            assert len(set(kept)) == 60


def test_distance_takes_the_other_direction() -> None:
    # the best three point one way, the fourth another: it is worth more than a second of those
    k = [[[1, 0], [2, 0], [3, 0], [0, 1], [1, 1]]]
    score = [5, 4, 3, 2, 0]
    assert select(CSP(distance=0), layer(score, np.zeros(5), 2, 0, k=k)) == [[0, 1]]
    # ln(4/2) is 0.69, and after one draw a fifth of the distance counts
    assert select(CSP(distance=3.4), layer(score, np.zeros(5), 2, 0, k=k)) == [[0, 1]]
    assert select(CSP(distance=3.5), layer(score, np.zeros(5), 2, 0, k=k)) == [[0, 3]]


def test_distance_counts_from_the_recent_cells_too() -> None:
    k = [[[0, 0, 1], [1, 0, 0], [0, 1, 0], [1, 0, 0]]]
    view = layer([3, 2, 1, 0], np.zeros(4), 3, 1, k=k)
    assert select(CSP(distance=0), view) == [[0, 1, 3]]
    assert select(CSP(distance=4.0), view) == [[0, 2, 3]]


def test_opposite_keys_are_not_near() -> None:
    k = [[[1, 0], [-1, 0], [0, 1]]]
    assert select(CSP(distance=9.0), layer([3, 2, 1], np.zeros(3), 2, 0, k=k)) == [[0, 1]]


# the others


def test_pooling_keeps_neighbours() -> None:
    score = np.zeros(12)
    score[5] = 1
    view = layer(score, np.zeros(12), 4, 1)
    assert select(SnapKV(kernel=3), view) == [[4, 5, 6, 11]]
    assert select(SnapKV(kernel=3, pooling="average"), view) == [[4, 5, 6, 11]]
    assert select(SnapKV(kernel=1), view) == [[0, 1, 5, 11]]


def test_recent_cells_do_not_pool_into_others() -> None:
    view = layer([0, 1, 0, 0, 9], np.zeros(5), 2, 1)
    assert select(SnapKV(kernel=3), view) == [[0, 4]]


def test_streaming() -> None:
    view = layer(np.arange(20), np.zeros(20), 8, 4)
    assert select(Streaming(), view) == [[0, 1, 2, 3, 16, 17, 18, 19]]
    assert select(Streaming(sinks=1), view) == [[0, *range(13, 20)]]


def test_lookm_keeps_text_and_merges_pictures() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        view = random_case(rng)
        scores = (s.astype(np.float64) for s in (view.self_, view.cross))
        cells = view.budget, view.recent
        assert call(*LookM().native_call(), view) == statement.lookm(
            *scores, *cells, view.modality, view.k.astype(np.float64)
        )


def test_lookm_prefers_text_of_no_attention() -> None:
    k = [[[1, 0], [0, 1], [0, 2], [1, 1]]]
    view = layer([0, 3, 2, 0], np.zeros(4), 2, 1, modality=[[0, 1, 1, 0]], k=k)
    kept, merges = call(*LookM().native_call(), view)
    assert kept == [[0, 3]]
    assert merges == [{1: 3, 2: 3}]


@pytest.mark.parametrize("beta", [1, 1.5, 3, 20, 1000])
@pytest.mark.parametrize("n_layer", [1, 2, 3, 8, 33])
def test_pyramid_falls_and_sums_to_the_budget(n_layer: int, beta: float) -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        n_cells = int(rng.integers(2, 60))
        budget = int(rng.integers(1, n_cells))
        recent = int(rng.integers(0, budget + 1))
        budgets = [
            len(kept)
            for i in range(n_layer)
            for kept in select(
                Pyramid(beta=beta),
                layer(*rng.random((2, n_cells)), budget, recent, None, None, i, n_layer),
            )
        ]
        assert sum(budgets) == n_layer * budget
        assert budgets == sorted(budgets, reverse=True)
        assert budgets[-1] > recent or budget == recent
        steps = -np.diff(budgets)
        assert not len(steps) or max(steps) - min(steps) <= 2


def test_pyramid_is_as_steep_as_the_paper_says() -> None:
    score = np.arange(1000, 0, -1)
    budgets = [
        len(select(Pyramid(), layer(score, score, 216, 16, None, None, i, 5))[0]) for i in range(5)
    ]
    assert budgets == [16 + 390, 16 + 295, 16 + 200, 16 + 105, 16 + 10]


def test_adakv_gives_to_the_head_that_spreads() -> None:
    flat, peaked = np.full(40, 0.5), np.zeros(40)
    peaked[7] = 1
    view = layer([flat, peaked], np.zeros((2, 40)), 12, 2)
    kept = select(AdaKV(kernel=1), view)
    assert [len(cells) for cells in kept] == [2 + 18, 2 + 2]
    kept = select(AdaKV(kernel=1, safeguard=0), view)
    assert [len(cells) for cells in kept] == [2 + 19, 2 + 1]
    assert {len(cells) for cells in select(AdaKV(safeguard=1), view)} == {12}


def test_adakv_leaves_no_head_without_a_cell() -> None:
    view = layer([np.ones(10), np.zeros(10)], np.zeros((2, 10)), 3, 0)
    assert [len(cells) for cells in select(AdaKV(safeguard=0), view)] == [5, 1]


def test_random_is_uniform_and_repeats() -> None:
    count = np.zeros(50)
    for i in range(400):
        view = layer(np.arange(50), np.zeros(50), 15, 5, None, None, i, 400)
        kept = select(Random(), view)
        assert kept == select(Random(), view)
        count[kept[0]] += 1
    assert (count[45:] == 400).all()
    # 400 draws of 10 of 45: 89 each, with a standard deviation of 8.3
    assert count[:45].min() > 55 and count[:45].max() < 125
    seeds = {tuple(select(Random(seed=s), view)[0]) for s in range(20)}
    assert len(seeds) == 20


def test_splitmix64() -> None:
    # the first outputs for seed 1234567, as its reference implementation prints them
    assert [statement.splitmix64(1234567, n) for n in range(2)] == [
        6457827717110365317,
        3203168211198807973,
    ]


# in Python


def test_every_policy_by_name() -> None:
    assert {type(policy(name)) for name in POLICIES} == {*RIVALS, Full}
    assert policy("snapkv", kernel=5, pooling="average") == SnapKV(kernel=5, pooling="average")
    assert policy("pyramid", budget=0.1, beta=4) == Pyramid(0.1, beta=4)
    with pytest.raises(PolicyError, match="policy 'h2o' has no setting 'sinks'"):
        policy("h2o", sinks=4)


@pytest.mark.parametrize("kind", RIVALS)
def test_every_policy_has_the_settings_of_all(kind: type[Policy]) -> None:
    lookahead = 16 if kind is CSP else 0
    assert kind(50, window=0.1, recent=5).resolve(100) == Resolved(50, 10, 5, lookahead)
    assert kind().resolve(1000).budget == 200
    assert kind().resolve(100).budget == 128
    for name, value in {"budget": 0, "window": 0, "recent": -1}.items():
        with pytest.raises(PolicyError, match=f"^{name}="):
            kind(**{name: value})
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind().budget = 1  # type: ignore[misc]
    assert hash(kind(20)) == hash(kind(20)) and kind(20) == kind(20) != kind(21)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (SnapKV(100), (100, 16, 16)),
        (LookM(100), (100, 16, 16)),
        (Pyramid(100), (100, 16, 16)),
        (AdaKV(100), (100, 16, 16)),
        (H2O(100), (100, 500, 50)),
        (H2O(1), (1, 500, 0)),
        (Streaming(100), (100, 1, 96)),
        (Streaming(5), (5, 1, 3)),
        (Streaming(1), (1, 1, 1)),
        (Streaming(100, sinks=0), (100, 1, 100)),
        (Random(100), (100, 1, 16)),
    ],
)
def test_resolve(chosen: Policy, expected: tuple[int, int, int]) -> None:
    assert chosen.resolve(500) == Resolved(*expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("csp", {"distance": value}) for value in (-0.1, np.nan, np.inf, True, "4")),
        *(
            (name, {"kernel": value})
            for name in ("snapkv", "pyramid", "adakv")
            for value in (0, 2, 101, -3, 7.0, True, "7", None)
        ),
        *(("snapkv", {"pooling": value}) for value in ("avg", "", None, 0)),
        *(("streaming", {"sinks": value}) for value in (-1, 2**32, 0.1, True, None, "4")),
        *(("pyramid", {"beta": value}) for value in (0, 0.99, np.nan, np.inf, True, "20", None)),
        *(("adakv", {"safeguard": value}) for value in (-0.1, 1.1, np.nan, True, "0.2", None)),
        *(("random", {"seed": value}) for value in (-1, 2**64, 0.5, True, None, "1")),
    ],
)
def test_settings_out_of_range(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=f"^{next(iter(options))}=") as error:
        policy(name, **options)
    assert "\n" not in str(error.value)


def test_a_policy_of_ones_own_needs_select() -> None:
    class Forgetful(Policy):
        pass

    assert Forgetful().native_call() is None
    with pytest.raises(PolicyError, match=r"Forgetful has no select\(layer\)"):
        Forgetful().select(layer([1, 2], [0, 0], 1, 1))


# in a chat


@pytest.mark.parametrize("kind", RIVALS)
def test_chat(kind: type[Policy], scenes: list[Path]) -> None:
    with EdgeVLM.demo(cache=kind(0.3), n_threads=1) as vlm:
        result = vlm.chat("What is in image 2?", images=scenes[:4], max_tokens=4)
    cache = result.cache
    budget = int(0.3 * cache.cells_before)
    per_head = [len(cells) for layer in cache.kept for cells in layer]
    assert max(per_head) == cache.cells_after
    assert np.mean(per_head) == budget
    assert (len(set(per_head)) > 1) == (kind in (Pyramid, AdaKV))


def test_chat_over_budgets_that_differ(scenes: list[Path]) -> None:
    # a layer of which little is left, and one of which much is
    with EdgeVLM.demo(cache=Pyramid(0.2), n_threads=1) as vlm:
        kept = vlm.chat("What is in image 2?", images=scenes[:4], max_tokens=1).cache.kept
    by_layer = [len(layer[0]) for layer in kept]
    assert by_layer == sorted(by_layer, reverse=True) and by_layer[0] > 1.5 * by_layer[-1]


# docs/policies.md

DOCS = (Path(__file__).parents[1] / "docs" / "policies.md").read_text()


def test_the_table_has_every_policy() -> None:
    assert set(re.findall(r"^\| `(\w+)`", DOCS, re.MULTILINE)) == set(POLICIES)


def test_your_own_policy(tmp_path: Path, monkeypatch, capsys, scenes: list[Path]) -> None:
    by_name, own = re.findall(r"^```python\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)
    for name, path in zip(("a.png", "b.png"), scenes, strict=False):
        shutil.copy(path, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(own, "policies.md", "exec"), names)
    assert capsys.readouterr().out.strip()
    exec(compile(by_name, "policies.md", "exec"), names)
    assert names["vlm"].cache == Pyramid(0.1, beta=10)
    names["vlm"].close()

    spread = names["Spread"]()
    view = layer([0, 0, 9, 0, 0, 8, 7, 0, 0, 0], np.zeros(10), 6, 2)
    assert [cells.tolist() for cells in spread.select(view)] == [[0, 2, 5, 7, 8, 9]]
    view = layer([0, 0, 9, 0], np.zeros(4), 2, 2)
    assert [cells.tolist() for cells in spread.select(view)] == [[2, 3]]
