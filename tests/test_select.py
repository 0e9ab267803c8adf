"""llama_csp_select(), the pure function, against the plain statement."""

import ctypes

import numpy as np
import pytest

import csp_statement
from csp_edge import native


def select(self, cross, budget, recent, ratio):
    self, cross = (np.ascontiguousarray(s, dtype=np.float32) for s in (self, cross))
    kept = np.full(len(self) + 1, 0xFFFFFFFF, dtype=np.uint32)  # one more, to see a write beyond
    floats, indices = (ctypes.POINTER(t) for t in (ctypes.c_float, ctypes.c_uint32))
    n = native.csp_select(
        self.ctypes.data_as(floats),
        cross.ctypes.data_as(floats),
        len(self),
        budget,
        recent,
        -1.0 if ratio is None else ratio,
        kept.ctypes.data_as(indices),
    )
    assert (kept[n:] == 0xFFFFFFFF).all()
    return kept[:n].tolist()


def random_case(rng):
    n = int(rng.choice([1, 2, 3, 5, 17, 64, 300]))
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
    budget = int(rng.integers(1, n + 3))
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


def test_a_budget_beyond_the_prompt_keeps_everything():
    assert select(np.ones(7), np.ones(7), budget=100, recent=100, ratio=None) == [*range(7)]


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
