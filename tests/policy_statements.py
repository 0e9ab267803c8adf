"""The policies in plain NumPy, float64, sharing nothing with the native code.

Each takes scores self and cross [n_head_kv, n_cells] and returns, for every head, the cells it
keeps in ascending order. Window attention is their sum, NaN counting as none.
"""

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Kept = list[list[int]]

_TINY = float(np.finfo(np.float32).tiny)


def best(score: Floats, n: int, among: list[int]) -> list[int]:
    """The n cells of `among` with the highest score, ties to the lower index, NaN last."""
    rank = np.where(np.isnan(score), -np.inf, score)
    return sorted(among, key=lambda i: (-rank[i], i))[:n]


def attention(self: Floats, cross: Floats) -> Floats:
    return np.nan_to_num(self + cross, nan=0.0, posinf=np.inf)


def pool(score: Floats, kernel: int, pooling: str) -> Floats:
    """Of one head, over its neighbours, zeros beyond both ends."""
    around = np.lib.stride_tricks.sliding_window_view(np.pad(score, kernel // 2), kernel)
    return around.max(axis=1) if pooling == "max" else around.sum(axis=1) / kernel


def cosine(a: Floats, b: Floats) -> float:
    scale = math.sqrt(a @ a) * math.sqrt(b @ b)
    return float(a @ b) / scale if scale else 0.0


def _with_recent(drawn: list[int], n_cells: int, recent: int) -> list[int]:
    return sorted(drawn) + list(range(n_cells - recent, n_cells))


def apart(
    score: Floats,
    n: int,
    among: list[int],
    recent: list[int],
    drawn: list[int],
    k: Floats,
    distance: float,
) -> list[int]:
    """Drawn one by one, away from the keys of the cells that are there, k [n_cells, head_dim]."""
    there, near = recent + drawn, dict.fromkeys(among, 0.0)
    new = there
    for i_draw in range(len(drawn), len(drawn) + n):
        for i in near:
            near[i] = max([near[i]] + [cosine(k[i], k[j]) for j in new])
        value = {
            i: math.log(score[i] if score[i] > _TINY else _TINY)
            - distance * i_draw / (i_draw + 4) * c * c
            for i, c in near.items()
        }
        new = [min(value, key=lambda i: (-value[i], i))]
        there += new
        del near[new[0]]
    return there[len(there) - n :]


def csp(
    self: Floats,
    cross: Floats,
    budget: int,
    recent: int,
    ratio: float | None = None,
    distance: float | None = 0.0,
    k: Floats | None = None,
    modality: NDArray[np.int8] | None = None,
) -> Kept:
    """k: [n_head_kv, n_cells, head_dim], for a distance above 0; modality, where it is None."""
    n_cells = self.shape[1]
    old, last = list(range(n_cells - recent)), list(range(n_cells - recent, n_cells))
    kept = []
    for h in range(len(self)):
        total = self[h, old].sum() + cross[h, old].sum()
        share = cross[h, old].sum() / total if np.isfinite(total) and total > 0 else 0.0
        n_cross = math.floor((budget - recent) * (share if ratio is None else ratio))
        drawn: list[int] = []
        for score, n in (cross[h], n_cross), (self[h], budget - recent - n_cross):
            rest = [i for i in old if i not in drawn]
            apartness = (32 if 1 in modality[h, old] else 0) if distance is None else distance
            if apartness:
                drawn += apart(score, n, rest, last, drawn, k[h], apartness)
            else:
                drawn += best(score, n, rest)
        kept.append(sorted(drawn) + last)
    return kept


def snapkv(
    self: Floats, cross: Floats, budget: int, recent: int, kernel: int = 7, pooling: str = "max"
) -> Kept:
    n_cells = self.shape[1]
    old = n_cells - recent
    return [
        _with_recent(
            best(pool(score[:old], kernel, pooling), budget - recent, list(range(old))),
            n_cells,
            recent,
        )
        for score in attention(self, cross)
    ]


def h2o(self: Floats, cross: Floats, budget: int, recent: int) -> Kept:
    return snapkv(self, cross, budget, recent, kernel=1)


def streaming(self: Floats, budget: int, recent: int, sinks: int = 4) -> Kept:
    n_head_kv, n_cells = self.shape
    n_first = min(sinks, budget - recent)
    first = list(range(n_first))
    return [first + list(range(n_cells - budget + n_first, n_cells))] * n_head_kv


def lookm(
    self: Floats,
    cross: Floats,
    budget: int,
    recent: int,
    modality: NDArray[np.int8],
    k: Floats,
) -> tuple[Kept, list[dict[int, int]]]:
    """Also, for every head, the kept cell that each evicted picture cell is merged into."""
    n_cells = self.shape[1]
    raised = attention(self, cross)
    raised = np.where(modality == 0, raised + raised.max(axis=1, keepdims=True) + 1, raised)
    kept, merged = [], []
    for h in range(len(self)):
        drawn = best(raised[h], budget - recent, list(range(n_cells - recent)))
        kept.append(_with_recent(drawn, n_cells, recent))
        evicted = [i for i in range(n_cells) if modality[h, i] and i not in kept[h]]
        merged.append({})
        for i in evicted:
            cosines = [cosine(k[h, i], k[h, j]) for j in kept[h]]
            merged[h][i] = kept[h][int(np.argmax(cosines))]
    return kept, merged


def pyramid_budgets(
    n_layer: int, n_cells: int, budget: int, recent: int, beta: float = 20.0
) -> list[int]:
    """What every head of each layer keeps."""
    k = budget - recent
    if k == 0 or n_layer == 1:
        return [budget] * n_layer
    first = min(2 * k - max(1, math.floor(k / beta)), n_cells - recent)
    line = np.linspace(first, 2 * k - first, n_layer)
    half = [math.ceil(x - 1e-9) for x in line[: n_layer // 2]]
    middle = [k] * (n_layer % 2)
    return [recent + x for x in half + middle + [2 * k - x for x in reversed(half)]]


def pyramid(
    self: Floats,
    cross: Floats,
    budget: int,
    recent: int,
    i_layer: int,
    n_layer: int,
    beta: float = 20.0,
    kernel: int = 7,
    pooling: str = "max",
) -> Kept:
    budgets = pyramid_budgets(n_layer, self.shape[1], budget, recent, beta)
    return snapkv(self, cross, budgets[i_layer], recent, kernel, pooling)


def adakv(
    self: Floats,
    cross: Floats,
    budget: int,
    recent: int,
    safeguard: float = 0.2,
    kernel: int = 7,
    pooling: str = "max",
) -> Kept:
    n_head_kv, n_cells = self.shape
    old = n_cells - recent
    k = budget - recent
    scores = [pool(score[:old], kernel, pooling) for score in attention(self, cross)]
    least = max(math.floor(k * safeguard), 1 if recent == 0 else 0)
    drawn = [best(score, least, list(range(old))) for score in scores]
    rest = [(h, i) for h in range(n_head_kv) for i in range(old) if i not in drawn[h]]
    rest.sort(key=lambda hi: (-scores[hi[0]][hi[1]], hi))
    for h, i in rest[: n_head_kv * (k - least)]:
        drawn[h].append(i)
    return [_with_recent(cells, n_cells, recent) for cells in drawn]


def splitmix64(seed: int, n: int) -> int:
    """Output number n, from 0."""
    mask = 2**64 - 1
    z = (seed + (n + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def random(self: Floats, budget: int, recent: int, i_layer: int, seed: int = 0) -> Kept:
    n_head_kv, n_cells = self.shape
    kept = []
    for h in range(n_head_kv):
        first = (i_layer * n_head_kv + h) * n_cells
        old = range(n_cells - recent)
        drawn = sorted(old, key=lambda i: -splitmix64(seed, first + i))[: budget - recent]
        kept.append(_with_recent(drawn, n_cells, recent))
    return kept
