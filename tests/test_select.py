"""llama_csp_policy_csp(), the pure function, against the plain statement."""

import ctypes

import numpy as np
import pytest

import csp_statement
from csp_edge import native

CSP = native.csp_policy("llama_csp_policy_csp")


def select(self, cross, budget, recent, ratio):
    n = len(self)
    self, cross = (np.ascontiguousarray(s, dtype=np.float32) for s in (self, cross))
    # one more, to see a write beyond
    kept, merge, n_kept = (np.full(m + 1, 0xFFFFFFFF, dtype=np.uint32) for m in (n, n, 1))
    floats, indices = (ctypes.POINTER(t) for t in (ctypes.c_float, ctypes.c_uint32))
    view = native.CspView(0, 1, 1, 0, n, budget, recent)
    view.self, view.cross = self.ctypes.data_as(floats), cross.ctypes.data_as(floats)
    choice = native.CspChoice(*(a.ctypes.data_as(indices) for a in (n_kept, kept, merge)))
    settings = (ctypes.c_double * 2)(-1.0 if ratio is None else ratio, 0.0)
    assert CSP(ctypes.byref(view), ctypes.byref(choice), settings)
    assert n_kept[1] == 0xFFFFFFFF and (kept[n_kept[0] :] == 0xFFFFFFFF).all()
    assert (merge == 0xFFFFFFFF).all()
    return kept[: n_kept[0]].tolist()


def random_case(rng):
    n = int(rng.choice([2, 3, 5, 17, 64, 300]))
    scores = rng.random((2, n))
    match rng.integers(5):
        case 0:  # ties
            scores = rng.integers(0, 3, (2, n)) / 4
        case 1:  # one modality only: all self
            scores[1] = 0
        case 2:  # all cross
            scores[0] = 0
        case 3:  # nothing at all was attended to
            scores[:, rng.random(n) < 0.7] = 0
    budget = int(rng.integers(1, n))
    recent = int(rng.integers(0, budget + 1))
    ratio = rng.choice([None, 0.0, 0.1, 0.5, 0.7, 0.9, 1.0])
    return scores.astype(np.float32), budget, recent, ratio


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_statement(seed):
    rng = np.random.default_rng(seed)
    for _ in range(1000):
        (self, cross), budget, recent, ratio = random_case(rng)
        expected = csp_statement.select(
            self.astype(np.float64), cross.astype(np.float64), budget, recent, ratio
        )
        assert select(self, cross, budget, recent, ratio) == expected


def test_keeps_budget_distinct_cells_in_order():
    # the same cells lead both scores: drawn twice, they would stand twice in the cache
    score = np.arange(100, 0, -1)
    assert select(score, score, budget=20, recent=4, ratio=0.5) == [*range(16), *range(96, 100)]


def test_ties_go_to_the_lower_index():
    flat = np.ones(10)
    assert select(flat, flat, budget=5, recent=1, ratio=0.5) == [0, 1, 2, 3, 9]


def test_the_ratio_is_exact():
    # floor(10 * 0.7) is 7 in doubles, and 6 if the ratio were a float
    cross = np.array([1] * 10 + [0] * 10)
    self = 1 - cross
    assert sum(i < 10 for i in select(self, cross, budget=10, recent=0, ratio=0.7)) == 7


def test_nan_scores_are_worst():
    nan = np.full(50, np.nan)
    nan[40] = 1
    assert select(nan, nan, budget=3, recent=1, ratio=0.0) == [0, 40, 49]


def test_infinite_scores_are_scores():
    inf = np.full(20, np.inf)
    assert select(inf, inf, budget=4, recent=1, ratio=None) == [0, 1, 2, 19]
