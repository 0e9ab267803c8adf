"""The pruning hook on a context: llama-csp.h with arrays."""

import ctypes
import reprlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from csp_edge import native
from csp_edge.errors import CspEdgeError, MemoryLimitError, ModelError, OptionError, PolicyError
from csp_edge.policies import LayerView, Policy, Resolved
from csp_edge.policies.base import ANSWER_SHARE


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Layer:
    """One pruned layer. Tokens are indices into the conversation.

    kept: of every KV head uint32 [its cells], ascending: the token in each cell.
    sink: float32 [n_head], logits, or None.

    Only with inspect=True, else None:
    token: of every KV head uint32 [n_cells]: the token in each cell before. As many as there are
        cells, but for heads that an earlier pruning left fewer; so with k, self_ and cross.
    q: float32 [n_window, n_head, head_dim], after RoPE.
    k: of every KV head float32 [n_cells, head_dim], after RoPE.
    self_, cross: of every KV head float32 [n_cells]: the scores (section 3.2).
    """

    il: int
    kq_scale: float
    kept: tuple[npt.NDArray[np.uint32], ...]
    sink: npt.NDArray[np.float32] | None
    token: tuple[npt.NDArray[np.uint32], ...] | None
    q: npt.NDArray[np.float32] | None
    k: tuple[npt.NDArray[np.float32], ...] | None
    self_: tuple[npt.NDArray[np.float32], ...] | None
    cross: tuple[npt.NDArray[np.float32], ...] | None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Pruning:
    """What one prune() saw and did.

    n_cells: cells scored. n_kept: cells of the head that keeps most, and so of the cache. n_recent:
    of them the last, which hold the same token in every head.
    pos: int32 [n_tokens]; modality: int8 [n_tokens], 0 text, 1 picture. window_pos and
    window_modality, [n_window], the same for the queries that scored.
    """

    n_cells: int
    n_kept: int
    n_recent: int
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


class Snapshot:
    """A cache as it was, its observed queries, and what is known of its pruned part."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        weakref.finalize(self, native.csp_free_snapshot, handle)

    def write(self, write: Callable[[memoryview], object]) -> None:
        """Give it as bytes, piece by piece, for Hook.read_snapshot().

        Raises:
            MemoryLimitError: what is known of the cells doesn't fit a second time.
            Anything that `write` raises.
        """
        failures: list[BaseException] = []
        call = native.CspWrite(_stream(write, failures))
        if not native.csp_write_snapshot(self.handle, call, None):
            raise failures[0] if failures else MemoryLimitError(_last_error())


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

    def probe(self, tokens: Sequence[int], positions: Sequence[int]) -> None:
        """Observe the queries of tokens that are not to stay, each at its position, gaps allowed.

        They are what prune() scores by until observe() is called again, whatever is decoded.

        Raises:
            CspEdgeError: they can't be decoded.
        """
        array = ctypes.c_int32 * len(tokens)
        if not native.csp_probe(self._csp, array(*tokens), array(*positions), len(tokens)):
            raise CspEdgeError(f"probing failed: {_last_error()}")

    @property
    def n_cells(self) -> int:
        """Cells that the cache has room for."""
        return int(native.csp_n_cells(self._csp))

    def resize(self, n_cells: int) -> None:
        """Make room for `n_cells` cells, or a few more, and give back what is beyond.

        Raises:
            MemoryLimitError: they don't fit, or more are in use.
        """
        if not native.csp_resize(self._csp, n_cells):
            raise MemoryLimitError(f"no cache of {n_cells} cells: {_last_error()}")

    def keep_evicted(self, kv_type: int, file: int = -1) -> None:
        """From now on copy what is evicted to the host, as this ggml type, for recall().

        Args:
            file: descriptor of an empty one, which is duplicated. -1: to the host's memory.

        Raises:
            OptionError: the type won't do for this model, or the file not for this system.
        """
        if not native.csp_keep_evicted(self._csp, kv_type, file):
            raise OptionError(f"evicted cells can't be kept: {_last_error()}")

    def recall(self, policy: Policy, amounts: Resolved, *, inspect: bool = False) -> Pruning:
        """Choose anew among all cells that there ever were, by the queries of a probe().

        Arguments and errors as for prune().
        """
        return self._change(native.csp_recall, policy, amounts, inspect)

    def prune(self, policy: Policy, amounts: Resolved, *, inspect: bool = False) -> Pruning:
        """Score, select and compact.

        Args:
            amounts: the policy's own, by policy.resolve(), or others. The window then is all that
                scores, and lookahead how many of its queries the answer has.

        Raises:
            PolicyError: the policy chose nonsense.
            CspEdgeError: nothing was observed, or the device failed.
            Anything that the policy's own select() raises.
        """
        return self._change(native.csp_prune, policy, amounts, inspect)

    def _change(self, change: Any, policy: Policy, amounts: Resolved, inspect: bool) -> Pruning:
        params = native.csp_default_params()
        params.budget, params.window, params.recent, n_ahead = amounts
        if n_ahead:
            # the prompt's last token asks for the answer's first
            params.n_answer, params.answer = n_ahead + 1, ANSWER_SHARE
        params.n_score = policy.n_score
        if policy.sink == "mass":
            params.sink = native.SINK_MASS
        elif policy.sink is not None:
            params.sink, params.n_decode = native.SINK_FIXED, policy.sink
        if policy.needs_keys == "pictures":
            params.keys = native.KEYS_MEDIA
        elif policy.needs_keys:
            params.keys = native.KEYS_ALL
        params.inspect = inspect

        failures: list[BaseException] = []
        call = policy.native_call()
        if call:
            name, settings = call
            params.policy = native.csp_policy(name)
            params.policy_settings = ctypes.addressof(settings) if settings else None
        else:
            params.policy = _callback(policy, failures)
        if not change(self._csp, params):
            if failures:
                raise failures[0]
            raise CspEdgeError(f"pruning failed: {_last_error()}")
        return self._read_pruning(inspect)

    def snapshot(self) -> Snapshot:
        """The cache as it is, with the observed queries.

        Raises:
            MemoryLimitError: it doesn't fit.
        """
        handle = native.csp_take_snapshot(self._csp)
        if not handle:
            raise MemoryLimitError(f"no memory for a copy of the cache: {_last_error()}")
        return Snapshot(handle)

    def read_snapshot(self, read: Callable[[memoryview], object], n_bytes: int) -> Snapshot:
        """A snapshot from the bytes that its write() gave. They are not trusted.

        Args:
            read: fills what it is given with the next bytes, of which there are `n_bytes`.

        Raises:
            CspEdgeError: they are damaged, or of another kind of cache.
            Anything that `read` raises.
        """
        failures: list[BaseException] = []
        call = native.CspRead(_stream(read, failures))
        handle = native.csp_read_snapshot(self._csp, call, None, n_bytes)
        if failures:
            raise failures[0]
        if not handle:
            raise CspEdgeError(_last_error())
        return Snapshot(handle)

    def restore(self, snapshot: Snapshot) -> None:
        """Bring a snapshot back.

        Raises:
            CspEdgeError: it is of another model or context size, or its queries don't fit.
        """
        if not native.csp_restore(self._csp, snapshot.handle):
            raise CspEdgeError(f"the cache can't be restored: {_last_error()}: prefill it anew")

    def _read_pruning(self, inspect: bool) -> Pruning:
        stats = native.csp_get_stats(self._csp)
        return Pruning(
            stats.n_cells,
            stats.n_kept,
            stats.n_recent,
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
        n_kv, n_cells, dim = layer.n_head_kv, stats.n_cells, layer.n_embd_head_k
        lengths = _array(layer.n_cells, n_kv) if inspect else None
        return Layer(
            layer.il,
            layer.kq_scale,
            _heads(_array(layer.kept, n_kv, stats.n_kept), _array(layer.n_kept, n_kv)),
            _array(layer.sink, layer.n_head) if layer.sink else None,
            _heads(_array(layer.token, n_kv, n_cells), lengths) if inspect else None,
            _array(layer.q, stats.n_window, layer.n_head, dim) if inspect else None,
            _heads(_array(layer.k, n_kv, n_cells, dim), lengths) if inspect else None,
            _heads(_array(layer.self, n_kv, n_cells), lengths) if inspect else None,
            _heads(_array(layer.cross, n_kv, n_cells), lengths) if inspect else None,
        )


def _stream(
    take: Callable[[memoryview], object], failures: list[BaseException]
) -> Callable[[int, int, object], bool]:
    """`take`, called with memory. What it raises can't pass through C: see failures."""

    def call(data: int, size: int, _: object) -> bool:
        try:
            take(memoryview((ctypes.c_char * size).from_address(data)).cast("B"))
        except BaseException as failure:
            failures.append(failure)
        return not failures

    return call


def _heads(rows: npt.NDArray[Any], lengths: Any) -> tuple[npt.NDArray[Any], ...]:
    return tuple(row[:n] for row, n in zip(rows, lengths, strict=True))


def _callback(policy: Policy, failures: list[BaseException]) -> Any:
    """`policy.select` as a llama_csp_policy. What it raises can't pass through C: see failures."""

    @native.CspPolicy  # type: ignore[untyped-decorator, unused-ignore]
    def choose(view: Any, choice: Any, _: object) -> bool:
        try:
            layer = _layer_view(view.contents)
            _write_choice(choice.contents, layer, _checked_rows(policy, layer))
        except BaseException as failure:
            failures.append(failure)
        return not failures

    return choose


def _layer_view(view: Any) -> LayerView:
    n_kv, n_cells = view.n_head_kv, view.n_cells
    return LayerView(
        view.i_layer,
        view.n_layer,
        view.budget,
        view.recent,
        _array(view.token, n_kv, n_cells),
        _array(view.modality, n_kv, n_cells),
        _array(view.self, n_kv, n_cells),
        _array(view.cross, n_kv, n_cells),
        _array(view.k, n_kv, n_cells, view.n_embd_head_k) if view.k else None,
    )


def _checked_rows(policy: Policy, layer: LayerView) -> list[npt.NDArray[np.uint32]]:
    n_kv, n_cells = layer.token.shape
    rows = policy.select(layer)
    name = f"{type(policy).__name__}.select()"
    if isinstance(rows, np.ndarray):
        rows = [*rows] if rows.ndim else []
    if not isinstance(rows, Sequence) or len(rows) != n_kv:
        raise PolicyError(
            f"{name} returned {reprlib.repr(rows)} for layer {layer.i_layer}: "
            f"give an array of cells for each of its {n_kv} KV heads"
        )
    checked = []
    for head, row in enumerate(rows):
        cells = _as_cells(row, n_cells)
        if cells is None:
            raise PolicyError(
                f"{name} returned {reprlib.repr(row)} for KV head {head} of layer "
                f"{layer.i_layer}: give one or more integers from 0 to {n_cells - 1}, ascending, "
                "each once"
            )
        checked.append(cells)
    return checked


def _as_cells(row: object, n_cells: int) -> npt.NDArray[np.uint32] | None:
    try:
        cells = np.asarray(row)
    except ValueError:  # rows of different lengths
        return None
    if cells.ndim != 1 or not len(cells) or not np.issubdtype(cells.dtype, np.integer):
        return None
    if (cells[1:] <= cells[:-1]).any() or not 0 <= cells[0] <= cells[-1] < n_cells:
        return None
    return cells.astype(np.uint32)


def _write_choice(choice: Any, layer: LayerView, rows: list[npt.NDArray[np.uint32]]) -> None:
    n_kv, n_cells = layer.token.shape
    n_kept = native.array(choice.n_kept, n_kv)
    kept = native.array(choice.kept, n_kv, n_cells)
    for head, row in enumerate(rows):
        n_kept[head] = len(row)
        kept[head, : len(row)] = row


def _last_error() -> str:
    text: bytes = native.csp_last_error()
    return text.decode(errors="replace")


def _array(pointer: Any, *shape: int) -> npt.NDArray[Any]:
    return native.array(pointer, *shape).copy()
