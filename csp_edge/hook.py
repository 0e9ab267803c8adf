"""The pruning hook on a context: llama-csp.h with arrays."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from csp_edge import native
from csp_edge.errors import CspEdgeError, MemoryLimitError, ModelError
from csp_edge.policies import CSP


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Layer:
    """One pruned layer. Tokens are indices into the conversation.

    kept: uint32 [n_head_kv, n_kept], ascending: the token in each cell.
    sink: float32 [n_head], logits, or None.

    Only with inspect=True, else None:
    token: uint32 [n_head_kv, n_cells]: the token in each cell before.
    q: float32 [n_window, n_head, head_dim]; k: float32 [n_cells, n_head_kv, head_dim], after RoPE.
    self_, cross: float32 [n_head_kv, n_cells]: the scores (section 3.2).
    """

    il: int
    kq_scale: float
    kept: npt.NDArray[np.uint32]
    sink: npt.NDArray[np.float32] | None
    token: npt.NDArray[np.uint32] | None
    q: npt.NDArray[np.float32] | None
    k: npt.NDArray[np.float32] | None
    self_: npt.NDArray[np.float32] | None
    cross: npt.NDArray[np.float32] | None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Pruning:
    """What one prune() saw and did.

    pos: int32 [n_tokens]; modality: int8 [n_tokens], 0 text, 1 picture. window_pos and
    window_modality, [n_window], the same for the queries that scored.
    """

    n_cells: int
    n_kept: int
    n_tokens: int
    n_window: int
    pos: npt.NDArray[np.int32]
    modality: npt.NDArray[np.int8]
    window_pos: npt.NDArray[np.int32]
    window_modality: npt.NDArray[np.int8]
    score_s: float
    select_s: float
    compact_s: float
    layers: tuple[Layer, ...]


class Hook:
    """Observes the queries of a context, and prunes its cache.

    Args:
        ctx: llama.cpp's context. Close the hook before it is freed.

    Raises:
        ModelError: the context can't be pruned.
    """

    def __init__(self, ctx: Any) -> None:
        self._csp = native.csp_init(ctx)
        if not self._csp:
            raise ModelError(f"its cache can't be pruned: {_last_error()}: use cache=Full()")

    def close(self) -> None:
        native.csp_free(self._csp)
        self._csp = None

    def observe(self, n_window: int) -> None:
        """Keep the queries of the last `n_window` tokens decoded from now on. 0: none.

        Raises:
            MemoryLimitError: they don't fit.
        """
        if not native.csp_observe(self._csp, n_window):
            raise MemoryLimitError(f"no memory to observe {n_window} queries: {_last_error()}")

    def prune(self, policy: CSP, n_tokens: int, *, inspect: bool = False) -> Pruning:
        """Score, select and compact, for a conversation of `n_tokens`, evicted ones included.

        Raises:
            PolicyError: the policy makes no sense for this many tokens.
            CspEdgeError: nothing was observed, or the device failed.
        """
        params = native.csp_default_params()
        budget, _, recent = policy.resolve(n_tokens)
        params.budget, params.recent = min(budget, n_tokens), min(recent, n_tokens)
        params.cross_ratio = -1.0 if policy.cross_ratio is None else policy.cross_ratio
        params.n_score = policy.n_score
        if policy.sink == "mass":
            params.sink = native.SINK_MASS
        elif policy.sink is not None:
            params.sink, params.n_decode = native.SINK_FIXED, policy.sink
        params.inspect = inspect
        if not native.csp_prune(self._csp, params):
            raise CspEdgeError(f"pruning failed: {_last_error()}")
        return self._read_pruning(inspect)

    def _read_pruning(self, inspect: bool) -> Pruning:
        stats = native.csp_get_stats(self._csp)
        return Pruning(
            stats.n_cells,
            stats.n_kept,
            stats.n_tokens,
            stats.n_window,
            _array(stats.pos, stats.n_tokens),
            _array(stats.modality, stats.n_tokens),
            _array(stats.window_pos, stats.n_window),
            _array(stats.window_modality, stats.n_window),
            stats.t_score_us / 1e6,
            stats.t_select_us / 1e6,
            stats.t_compact_us / 1e6,
            tuple(self._read_layer(stats, i, inspect) for i in range(stats.n_layer)),
        )

    def _read_layer(self, stats: Any, i: int, inspect: bool) -> Layer:
        layer = native.csp_get_layer(self._csp, i)
        n_cells, n_kv, dim = stats.n_cells, layer.n_head_kv, layer.n_embd_head_k
        return Layer(
            layer.il,
            layer.kq_scale,
            _array(layer.kept, n_kv, stats.n_kept),
            _array(layer.sink, layer.n_head) if layer.sink else None,
            _array(layer.token, n_kv, n_cells) if inspect else None,
            _array(layer.q, stats.n_window, layer.n_head, dim) if inspect else None,
            _array(layer.k, n_cells, n_kv, dim) if inspect else None,
            _array(layer.self, n_kv, n_cells) if inspect else None,
            _array(layer.cross, n_kv, n_cells) if inspect else None,
        )


def _last_error() -> str:
    text: bytes = native.csp_last_error()
    return text.decode(errors="replace")


def _array(pointer: Any, *shape: int) -> npt.NDArray[Any]:
    return np.ctypeslib.as_array(pointer, shape).copy()
