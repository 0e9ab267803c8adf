"""Cross-Self Pruning stated plainly in NumPy, in float64: what native/ is held against.

From the definitions of arXiv 2412.04652, section 3, for one layer. Nothing here is shared with
the native code.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def visible(
    window_pos: NDArray[np.int32], pos: NDArray[np.int32], n_chosen: int = 0
) -> NDArray[np.bool_]:
    """Which cells each query of the window sees, [n_window, n_cells]: those before it and itself.

    The first `n_chosen` cells are left from an earlier pruning, before all queries.
    """
    seen = pos[None, :] <= window_pos[:, None]
    seen[:, :n_chosen] = True
    return seen


def logits(q: Floats, k: Floats, scale: float) -> Floats:
    """Attention logits [n_window, n_head, n_cells] of q [n_window, n_head, head_dim] and
    k [n_cells, n_head_kv, head_dim]: several query heads share a KV head.
    """
    n_group = q.shape[1] // k.shape[1]
    return scale * np.einsum("qhd,khd->qhk", q, np.repeat(k, n_group, axis=1))


def softmax_n(x: Floats, n: float) -> Floats:
    """exp(x_j) / (n + sum_i exp(x_i)) over the last axis."""
    shift = np.maximum(x.max(axis=-1, keepdims=True), 0 if n else -np.inf)
    e = np.exp(x - shift)
    return e / (n * np.exp(-shift) + e.sum(axis=-1, keepdims=True))


def scores(
    x: Floats,
    seen: NDArray[np.bool_],
    window_modality: NDArray[np.int8],
    modality: NDArray[np.int8],
    n: float,
    weights: Floats | None = None,
) -> tuple[Floats, Floats]:
    """Self and cross scores [n_head_kv, n_cells].

    x: logits [n_window, n_head, n_cells]; modality: of each head's cells, [n_head_kv, n_cells];
    weights: of the queries, [n_window].
    """
    attention = softmax_n(np.where(seen[:, None, :], x, -np.inf), n)
    if weights is not None:
        attention *= weights[:, None, None]
    n_window, n_head, n_cells = attention.shape
    n_head_kv = len(modality)
    attention = attention.reshape(n_window, n_head_kv, n_head // n_head_kv, n_cells).sum(axis=2)
    same = window_modality[:, None, None] == modality[None]
    return np.where(same, attention, 0).sum(axis=0), np.where(same, 0, attention).sum(axis=0)


def cross_ratio(self: Floats, cross: Floats, recent: int) -> float:
    """The automatic r of one head: the cross share of the scores of the cells to choose from."""
    n = max(len(self) - recent, 0)
    total = self[:n].sum() + cross[:n].sum()
    return float(cross[:n].sum() / total) if total > 0 else 0.0


def best(score: Floats, n: int) -> list[int]:
    """Indices of the n highest scores, ties to the lower index."""
    return [int(i) for i in np.argsort(-score, kind="stable")[:n]]


def select(self: Floats, cross: Floats, budget: int, recent: int, ratio: float | None) -> list[int]:
    """The cells one head keeps, of scores [n_cells]."""
    n_cells = len(self)
    budget = min(budget, n_cells)
    recent = min(recent, budget)
    if ratio is None:
        ratio = cross_ratio(self, cross, recent)
    n_old = n_cells - recent
    k = budget - recent
    drawn = best(cross[:n_old], int(np.floor(k * ratio)))
    rest = self[:n_old].copy()
    rest[drawn] = -np.inf
    drawn += best(rest, k - len(drawn))
    return sorted(drawn) + list(range(n_old, n_cells))


def evicted_mass(
    x: Floats, seen: NDArray[np.bool_], kept: list[list[int]], n_head_kv: int
) -> Floats:
    """Per query head: the window's mean log of the evicted cells' summed exponentials."""
    n_head = x.shape[1]
    res = np.empty(n_head)
    for head in range(n_head):
        evicted = np.ones(x.shape[2], dtype=bool)
        evicted[kept[head // (n_head // n_head_kv)]] = False
        masked = np.where(seen & evicted, x[:, head], -np.inf)
        sums = np.logaddexp.reduce(masked, axis=-1)
        res[head] = sums[np.isfinite(sums)].mean()
    return res
