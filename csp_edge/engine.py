"""One model at work in llama.cpp: tokens and pictures in, KV cache and logits out."""

import ctypes
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from csp_edge import native
from csp_edge.errors import (
    CspEdgeError,
    ImageError,
    MemoryLimitError,
    ModelError,
    OptionError,
    ProjectorError,
    PromptError,
)
from csp_edge.hook import Hook, Pruning
from csp_edge.hook import Snapshot as CacheSnapshot
from csp_edge.memory import available_memory
from csp_edge.model_info import KV_TYPES, describe
from csp_edge.native import llama, mtmd
from csp_edge.policies import Policy
from csp_edge.tokenizer import Item, Patches, Prompt, Tokenizer

Progress: TypeAlias = Callable[[str, int, int], None]

_N_BATCH = 512
_N_CTX_FIRST = 1024
_EMBEDDING_CACHE_BYTES = 256 * 2**20
_SEQ = 0


@dataclass(frozen=True, slots=True)
class Prefill:
    """What one prefill did. Seconds; tokens."""

    n_reused: int
    n_decoded: int
    n_encoded: int  # pictures or tiles that went through the encoder
    encode_s: float
    decode_s: float


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Snapshot:
    """What an engine's cache held, for restore()."""

    cache: CacheSnapshot
    items: tuple[Item, ...]
    n_tokens: int
    n_past: int
    n_pruned: int
    n_evicted: int
    n_recent: int


class Engine:
    """Owns a model, its projector, one context of one sequence, and the CSP hook on it.

    Not thread-safe. After an error the cache holds what `items` says, and the engine goes on.

    Args:
        model, mmproj: GGUF files.
        n_ctx: cells of the KV cache. None: as many as a prompt needs, up to the model's own.
        n_threads: None: one for each CPU.
        n_gpu_layers: layers to offload, -1: all.
        kv_type: type of K and V in the cache: f32, f16, bf16, q8_0 or q4_0.
        prune: attach the CSP hook, so that prune() works.
        progress: called with ("load" | "encode" | "prefill", done, total).

    Raises:
        ModelError: the model can't be read, can't chat, or can't be pruned though it should.
        ProjectorError: the projector can't be read, or is another model's.
        OptionError: a setting is out of range.
        MemoryLimitError: the cache doesn't fit.
    """

    def __init__(
        self,
        model: Path,
        mmproj: Path | None = None,
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
        kv_type: str = "f16",
        prune: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.model: Any = None
        self._projector: Any = None
        self._ctx: Any = None
        self._hook: Hook | None = None
        self._batch: Any = None

        self._n_ctx = _checked("n_ctx", n_ctx, 1, 2**31 - 1) if n_ctx is not None else None
        self._n_threads = _checked("n_threads", _cpus() if n_threads is None else n_threads, 1, 512)
        self._n_gpu_layers = _checked("n_gpu_layers", n_gpu_layers, -1, 2**31 - 1)
        self.kv_type = kv_type
        self._progress = progress or (lambda stage, done, total: None)

        self.info = describe(model, mmproj, kv_type)
        self.bytes_per_cell = self.info.kv_bytes_per_token  # of K and V in all layers
        self.items: list[Item] = []  # what the cache holds, evicted tokens included
        self.n_ctx: int = 0
        self._embeddings: OrderedDict[tuple[bytes, int, int], npt.NDArray[np.float32]] = (
            OrderedDict()
        )
        self.n_encoded = 0

        try:
            self._load_model(model)
            if mmproj is not None:
                self._load_projector(mmproj)
            self.tokenizer = Tokenizer(model, self.model, self._projector)
            self._prune = prune
            self._new_context(self._n_ctx or min(_N_CTX_FIRST, self.n_ctx_max), _N_BATCH)
        except BaseException:
            self.close()
            raise

    # loading

    def _load_model(self, path: Path) -> None:
        failures: list[BaseException] = []

        @llama.llama_progress_callback  # type: ignore[untyped-decorator, unused-ignore]
        def report(share: float, _: object) -> bool:
            try:
                self._progress("load", round(share * 100), 100)
            except BaseException as failure:  # it can't pass through C
                failures.append(failure)
            return not failures

        params = llama.llama_model_default_params()
        params.n_gpu_layers = self._n_gpu_layers
        params.progress_callback = report
        self.model, why = native.explained(
            llama.llama_model_load_from_file, os.fsencode(path), params
        )
        if failures:
            raise failures[0]
        if not self.model:
            raise ModelError(f"{path}: llama.cpp can't load it: {why or 'unknown reason'}")
        vocab = llama.llama_model_get_vocab(self.model)
        if llama.llama_vocab_type(vocab) == llama.LLAMA_VOCAB_TYPE_NONE:
            raise ModelError(f"{path}: has no vocabulary, so it can't chat: use a chat model")
        if llama.llama_model_has_encoder(self.model) or llama.llama_model_is_diffusion(self.model):
            raise ModelError(f"{path}: not a model that writes token by token: use a chat model")

        self._n_ctx_train: int = llama.llama_model_n_ctx_train(self.model)
        self.n_ctx_max: int = self._n_ctx or self._n_ctx_train
        self._n_pos_max: int = max(self.n_ctx_max, self._n_ctx_train)
        self._n_swa: int = llama.llama_model_n_swa(self.model)
        self._n_embd: int = llama.llama_model_n_embd_inp(self.model)

    def _load_projector(self, path: Path) -> None:
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = self._n_gpu_layers != 0
        params.print_timings = False
        params.n_threads = self._n_threads
        params.warmup = False
        self._projector, why = native.explained(
            mtmd.mtmd_init_from_file, os.fsencode(path), self.model, params
        )
        if not self._projector:
            raise ProjectorError(f"{path}: llama.cpp can't load it: {why or 'unknown reason'}")
        if not mtmd.mtmd_support_vision(self._projector):
            raise ProjectorError(
                f"{path}: this projector takes no pictures: use a vision projector"
            )

    def _new_context(self, n_ctx: int, n_ubatch: int) -> None:
        self._check_memory(n_ctx, n_ubatch)
        self._free_context()
        try:
            self._make_context(n_ctx, n_ubatch)
        except BaseException:
            self._free_context()
            raise

    def _make_context(self, n_ctx: int, n_ubatch: int) -> None:
        params = llama.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = n_ubatch
        params.n_seq_max = 1
        params.n_outputs_max = 1
        params.n_threads = params.n_threads_batch = self._n_threads
        # compaction gathers rows of V, which only flash attention leaves in rows
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k = params.type_v = KV_TYPES[self.kv_type]
        params.offload_kqv = self._n_gpu_layers != 0
        params.swa_full = False
        params.no_perf = True
        self._ctx, why = native.explained(llama.llama_init_from_model, self.model, params)
        if not self._ctx:
            if "alloc" in why:
                raise MemoryLimitError(f"{_too_large(n_ctx, self.kv_type)} ({why})")
            raise ModelError(f"{self.info.path}: no context with kv_type={self.kv_type!r}: {why}")
        self._memory = llama.llama_get_memory(self._ctx)
        if not self._memory:
            raise ModelError(f"{self.info.path}: keeps no cache, so it can't chat")
        # of a small context llama.cpp makes the batch smaller
        self._n_ubatch = llama.llama_n_ubatch(self._ctx)
        self._batch = llama.llama_batch_init(self._n_ubatch, 0, 1)
        self.n_ctx = min(n_ctx, llama.llama_n_ctx(self._ctx))

        if self._prune:
            try:
                self._hook = Hook(self._ctx)
            except ModelError as error:
                raise ModelError(f"{self.info.path}: {error}") from None

    def _check_memory(self, n_ctx: int, n_ubatch: int) -> None:
        available = available_memory()
        if self._n_gpu_layers or available is None:
            return
        # beside K and V, the attention mask grows with the context: it is held in f32 and f16
        needed = n_ctx * (self.bytes_per_cell + 6 * n_ubatch)
        held = self.n_ctx * self.bytes_per_cell if self._ctx else 0
        if needed - held > available:
            raise MemoryLimitError(
                f"{_too_large(n_ctx, self.kv_type)}: {needed / 2**20:.0f} MiB are needed and "
                f"{available / 2**20:.0f} MiB are free"
            )

    def _free_context(self) -> None:
        self._forget()
        self.n_ctx = 0
        if self._hook:
            self._hook.close()
        if self._batch is not None:
            llama.llama_batch_free(self._batch)
        if self._ctx:
            llama.llama_free(self._ctx)
        self._hook = self._batch = self._ctx = None

    def close(self) -> None:
        """Free everything. The engine can't be used afterwards."""
        self._free_context()
        if self._projector:
            mtmd.mtmd_free(self._projector)
        if self.model:
            llama.llama_model_free(self.model)
        self._projector = self.model = None
        self._embeddings.clear()

    @property
    def chat_template(self) -> str | None:
        """Jinja, from the model's file."""
        text = llama.llama_model_chat_template(self.model, None)
        return text.decode(errors="replace") if text is not None else None

    # the cache

    @property
    def n_cells(self) -> int:
        """Cells in use: tokens less the evicted ones."""
        return self.n_tokens - self._n_evicted

    @property
    def room(self) -> int:
        """Tokens that can still be decoded."""
        return max(0, min(self._n_pos_max - self.n_past, self.n_ctx - self.n_cells))

    def _forget(self) -> None:
        self.items.clear()
        self.n_tokens = 0  # of the conversation, evicted ones included
        self.n_past = 0  # the next token's position
        self._n_pruned = 0  # leading items that can only go together
        self._n_evicted = 0  # tokens without a cell
        self._n_recent = 0  # pruned tokens that have a cell of their own

    def _append(self, item: Item) -> None:
        self.items.append(item)
        self.n_tokens += 1 if isinstance(item, int) else item.n_tokens
        self.n_past += 1 if isinstance(item, int) else item.n_pos

    def clear(self) -> None:
        """Empty the cache."""
        self._forget()
        self.observe(0)
        if self._ctx:
            llama.llama_memory_clear(self._memory, False)

    def cut(self, n_items: int) -> bool:
        """Keep the first `n_items` of `items`. False, and an empty cache, if the memory can't.

        Of a pruned part no more than the recent cells can be cut off.
        """
        for item in self.items[n_items:]:
            self.n_tokens -= 1 if isinstance(item, int) else item.n_tokens
            self.n_past -= 1 if isinstance(item, int) else item.n_pos
        del self.items[n_items:]
        is_cut = llama.llama_memory_seq_rm(self._memory, _SEQ, self.n_past, -1)
        # a sliding window must still reach back as far as it would have
        first = llama.llama_memory_seq_pos_min(self._memory, _SEQ)
        reach = max(0, self.n_past - self._n_swa)
        if is_cut and (not self._n_swa or not self.n_past or 0 <= first <= reach):
            return True
        self.clear()
        return False

    def _recover(self) -> None:
        """Drop what an interrupted call may have left behind `items`."""
        self.observe(0)
        if self._ctx:
            self.cut(len(self.items))

    def observe(self, n_window: int) -> None:
        """Keep the queries of the last `n_window` tokens decoded from now on, for prune(). 0: none.

        Raises:
            MemoryLimitError: they don't fit.
        """
        if self._hook:
            self._hook.observe(n_window)

    def prefill(self, prompt: Prompt, *, room: int = 0, window: int = 0) -> Prefill:
        """Bring the cache to hold `prompt`, decoding only what it doesn't hold yet.

        Of a conversation that was pruned, the pruned part is kept if `prompt` goes on from it, and
        dropped as a whole otherwise. The last token is always decoded: `logits` are its own.

        Args:
            room: tokens of answer to leave room for, where n_ctx allows.
            window: observe the queries of that many last tokens, for prune().

        Raises:
            PromptError: the prompt is beyond the context, or ends with a picture.
            MemoryLimitError: a cache that holds it doesn't fit.
        """
        if not isinstance(prompt.items[-1], int):
            raise PromptError("the prompt ends with a picture: put text after it")
        if prompt.n_pos > self._n_pos_max:
            raise self._beyond(prompt)
        try:
            if not self._ctx:
                self._new_context(self._n_ctx or min(_N_CTX_FIRST, self.n_ctx_max), _N_BATCH)
            n_kept = self._reuse(prompt)
            n_kept = self._fit(prompt, n_kept, room)
            n_reused, n_encoded = self.n_tokens, self.n_encoded
            t0 = time.perf_counter()
            embeddings = self._encode(prompt, n_kept)
            t1 = time.perf_counter()
            self.observe(min(window, prompt.n_tokens - n_reused))
            self._decode_items(prompt, n_kept, embeddings)
            t2 = time.perf_counter()
        except BaseException:
            self._recover()
            raise
        return Prefill(
            n_reused, prompt.n_tokens - n_reused, self.n_encoded - n_encoded, t1 - t0, t2 - t1
        )

    def _reuse(self, prompt: Prompt) -> int:
        last = len(prompt.items) - 1
        n_kept = next(
            (
                i
                for i, (old, new) in enumerate(zip(self.items, prompt.items[:last], strict=False))
                if old != new
            ),
            min(len(self.items), last),
        )
        if n_kept < self._n_pruned:
            self.clear()
            return 0
        if n_kept < len(self.items) and not self.cut(n_kept):
            return 0
        return n_kept

    def _fit(self, prompt: Prompt, n_kept: int, room: int) -> int:
        n_new = prompt.n_tokens - self.n_tokens
        n_ubatch = max(
            [
                self._n_ubatch,
                *(i.n_tokens for i in prompt.items if not isinstance(i, int) and not i.causal),
            ]
        )
        n_ctx = self._n_ctx or min(_power_of_2(prompt.n_tokens + room), self.n_ctx_max)
        needed = self.n_cells + n_new
        if n_ubatch == self._n_ubatch and (needed + room <= self.n_ctx or n_ctx <= self.n_ctx):
            if needed > self.n_ctx:
                raise self._beyond(prompt)
            return n_kept
        # a new cache holds the whole conversation anew: what was evicted can't move into it
        self._new_context(max(n_ctx, self.n_ctx), n_ubatch)
        if prompt.n_tokens > self.n_ctx:
            raise self._beyond(prompt)
        return 0

    def _beyond(self, prompt: Prompt) -> PromptError:
        return PromptError(
            f"the prompt of {prompt.n_tokens} tokens is beyond the context of {self.n_ctx_max}: "
            "shorten it, send fewer pictures, or raise n_ctx"
        )

    def _encode(self, prompt: Prompt, start: int) -> dict[int, npt.NDArray[np.float32]]:
        """Embeddings, float32 [n_tokens, n_embd], of the pictures from item `start` on."""
        embeddings: dict[int, npt.NDArray[np.float32]] = {}
        pictures = [(i, item) for i, item in enumerate(prompt.items) if isinstance(item, Patches)]
        pictures = [(i, item) for i, item in pictures if i >= start]
        for n_done, (i, item) in enumerate(pictures):
            self._progress("encode", n_done, len(pictures))
            key = (item.key, item.tile, item.n_tokens)
            if key not in self._embeddings:
                self._embeddings[key] = self._encode_one(prompt.handles[i], item)
                self.n_encoded += 1
            self._embeddings.move_to_end(key)
            embeddings[i] = self._embeddings[key]
            while sum(e.nbytes for e in self._embeddings.values()) > _EMBEDDING_CACHE_BYTES:
                self._embeddings.popitem(last=False)
        if pictures:
            self._progress("encode", len(pictures), len(pictures))
        return embeddings

    def _encode_one(self, handle: int, item: Patches) -> npt.NDArray[np.float32]:
        code, why = native.explained(mtmd.mtmd_encode_chunk, self._projector, handle)
        if code != 0:
            raise ImageError(f"picture {item.picture + 1} can't be encoded: {why}")
        embedding = mtmd.mtmd_get_output_embd(self._projector)
        return np.ctypeslib.as_array(embedding, (item.n_tokens, self._n_embd)).copy()

    def _decode_items(
        self, prompt: Prompt, start: int, embeddings: dict[int, npt.NDArray[np.float32]]
    ) -> None:
        text: list[int] = []
        for i in range(start, len(prompt.items)):
            self._progress("prefill", self.n_tokens + len(text), prompt.n_tokens)
            item = prompt.items[i]
            if isinstance(item, int):
                text.append(item)
            if text and (
                len(text) == self._n_ubatch
                or i + 1 == len(prompt.items)
                or not isinstance(prompt.items[i + 1], int)
            ):
                self._decode_text(text, want_logits=i + 1 == len(prompt.items))
                text = []
            if isinstance(item, Patches):
                self._decode_picture(prompt.handles[i], item, embeddings[i])
        self._progress("prefill", prompt.n_tokens, prompt.n_tokens)

    def _decode_text(self, tokens: list[int], *, want_logits: bool) -> None:
        batch, n_past = self._batch, self.n_past
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = n_past + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = _SEQ
            batch.logits[i] = False
        batch.logits[len(tokens) - 1] = want_logits
        self._check(*native.explained(llama.llama_decode, self._ctx, batch))
        for token in tokens:
            self._append(token)

    def _decode_picture(
        self, handle: int, item: Patches, embedding: npt.NDArray[np.float32]
    ) -> None:
        n_past = llama.llama_pos()
        self._check(
            *native.explained(
                mtmd.mtmd_helper_decode_image_chunk,
                self._projector,
                self._ctx,
                handle,
                embedding.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
                self.n_past,
                _SEQ,
                self._n_ubatch,
                n_past,
                mtmd.mtmd_helper_post_decode_callback(),
                None,
            )
        )
        self._append(item)

    def _check(self, code: int, why: str) -> None:
        if code != 0:
            raise CspEdgeError(
                f"llama.cpp could not decode (code {code}): {why or 'no reason given'}"
            )

    def decode(self, token: int) -> None:
        """Append a token. `logits` are its own then.

        Raises:
            PromptError: the context is full.
            OptionError: there is no such token.
        """
        _checked("token", token, 0, self.tokenizer.n_vocab - 1)
        if not self.room:
            raise PromptError(f"the context of {self.n_ctx} is full: raise n_ctx")
        try:
            self._decode_text([token], want_logits=True)
        except BaseException:
            self._recover()
            raise

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """float32 [n_vocab] after the last token; a view, valid until the next decode."""
        pointer = llama.llama_get_logits_ith(self._ctx, -1)
        return np.ctypeslib.as_array(pointer, (self.tokenizer.n_vocab,))

    def redecode(self) -> None:
        """Decode the last token once more, over the cache as it is now. `logits` are its own then.

        After prune() they are those that the pruned cache gives.

        Raises:
            PromptError: there is no last token, or pruning left no cell of its own to it.
        """
        token = self.items[-1] if self.items else None
        if not isinstance(token, int):
            raise PromptError("no token to decode again: prefill a prompt that ends with text")
        if len(self.items) == self._n_pruned and not self._n_recent:
            raise PromptError("the last token is evicted: prune with recent of at least 1")
        try:
            self.cut(len(self.items) - 1)
            self._decode_text([token], want_logits=True)
        except BaseException:
            self._recover()
            raise

    def prune(self, policy: Policy, *, inspect: bool = False) -> Pruning:
        """Prune the whole cache, by the newest queries observed since prefill() began.

        That may be after some decode() calls, whose queries then count too. Observation ends with
        it. A budget of all cells and more evicts nothing. After an error the cache is empty.

        Args:
            inspect: keep queries, keys and scores too.

        Raises:
            PolicyError: the policy makes no sense for this many tokens, or chose nonsense.
            CspEdgeError: nothing was observed, or the device failed.
            Anything that the policy's own select() raises.
        """
        assert self._hook, "made without prune=True"
        try:
            pruning = self._hook.prune(policy, self.n_tokens, inspect=inspect)
            self.observe(0)
        except BaseException:
            self.clear()
            raise
        self._n_pruned = len(self.items)
        self._n_evicted = self.n_tokens - pruning.n_kept
        self._n_recent = pruning.n_recent
        return pruning

    def snapshot(self) -> Snapshot:
        """The cache as it is, with the observed queries, for restore(). It takes as much memory.

        Raises:
            MemoryLimitError: it doesn't fit.
        """
        assert self._hook, "made without prune=True"
        return Snapshot(
            self._hook.snapshot(),
            tuple(self.items),
            self.n_tokens,
            self.n_past,
            self._n_pruned,
            self._n_evicted,
            self._n_recent,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Bring a snapshot's cache and queries back. `logits` stay those of the last token decoded.

        A snapshot can be restored any number of times, as long as the cache is of the same size.

        Raises:
            CspEdgeError: the cache is of another size since, or the queries don't fit.
        """
        assert self._hook, "made without prune=True"
        try:
            self._hook.restore(snapshot.cache)
        except BaseException:
            self.clear()
            raise
        self.items = list(snapshot.items)
        self.n_tokens, self.n_past = snapshot.n_tokens, snapshot.n_past
        self._n_pruned, self._n_evicted = snapshot.n_pruned, snapshot.n_evicted
        self._n_recent = snapshot.n_recent


def _checked(name: str, value: object, low: int, high: int) -> int:
    if (
        not isinstance(value, (int, np.integer))
        or isinstance(value, bool)
        or not low <= value <= high
    ):
        raise OptionError(f"{name}={value!r}: give an integer from {low} to {high}")
    return int(value)


def _too_large(n_ctx: int, kv_type: str) -> str:
    return (
        f"no memory for a {kv_type} cache of {n_ctx} cells: "
        "lower n_ctx, shorten the prompt, or use a smaller kv_type"
    )


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
