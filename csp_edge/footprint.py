"""The memory that a chat takes, from the headers of its files, before they are loaded.

llama.cpp lays out a model, its cache and its graphs without allocating them, and tells their sizes.
What it does not tell is reckoned here.
"""

import ctypes
import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from csp_edge import native
from csp_edge.encoder import EMBEDDING_CACHE_BYTES
from csp_edge.errors import ModelError, ProjectorError
from csp_edge.gguf_file import BLOCKS, read_header, read_parts
from csp_edge.loading import context_params
from csp_edge.memory import resident_memory
from csp_edge.model_info import KV_TYPES, describe
from csp_edge.native import llama
from csp_edge.policies import Full, Policy

_F32 = 4
_N_MODALITY = 2
# tokens of a conversation beside its pictures: text, and room for an answer
_N_TEXT = 1024
# native/csp-score.cpp: elements of a block of attention, and its queries
_SCORE_BLOCK = 2**20
_SCORE_QUERIES_MIN, _SCORE_QUERIES_MAX = 8, 64
# bytes that a token takes in the lists of native/csp-recall.cpp
_LISTED, _LISTED_IN_HEAD = 40, 24
# what only shows at work: stacks and buffers of threads, the allocator's gaps, a template's code
_AT_WORK = 5 * 2**20


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that a chat takes, by what takes them.

    Of the host's memory, but for `device`:
    program: Python, its packages and the libraries, with the vocabulary.
    weights: those that stay as they stand in the file, or all of the file where it is mapped.
    repacked: those that are rearranged for this CPU, once more where the file is mapped.
    staging: one tensor on its way, while loading.
    projector: its weights. vision: its graph for one picture.
    picture: the pixels of one, and the embeddings of those encoded last.
    cache: K and V. first_cache: the same when they are still empty. moving: K or V of one
        layer, which is there twice while the cache grows.
    compute: the largest graph of the language model, and what its batches take.
    queries: those that are observed, to prune by. scoring: what pruning takes beyond `compute`.
    sampling: logits and candidates.
    device: what all other devices take, together.
    """

    program: int
    weights: int
    repacked: int
    staging: int
    projector: int
    vision: int
    picture: int
    cache: int
    first_cache: int
    moving: int
    compute: int
    queries: int
    scoring: int
    sampling: int
    device: int

    @property
    def load(self) -> int:
        """Bytes of the host's memory when the model and its projector are loaded."""
        held = self.program + self.weights + self.repacked
        return held + max(self.staging, self.projector + self.first_cache)

    @property
    def prefill(self) -> int:
        """At most, while a prompt fills the cache."""
        return self.decode - self.sampling + self.picture + max(self.moving, self.queries)

    @property
    def prune(self) -> int:
        """At most, while the cache is full and pruned."""
        return self.decode - self.sampling + self.picture + self.queries + self.scoring

    @property
    def decode(self) -> int:
        """At most, while an answer is written into a full cache."""
        held = self.program + self.weights + self.repacked + self.projector + self.vision
        return held + self.cache + self.compute + self.sampling

    @property
    def peak(self) -> int:
        """At most, at any time."""
        return max(self.load, self.prefill, self.prune, self.decode)


class Layout:
    """A model and its projector, laid out but not loaded. A context manager.

    Args:
        model, mmproj: GGUF files.
        n_gpu_layers: layers to offload, -1: all.
        policy: what prunes.
        n_pixels: of the pictures, where the projector takes any size. None: the largest that it
            does not scale down.
        n_images: pictures of a conversation. None: as many as the model's context holds.
        recall: whether what is evicted is kept, in a file, or the type that it is kept in.

    Raises:
        ModelError, ProjectorError: a file can't be read, or they don't belong together.
    """

    def __init__(
        self,
        model: Path,
        mmproj: Path | None,
        *,
        n_gpu_layers: int,
        policy: Policy | Full,
        n_pixels: int | None,
        n_images: int | None,
        recall: bool | str = False,
    ) -> None:
        self.info = describe(model, mmproj)
        self._n_gpu_layers = n_gpu_layers
        self._policy = policy
        self.n_images = n_images
        self._recall = recall
        # all that a chat imports
        importlib.import_module("csp_edge.vlm")

        parts = read_parts(read_header(model))
        self._largest = max(t.n_bytes for part in parts for t in part.tensors.values())
        params = llama.llama_model_default_params()
        params.no_alloc, params.load_mode = True, llama.LLAMA_LOAD_MODE_NONE
        params.n_gpu_layers = n_gpu_layers
        self._model, why = native.explained(
            llama.llama_model_load_from_file, os.fsencode(model), params
        )
        if not self._model:
            raise ModelError(f"{model}: llama.cpp can't load it: {why or 'unknown reason'}")
        try:
            self._mmproj = mmproj
            self.projector = _measure_projector(mmproj, n_pixels) if mmproj else None
            self._program = (resident_memory() or 0) + _AT_WORK
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        llama.llama_model_free(self._model)

    def __enter__(self) -> "Layout":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    @property
    def n_swa(self) -> int:
        """Tokens that a sliding window reaches over. 0: there is none."""
        return int(llama.llama_model_n_swa(self._model))

    def shrink_pictures(self) -> bool:
        """Take pictures of half as many pixels. False: the projector takes none but these."""
        if not self._mmproj or not self.projector:
            return False
        old = self.projector
        self.projector = _measure_projector(self._mmproj, old.nx * old.ny // 2)
        return bool(self.projector.nx < old.nx)

    @property
    def tokens_per_picture(self) -> int:
        """Of the largest, all of its tiles together."""
        return self.projector.n_tokens * self.projector.n_tiles if self.projector else 0

    @property
    def tokens_per_tile(self) -> int:
        """That are decoded at once. A picture that is not cut up is a tile."""
        return self.projector.n_tokens if self.projector else 0

    @property
    def n_tokens(self) -> int:
        """Of a conversation."""
        if self.n_images is None:
            return self.info.n_ctx
        return min(self.n_images * self.tokens_per_picture + _N_TEXT, self.info.n_ctx)

    @property
    def n_images_most(self) -> int | None:
        """Pictures that the model's context holds. None: it holds those of the conversation."""
        per_picture, n_ctx = self.tokens_per_picture, self.info.n_ctx
        if not per_picture or self.n_images is None or self.n_tokens < n_ctx:
            return None
        return max(0, n_ctx - _N_TEXT) // per_picture

    def footprint(
        self, *, n_cells: int, n_ubatch: int, kv_type: str, mmap: bool = True
    ) -> Footprint | None:
        """What a chat takes whose cache holds `n_cells` at most. None: there is no such cache.

        Args:
            n_cells: of the cache, a multiple of 256.
            n_ubatch: tokens that are computed at once.
            kv_type: type of K and V, one of KV_TYPES.
            mmap: map the weights, as llama.cpp does where it is not told otherwise.
        """
        memory = self._measure(n_cells, n_ubatch, kv_type)
        if memory is None:
            return None
        info, vision = self.info, self.projector
        on_host = self._n_gpu_layers == 0
        pictures = embeddings = 0
        if vision:
            # as floats and as bytes
            pictures = vision.n_tiles * 3 * vision.nx * vision.ny * (_F32 + 1)
            one = vision.n_tokens * vision.n_embd * _F32
            # within a bound, of as many tokens as it has cells
            kept = n_cells * vision.n_embd * _F32
            if self.n_images is not None:
                kept = min(kept, self.n_images * vision.n_tiles * one)
            embeddings = one + min(kept, EMBEDDING_CACHE_BYTES + one)
        vision_bytes = vision.compute + vision.work if vision else 0
        return Footprint(
            program=self._program,
            weights=info.weight_bytes if mmap and on_host else memory.weights,
            repacked=memory.repacked,
            staging=0 if mmap else self._largest,
            projector=vision.weights if vision and on_host else 0,
            vision=vision_bytes if on_host else 0,
            picture=pictures + embeddings,
            cache=memory.cache,
            first_cache=memory.cache * min(n_ubatch, n_cells) // n_cells,
            moving=memory.cache // (2 * info.n_layer),
            compute=memory.compute + memory.work + n_ubatch * info.n_embd * _F32,
            queries=self._queries(n_cells),
            scoring=self._scoring(n_cells, memory.compute, kv_type),
            sampling=info.n_vocab * (2 * _F32 + 3 * _F32),
            device=memory.device_weights
            + memory.device_cache
            + memory.device_compute
            + (vision.weights + vision_bytes if vision and not on_host else 0),
        )

    def _measure(self, n_cells: int, n_ubatch: int, kv_type: str) -> Any:
        params = context_params(
            n_ctx=n_cells, n_ubatch=n_ubatch, kv_type=kv_type, on_gpu=self._n_gpu_layers != 0
        )
        ctx, _ = native.explained(llama.llama_init_from_model, self._model, params)
        if not ctx:
            return None
        memory = native.csp_get_memory(ctx)
        llama.llama_free(ctx)
        return memory

    def _window(self, n_cells: int) -> int:
        if not isinstance(self._policy, Policy):
            return 0
        # without pictures it may be wider, which what they would take has room for
        has_pictures = self.projector is not None and self.n_images != 0
        n_tokens = max(n_cells, self.info.n_ctx)
        amounts = self._policy.resolve(n_tokens, has_pictures=has_pictures)
        return min(amounts.window + amounts.lookahead, n_cells)

    def _queries(self, n_cells: int) -> int:
        info = self.info
        return self._window(n_cells) * info.n_head * info.head_dim_k * info.n_layer * _F32

    def _scoring(self, n_cells: int, compute: int, kv_type: str) -> int:
        """native/csp-score.cpp: a layer's keys, and the attention of a block of queries."""
        policy, info = self._policy, self.info
        if not isinstance(policy, Policy):
            return 0
        recalled = 0
        if self._recall:
            # all tokens are listed, and their keys read from the file
            n_cells = max(n_cells, self.n_tokens)
            kind = kv_type if self._recall is True else self._recall
            block, n_bytes = BLOCKS[int(KV_TYPES[kind])]
            row = info.n_head_kv * info.head_dim_k * n_bytes // block
            recalled = n_cells * (row + _LISTED + info.n_head_kv * _LISTED_IN_HEAD)
        n_block = max(_SCORE_BLOCK // (n_cells * info.n_head), _SCORE_QUERIES_MIN)
        n_queries = min(self._window(n_cells), n_block, _SCORE_QUERIES_MAX)
        attention = n_cells * n_queries * info.n_head * _F32
        keys = n_cells * info.n_head_kv * info.head_dim_k * _F32
        mask = n_cells * n_queries * _F32
        graph = keys + 2 * attention + mask
        scores = _N_MODALITY * n_cells * 2 * info.n_head_kv * _F32
        copies = 2 * attention if policy.sink == "mass" else 0
        copies = max(copies, scores + 2 * keys * bool(policy.needs_keys))
        return max(0, graph + recalled - compute) + mask + copies


def _measure_projector(path: Path, n_pixels: int | None) -> Any:
    memory = native.MtmdCspMemory()
    is_read, why = native.explained(
        native.mtmd_csp_get_memory, os.fsencode(path), n_pixels or 0, ctypes.byref(memory)
    )
    if not is_read:
        raise ProjectorError(f"{path}: llama.cpp can't load it: {why or 'it takes no pictures'}")
    return memory
