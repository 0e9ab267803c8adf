"""One model at work in llama.cpp: tokens and pictures in, KV cache and logits out."""

import ctypes
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from csp_edge import native
from csp_edge.encoder import Encoder
from csp_edge.errors import (
    CspEdgeError,
    MemoryLimitError,
    ModelError,
    OptionError,
    PolicyError,
    PromptError,
)
from csp_edge.hook import Hook, Pruning
from csp_edge.hook import Snapshot as CacheSnapshot
from csp_edge.loading import Progress, check_can_chat, context_params, load_model
from csp_edge.memory import available_memory
from csp_edge.model_info import describe, ggml_type
from csp_edge.native import llama, mtmd
from csp_edge.policies import Policy, Resolved
from csp_edge.rpc import Servers
from csp_edge.tokenizer import Item, Patches, Prompt, Tokenizer, count_tokens

_N_UBATCH = 512
_N_CELLS_STEP = 256  # that a cache grows by while decoding
_N_TOKENS_RECALL = 1024  # for so many of a conversation, one token is decoded before a recall
_N_CTX_FIRST = 1024  # of a cache that can't grow
_SEQ = 0


@dataclass(frozen=True, slots=True)
class Prefill:
    """What one prefill did. Seconds; tokens.

    n_cells: cells that it all takes, or would take without max_cells.
    """

    n_reused: int
    n_decoded: int
    n_cells: int
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
    n_uneven: int
    policy: Policy | None
    window: int
    recent: int
    lookahead: int
    is_probed: bool
    n_prompt: int
    n_unrecalled: int


class Engine:
    """Owns a model, its projector, one context of one sequence, and the CSP hook on it.

    Not thread-safe. After an error the cache holds what `items` says, and the engine goes on.

    Args:
        model, mmproj: GGUF files.
        n_ctx: cells that the KV cache may grow to, and the positions that a conversation may have
            where the model knows fewer. None: the model's own.
        max_cells: cells that the KV cache never exceeds, not even during a prefill: whenever more
            would not fit, what is there is pruned by the policy given to prefill(). None: n_ctx.
        n_ubatch: tokens that are computed at once. None: 512.
        recall: keep what is evicted on the host, and let each new question choose anew among all
            that there ever was. A type as for kv_type, or None: what is evicted is lost.
        recall_folder: keep it there, in a file without a name, and no more than n_ctx tokens. None:
            in the host's memory.
        probe: with max_cells, prune by the queries of the prompt's last text, run ahead of what
            comes before it. Else by those of the tokens that were decoded last.
        n_threads: None: one for each CPU.
        n_gpu_layers: layers to offload, -1: all.
        rpc: "host:port" of RPC servers, whose devices take layers too.
        kv_type: type of K and V in the cache: f32, f16, bf16, q8_0 or q4_0.
        mmap: map the weights, so that they take memory once for all programs, or read them.
        max_image_tokens: of a picture or tile, where the projector takes any size. None: its own.
        prune: attach the CSP hook, so that prune() works.
        progress: called with ("load" | "encode" | "prefill", done, total).

    Raises:
        ModelError: the model can't be read, can't chat, or can't be pruned though it should.
        ProjectorError: the projector can't be read, or is another model's.
        OptionError: a setting is out of range.
        ServerError: an RPC server can't be reached. Raised by every method once one is lost.
        MemoryLimitError: the cache doesn't fit.
    """

    def __init__(
        self,
        model: Path,
        mmproj: Path | None = None,
        *,
        n_ctx: int | None = None,
        max_cells: int | None = None,
        n_ubatch: int | None = None,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
        rpc: Sequence[str] = (),
        kv_type: str = "f16",
        mmap: bool = True,
        max_image_tokens: int | None = None,
        prune: bool = False,
        recall: str | None = None,
        recall_folder: str | None = None,
        probe: bool = True,
        progress: Progress | None = None,
    ) -> None:
        self.model: Any = None
        self._ctx: Any = None
        self._hook: Hook | None = None
        self._batch: Any = None
        self._servers: Servers | None = None

        if recall is not None:
            ggml_type("recall", recall)
        self._n_ctx = _checked("n_ctx", n_ctx, 1, 2**31 - 1) if n_ctx is not None else None
        if max_cells is not None:
            max_cells = _checked("max_cells", max_cells, 256, 2**31 - 1)
        self.max_cells = max_cells
        n_ubatch = _checked("n_ubatch", _N_UBATCH if n_ubatch is None else n_ubatch, 32, 2**16)
        self._n_ubatch = min(n_ubatch, self.max_cells or n_ubatch)
        self.n_threads = _checked("n_threads", cpus() if n_threads is None else n_threads, 1, 512)
        self._n_gpu_layers = _checked("n_gpu_layers", n_gpu_layers, -1, 2**31 - 1)
        self.kv_type = kv_type
        self._progress = progress or (lambda stage, done, total: None)

        self.info = describe(model, mmproj, kv_type)
        self.bytes_per_cell = self.info.kv_bytes_per_token  # of K and V in all layers
        self.items: list[Item] = []  # what the cache holds, evicted tokens included
        self.n_ctx: int = 0

        try:
            if rpc:
                self._servers = Servers(rpc)
            self._load_model(model, mmap)
            self.encoder = Encoder(
                mmproj,
                self.model,
                on_gpu=n_gpu_layers != 0,
                n_threads=self.n_threads,
                max_image_tokens=max_image_tokens,
            )
            kind = self.info.projector.type if self.info.projector else ""
            self.tokenizer = Tokenizer(model, self.model, self.encoder.handle, kind)
            self._must_prune = prune
            self._recall_type = recall
            self._recall_folder = recall_folder
            self._probes = probe
            self._new_context(self._n_ubatch)
        except BaseException:
            self.close()
            raise

    # loading

    def _load_model(self, path: Path, mmap: bool) -> None:
        with self._asking_servers():
            self.model = load_model(
                path,
                n_gpu_layers=self._n_gpu_layers,
                mmap=mmap,
                devices=self._servers.devices if self._servers else None,
                progress=self._progress,
            )
        check_can_chat(path, self.model)
        self._n_ctx_train: int = llama.llama_model_n_ctx_train(self.model)
        self.n_ctx_max: int = self._n_ctx or self._n_ctx_train
        if self.max_cells:
            self.max_cells = min(self.max_cells, self.n_ctx_max)
        self._n_pos_max: int = max(self.n_ctx_max, self._n_ctx_train)
        self._n_swa: int = llama.llama_model_n_swa(self.model)

    def _new_context(self, n_ubatch: int, n_ctx: int | None = None) -> None:
        """A context with a cache that grows, or, where it can't, with one of n_ctx cells."""
        self._free_context()
        try:
            if not self._make_elastic_context(n_ubatch):
                self._make_plain_context(n_ubatch, n_ctx)
            # of a small context llama.cpp makes the batch smaller
            self._n_ubatch = llama.llama_n_ubatch(self._ctx)
            self._batch = llama.llama_batch_init(self._n_ubatch, 0, 1)
        except BaseException:
            self._free_context()
            raise

    def _make_elastic_context(self, n_ubatch: int) -> bool:
        """Whether it could be made."""
        n_cells = min(self.n_ctx_max, n_ubatch)
        self._check_memory(n_cells, n_ubatch)
        self._init_context(n_ubatch, self.n_ctx_max, n_cells)
        try:
            self._hook = Hook(self._ctx)
        except ModelError as error:
            if self._must_prune or self.max_cells:
                raise ModelError(f"{self.info.path}: {error}") from None
            self._free_context()
            return False
        if self._recall_type:
            self._keep_evicted(ggml_type("recall", self._recall_type))
        self.n_ctx = self.n_ctx_max
        return True

    def _keep_evicted(self, kv_type: int) -> None:
        assert self._hook
        if self._recall_folder is None:
            self._hook.keep_evicted(kv_type)
            return
        try:
            with tempfile.TemporaryFile(dir=self._recall_folder) as file:
                self._hook.keep_evicted(kv_type, file.fileno())
        except OSError as error:
            raise MemoryLimitError(
                f"no file for what is evicted in {self._recall_folder}: {error.strerror}: "
                "let TMPDIR name a folder on a disk with room"
            ) from None

    def _make_plain_context(self, n_ubatch: int, n_ctx: int | None) -> None:
        n_ctx = self._n_ctx or n_ctx or min(_N_CTX_FIRST, self.n_ctx_max)
        self._check_memory(n_ctx, n_ubatch)
        self._init_context(n_ubatch, n_ctx)
        self.n_ctx = min(n_ctx, llama.llama_n_ctx(self._ctx))

    def _init_context(self, n_ubatch: int, n_ctx: int, n_cells: int | None = None) -> None:
        params = context_params(
            n_ctx=n_ctx, n_ubatch=n_ubatch, kv_type=self.kv_type, on_gpu=self._n_gpu_layers != 0
        )
        params.n_threads = params.n_threads_batch = self.n_threads
        if n_cells is None:
            self._ctx, why = native.explained(llama.llama_init_from_model, self.model, params)
        else:
            self._ctx, why = native.explained(native.csp_init_context, self.model, params, n_cells)
        if not self._ctx:
            self._check_servers()
            if "alloc" in why:
                raise MemoryLimitError(f"{_too_large(n_cells or n_ctx, self.kv_type)} ({why})")
            raise ModelError(f"{self.info.path}: no context with kv_type={self.kv_type!r}: {why}")
        self._memory = llama.llama_get_memory(self._ctx)
        if not self._memory:
            raise ModelError(f"{self.info.path}: keeps no cache, so it can't chat")

    def _check_memory(self, n_cells: int, n_ubatch: int) -> None:
        available = available_memory()
        if self._n_gpu_layers or available is None:
            return
        # beside K and V, the attention mask grows with the cache: it is held in f32 and f16
        needed = n_cells * (self.bytes_per_cell + 6 * n_ubatch)
        held = self._hook.n_cells * self.bytes_per_cell if self._hook else 0
        if needed - held > available:
            raise MemoryLimitError(
                f"{_too_large(n_cells, self.kv_type)}: {needed / 2**20:.0f} MiB are needed and "
                f"{available / 2**20:.0f} MiB are free"
            )

    def _resize(self, n_cells: int) -> None:
        """Let the cache grow or shrink, by no less than a step, within max_cells."""
        assert self._hook
        n_cells = min(n_cells, self.max_cells or self.n_ctx)
        if self._hook.n_cells < n_cells:
            self._check_memory(n_cells, self._n_ubatch)
        elif n_cells + _N_CELLS_STEP > self._hook.n_cells:
            return
        self._hook.resize(n_cells)

    def _make_room(self, n_new: int) -> None:
        """Let the cache take `n_new` more cells: it grows, or is pruned."""
        n_cells = self.n_cells + n_new
        if self.max_cells and n_cells > self.max_cells:
            self._prune_to(self.max_cells - max(n_new, self.max_cells // 8))
        elif self._hook and n_cells > self._hook.n_cells:
            self._resize(n_cells + _N_CELLS_STEP)

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
        if hasattr(self, "encoder"):  # not where loading failed before
            self.encoder.close()
        if self.model:
            llama.llama_model_free(self.model)
        if self._servers:
            self._servers.close()
        self.model = self._servers = None

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
    def n_cells_max(self) -> int:
        """Cells that the cache has memory for now."""
        return self._hook.n_cells if self._hook else self.n_ctx

    @property
    def room(self) -> int:
        """Tokens that can still be decoded."""
        n_positions = self._n_pos_max - self.n_past
        if self._recall_folder is not None:
            n_positions = min(n_positions, self.n_ctx_max - self.n_tokens)
        return max(
            0, n_positions if self.max_cells else min(n_positions, self.n_ctx - self.n_cells)
        )

    def _forget(self) -> None:
        self._policy: Policy | None = None  # what makes room within max_cells
        self._window = 0  # queries that it observes
        self._recent = 0  # cells that it keeps in any case
        self._is_probed = False  # those are a probe's
        self._lookahead = 0  # queries of an answer's first tokens that it observes, too
        self._n_ahead = 0  # tokens of an answer that were looked at, and taken back
        self._n_prompt = 0  # tokens of the conversation when it was last prefilled
        self._n_unrecalled = 0  # tokens decoded since the last recall
        self.items.clear()
        self.n_tokens = 0  # of the conversation, evicted ones included
        self.n_past = 0  # the next token's position
        self._n_pruned = 0  # leading items that can only go together
        self._n_evicted = 0  # tokens without a cell
        self._n_recent = 0  # pruned tokens that have a cell of their own
        self._n_uneven = 0  # cells that the fullest head keeps beyond the budget

    def _append(self, item: Item) -> None:
        self.items.append(item)
        self.n_tokens += 1 if isinstance(item, int) else item.n_tokens
        self.n_past += 1 if isinstance(item, int) else item.n_pos

    def clear(self) -> None:
        """Empty the cache, and give its memory back."""
        self._check_servers()
        with self._asking_servers():
            self._empty()
            if self._hook:
                self._hook.resize(0)

    def _empty(self) -> None:
        self._forget()
        self.observe(0)
        if self._ctx:
            llama.llama_memory_clear(self._memory, False)

    def cut(self, n_items: int) -> bool:
        """Keep the first `n_items` of `items`. False, and an empty cache, if the memory can't.

        Of a pruned part no more than the recent cells can be cut off.
        """
        lost = self.items[n_items : self._n_pruned]
        if count_tokens(lost) > self._n_recent:
            self._empty()
            return False
        self._n_pruned -= len(lost)
        self._n_recent -= count_tokens(lost)
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
        self._check_servers()
        self.observe(0)
        if not self._ctx:
            return
        if self.items and llama.llama_memory_seq_pos_min(self._memory, _SEQ) < 0:
            self.clear()
        else:
            self.cut(len(self.items))

    def _check_servers(self) -> None:
        if self._servers:
            self._servers.check()

    @contextmanager
    def _asking_servers(self) -> Iterator[None]:
        """Where a server is lost, that is why this fails, whatever the error says."""
        try:
            yield
        except CspEdgeError:
            self._check_servers()
            raise

    def observe(self, n_window: int) -> None:
        """Keep the queries of the last `n_window` tokens decoded from now on, for prune(). 0: none.

        Raises:
            MemoryLimitError: they don't fit.
        """
        if self._hook:
            with self._asking_servers():
                self._hook.observe(n_window)

    def prefill(
        self,
        prompt: Prompt,
        *,
        room: int = 0,
        window: int = 0,
        lookahead: int = 0,
        policy: Policy | None = None,
    ) -> Prefill:
        """Bring the cache to hold `prompt`, decoding only what it doesn't hold yet.

        Of a conversation that was pruned, the pruned part is kept if `prompt` goes on from it, and
        dropped as a whole otherwise. The last token is always decoded: `logits` are its own.

        Args:
            room: tokens of answer to leave room for, where n_ctx allows.
            window: observe the queries of that many last tokens, for prune().
            lookahead: and those of that many tokens that are decoded then.
            policy: what prunes where max_cells is reached, then and while decoding.

        Raises:
            PromptError: the prompt is beyond the context, or ends with a picture.
            MemoryLimitError: a cache that holds it doesn't fit, or max_cells are too few for a
                picture.
            PolicyError: the policy keeps more cells in one head than it was asked to.
        """
        if not isinstance(prompt.items[-1], int):
            raise PromptError("the prompt ends with a picture: put text after it")
        is_beyond = self._recall_folder is not None and prompt.n_tokens > self.n_ctx_max
        if prompt.n_pos > self._n_pos_max or is_beyond:
            raise self._beyond(prompt)
        recent = 0
        if policy:
            recent = policy.resolve(prompt.n_tokens, has_pictures=prompt.has_pictures).recent
        try:
            if not self._ctx:
                self._new_context(self._n_ubatch)
            n_kept = self._reuse(prompt)
            n_kept = self._fit(prompt, n_kept, room)
            n_cells = self.n_cells + prompt.n_tokens - self.n_tokens
            self._is_probed = False
            if self.max_cells and n_cells > self.max_cells:
                if not policy:
                    raise PolicyError(f"max_cells={self.max_cells} need a policy to prune by")
                n_kept = self._probe(prompt, n_kept, window)
            if self._recall_type and self._n_evicted and policy:
                n_kept = self._recall(prompt, n_kept, window, policy)
            n_reused = self.n_tokens
            n_encoded, encode_s = self.encoder.n_encoded, self.encoder.encode_s
            if not self._is_probed:
                # within max_cells, what is decoded after the prompt prunes, too
                n_new = self.max_cells or prompt.n_tokens - n_reused
                self.observe(min(window, n_new) + lookahead)
            # the probe and the recall may have changed it
            n_cells = self.n_cells + prompt.n_tokens - self.n_tokens
            self._policy, self._window, self._recent = policy, window, recent
            self._lookahead, self._n_ahead = lookahead, 0
            t0 = time.perf_counter()
            self._decode_items(prompt, n_kept)
            self._n_prompt = self.n_tokens
            t1 = time.perf_counter()
        except BaseException:
            self._recover()
            raise
        encode_s = self.encoder.encode_s - encode_s
        return Prefill(
            n_reused,
            prompt.n_tokens - n_reused,
            n_cells,
            self.encoder.n_encoded - n_encoded,
            encode_s,
            t1 - t0 - encode_s,
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
        # an answer that was looked at, or had cells recalled, counts as pruned, too
        is_in_answer = self._recall_type or count_tokens(self.items[:n_kept]) >= self._n_prompt
        if n_kept < self._n_pruned and not is_in_answer:
            self._empty()
            return 0
        if n_kept < len(self.items) and not self.cut(n_kept):
            return 0
        return n_kept

    def _fit(self, prompt: Prompt, n_kept: int, room: int) -> int:
        """Give the cache room for `prompt`. How many of its items the cache still holds."""
        pictures = [item for item in prompt.items[n_kept:] if isinstance(item, Patches)]
        # a picture that is not causal is computed at once
        n_ubatch = max([self._n_ubatch, *(p.n_tokens for p in pictures if not p.causal)])
        if self.max_cells:
            self._check_pictures(pictures)
        n_ctx = max(self.n_ctx, min(_power_of_2(prompt.n_tokens + room), self.n_ctx_max))
        if n_ubatch > self._n_ubatch or (not self._hook and n_ctx > self.n_ctx):
            self._new_context(n_ubatch, n_ctx)
            n_kept = 0
        n_cells = self.n_cells + prompt.n_tokens - self.n_tokens
        if not self.max_cells and n_cells > self.n_ctx:
            raise self._beyond(prompt)
        if self._hook:
            n_cells += min(room, _N_CELLS_STEP)
            self._resize(max(self._hook.n_cells, n_cells))
        return n_kept

    def _check_pictures(self, pictures: list[Patches]) -> None:
        assert self.max_cells
        for picture in pictures:
            if 2 * picture.n_tokens > self.max_cells:
                raise MemoryLimitError(
                    f"picture {picture.picture + 1} takes {picture.n_tokens} cells, more than half "
                    f"of max_cells={self.max_cells}: give at least {2 * picture.n_tokens}"
                )

    def _probe(self, prompt: Prompt, n_kept: int, window: int) -> int:
        """Observe the end of the prompt's text before all else. How many items the cache holds."""
        assert self._hook
        n_most = self.max_cells or self.n_ctx
        n_text = sum(isinstance(item, int) for item in prompt.items[n_kept:])
        if n_most - self.n_cells < min(n_text, window):
            self._empty()
            n_kept = 0
        self._ask_ahead(prompt, window, n_most - self.n_cells)
        # a sliding window may have been overwritten
        if self._probes and not self.cut(n_kept):
            return self._probe(prompt, 0, window)
        self._is_probed = self._probes
        return n_kept

    def _ask_ahead(self, prompt: Prompt, window: int, n_most: int) -> None:
        """Observe the last `n_most` tokens of the text that is still to come."""
        assert self._hook
        tokens, positions, n_past = [], [], self.n_past
        for item in prompt.items[len(self.items) :]:
            if isinstance(item, int):
                tokens.append(item)
                positions.append(n_past)
            n_past += 1 if isinstance(item, int) else item.n_pos
        n = min(len(tokens), n_most)
        self.observe(min(window, n))
        if self._probes:
            self._resize(max(self._hook.n_cells, self.n_cells + n))
            self._hook.probe(tokens[-n:], positions[-n:])

    def _ask_again(self, prompt: Prompt, n_most: int) -> int:
        """Before a pruning, observe the question that follows the pictures, as far as it fits.

        What was read since the last time is in its sight. Not where no more pictures come, or where
        it would take the place of others in a sliding window.

        Returns:
            The cells that the next time wants.
        """
        if not self._is_probed or self._n_swa:
            return 0
        rest = reversed(prompt.items[len(self.items) :])
        n_text = next((i for i, item in enumerate(rest) if isinstance(item, Patches)), 0)
        n = min(n_text, n_most // 8)
        n_free = n_most - self.n_cells
        if 0 < min(n, self._window) <= n_free:
            self._ask_ahead(prompt, self._window, min(n, n_free))
        return n

    def _recall(self, prompt: Prompt, n_kept: int, window: int, policy: Policy) -> int:
        """Choose what the cache holds by the new question. How many items it holds."""
        assert self._hook
        if not self._is_probed:
            n_kept = self._probe(prompt, n_kept, window)
        if self._n_evicted:
            budget, _, recent, _ = policy.resolve(prompt.n_tokens, has_pictures=prompt.has_pictures)
            budget = min(budget, self._n_cells_pruned)
            n_cells = budget + prompt.n_tokens - self.n_tokens
            self._resize(max(self._hook.n_cells, n_cells))
            self._choose_again(policy, Resolved(budget, window, min(recent, budget)))
        return n_kept

    def _recall_more(self) -> None:
        """While decoding, now and then choose what the cache holds by the answer so far."""
        self._n_unrecalled += 1
        if not self._recall_type or not self._n_evicted or not self._policy:
            return
        # it takes the longer, the more there is to choose from, and changes the less, the longer
        # the answer is. Every query has its say
        n_answer = self.n_tokens - self._n_prompt
        n_wait = max(self.n_tokens // _N_TOKENS_RECALL, min(n_answer // 8, self._window))
        if self._n_unrecalled < n_wait:
            return
        budget = self.n_cells - self._n_uneven
        n_ahead = min(n_answer, self._lookahead)
        amounts = Resolved(
            budget, self._window + n_ahead, min(self._recent + n_ahead, budget), n_ahead
        )
        self._choose_again(self._policy, amounts)
        self._n_unrecalled = 0

    def _choose_again(self, policy: Policy, amounts: Resolved) -> None:
        """Recall, within max_cells."""
        assert self._hook
        self._set_pruned(self._hook.recall(policy, amounts), amounts.budget)
        self._check_kept(policy, self.n_cells, amounts.budget)

    def _beyond(self, prompt: Prompt) -> PromptError:
        return PromptError(
            f"the prompt of {prompt.n_tokens} tokens is beyond the context of {self.n_ctx_max}: "
            "shorten it, send fewer pictures, or raise n_ctx"
        )

    def _decode_items(self, prompt: Prompt, start: int) -> None:
        text: list[int] = []
        n_text_max = min(self._n_ubatch, (self.max_cells or 2**31) // 4)
        n_pictures = sum(isinstance(item, Patches) for item in prompt.items[start:])
        n_encoded = 0
        for i in range(start, len(prompt.items)):
            self._progress("prefill", self.n_tokens + len(text), prompt.n_tokens)
            item = prompt.items[i]
            if isinstance(item, int):
                text.append(item)
            if text and (
                len(text) == n_text_max
                or i + 1 == len(prompt.items)
                or not isinstance(prompt.items[i + 1], int)
            ):
                self._make_room_in(prompt, len(text))
                self._decode_text(text, want_logits=i + 1 == len(prompt.items))
                text = []
            if isinstance(item, Patches):
                self._progress("encode", n_encoded, n_pictures)
                embedding = self.encoder.embed(prompt, i, self.max_cells)
                n_encoded += 1
                self._progress("encode", n_encoded, n_pictures)
                self._make_room_in(prompt, item.n_tokens)
                self._decode_picture(prompt.placeholder(i), item, embedding)
        self._progress("prefill", prompt.n_tokens, prompt.n_tokens)

    def _make_room_in(self, prompt: Prompt, n_new: int) -> None:
        """Let the cache take `n_new` more tokens of a prompt."""
        if self.max_cells and self.n_cells + n_new > self.max_cells:
            n_new += self._ask_again(prompt, self.max_cells)
        self._make_room(n_new)
        n_rest = prompt.n_tokens - self.n_tokens
        if self._is_probed and self.n_cells + n_rest <= (self.max_cells or self.n_ctx):
            # the probe has done its work: the tokens themselves see more
            self._is_probed = False
            self.observe(min(self._window, n_rest) + self._lookahead)

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
                self.encoder.handle,
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
            self._make_room(1)
            self._decode_text([token], want_logits=True)
            self._recall_more()
        except BaseException:
            self._recover()
            raise

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """float32 [n_vocab] after the last token; a view, valid until the next decode."""
        pointer = llama.llama_get_logits_ith(self._ctx, -1)
        self._check_servers()
        return native.array(pointer, self.tokenizer.n_vocab)

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

        That may be after some decode() calls, whose queries then count too. What they decoded stays
        beside the budget if the policy looks ahead. Observation ends with it, or, within max_cells
        and with recall, begins anew. With recall, what was evicted before can be chosen again. A
        budget of all cells and more evicts nothing. After an error the cache is empty.

        Args:
            inspect: keep queries, keys and scores too.

        Raises:
            PolicyError: the policy makes no sense for this many tokens, or chose nonsense.
            CspEdgeError: nothing was observed, or the device failed.
            Anything that the policy's own select() raises.
        """
        assert self._hook, "this model's cache can't be pruned"
        try:
            budget, window, recent, lookahead = self._resolve(policy)
            n_answer = max(0, self.n_tokens - self._n_prompt) if lookahead else 0
            n_ahead = min(self._n_ahead or n_answer, lookahead)
            budget = min(budget + n_answer, self._n_cells_pruned)
            recent = min(recent + n_answer, budget)
            amounts = Resolved(budget, window + n_ahead, recent, n_ahead)
            is_recall = self._recall_type and self._n_evicted
            change = self._hook.recall if is_recall else self._hook.prune
            pruning = change(policy, amounts, inspect=inspect)
            self._check_servers()
            self._set_pruned(pruning, budget)
            # recalls go by the question's queries too, unless what was looked at keeps others out
            if not self._recall_type or self._n_ahead:
                self.observe(window if self.keeps_observing else 0)
            self._n_unrecalled = 0
            self._resize(self.n_cells + _N_CELLS_STEP)
        except BaseException:
            self.clear()
            raise
        return pruning

    def look_ahead(self, tokens: Sequence[int]) -> None:
        """Observe the beginning of an answer after the last token, and take it back, for prune().

        Args:
            tokens: as many as prefill() was told to look ahead, or fewer.

        Raises:
            CspEdgeError: they can't be decoded.
        """
        assert self._hook, "this model's cache can't be pruned"
        if tokens:
            self._make_room(len(tokens))
            self._hook.probe(tokens, range(self.n_past, self.n_past + len(tokens)))
        self._n_ahead = len(tokens)

    def _prune_to(self, n_cells: int) -> None:
        """Make the cache hold no more than that, within max_cells."""
        policy = self._policy
        if not policy:
            raise PolicyError(f"max_cells={self.max_cells} are full: prefill with a policy")
        try:
            # where a prompt goes on, its last cells so far are like any other
            recent = 0 if self._is_probed else min(self._recent, n_cells)
            assert self._hook
            pruning = self._hook.prune(policy, Resolved(n_cells, self._window, recent))
            self._set_pruned(pruning, n_cells)
            self._check_kept(policy, pruning.n_kept, n_cells)
        except BaseException:
            self.clear()
            raise

    def _check_kept(self, policy: Policy, n_kept: int, budget: int) -> None:
        if self.max_cells and n_kept > budget:
            self.clear()
            raise PolicyError(
                f"{type(policy).__name__} keeps {n_kept} cells in one head, when asked for "
                f"{budget}: within max_cells use a policy that gives all heads as many"
            )

    @property
    def keeps_observing(self) -> bool:
        """Whether what is decoded after a prompt prunes or recalls, too."""
        return self.max_cells is not None or self._recall_type is not None

    def lookahead(self, policy: Policy) -> int:
        """Tokens of an answer that the policy wants to see before this prompt is pruned."""
        return self._resolve(policy).lookahead

    def _resolve(self, policy: Policy) -> Resolved:
        has_pictures = any(isinstance(item, Patches) for item in self.items)
        n_tokens = min(self._n_prompt, self.n_tokens) or self.n_tokens
        return policy.resolve(n_tokens, has_pictures=has_pictures)

    @property
    def _n_cells_pruned(self) -> int:
        """Cells that pruning may leave: within max_cells some room stays."""
        return self.max_cells - self.max_cells // 8 if self.max_cells else self.n_tokens

    def _set_pruned(self, pruning: Pruning, budget: int) -> None:
        self._n_pruned = len(self.items)
        self._n_evicted = self.n_tokens - pruning.n_kept
        self._n_recent = pruning.n_recent
        self._n_uneven = max(0, pruning.n_kept - budget)

    def snapshot(self) -> Snapshot:
        """The cache as it is, with the observed queries, for restore(). It takes as much memory.

        Raises:
            ModelError: the cache can't be copied.
            MemoryLimitError: it doesn't fit.
        """
        if not self._hook:
            raise self._no_snapshot()
        with self._asking_servers():
            cache = self._hook.snapshot()
        self._check_servers()
        return Snapshot(
            cache,
            tuple(self.items),
            self.n_tokens,
            self.n_past,
            self._n_pruned,
            self._n_evicted,
            self._n_recent,
            self._n_uneven,
            self._policy,
            self._window,
            self._recent,
            self._lookahead,
            self._is_probed,
            self._n_prompt,
            self._n_unrecalled,
        )

    def read_snapshot(
        self, read: Callable[[memoryview], object], n_bytes: int, n_cells: int
    ) -> CacheSnapshot:
        """The cache of a snapshot, from the bytes that its write() gave. They are not trusted.

        Args:
            read: fills what it is given with the next bytes, of which there are `n_bytes`.
            n_cells: that were in use.

        Raises:
            ModelError: the cache can't be copied.
            MemoryLimitError: they don't fit, once here and once in the cache.
            CspEdgeError: they are damaged, or of another kind of cache.
            Anything that `read` raises.
        """
        if not self._hook:
            raise self._no_snapshot()
        available = available_memory()
        if self._recall_folder is not None:
            # evicted cells go to the disk
            n_bytes_held = min(n_bytes, round(n_cells * self.bytes_per_cell))
        else:
            n_bytes_held = n_bytes
        if available is not None and 2 * n_bytes_held > available:
            raise MemoryLimitError(
                f"no memory for a saved cache of {n_bytes_held / 2**20:.0f} MiB: twice as much is "
                f"needed to read it, and {available / 2**20:.0f} MiB are free"
            )
        return self._hook.read_snapshot(read, n_bytes)

    def _no_snapshot(self) -> ModelError:
        return ModelError(f"{self.info.path}: its cache can't be pruned, nor copied or saved")

    def restore(self, snapshot: Snapshot) -> None:
        """Bring a snapshot's cache and queries back. `logits` stay those of the last token decoded.

        A snapshot can be restored any number of times. The cache is then of the size that it was.

        Raises:
            CspEdgeError: it is another engine's, or doesn't fit.
        """
        assert self._hook, "this model's cache can't be pruned"
        try:
            self._hook.restore(snapshot.cache)
        except BaseException:
            self.clear()
            raise
        self.items = list(snapshot.items)
        self.n_tokens, self.n_past = snapshot.n_tokens, snapshot.n_past
        self._n_pruned, self._n_evicted = snapshot.n_pruned, snapshot.n_evicted
        self._n_recent, self._n_uneven = snapshot.n_recent, snapshot.n_uneven
        self._policy, self._window = snapshot.policy, snapshot.window
        self._recent, self._lookahead = snapshot.recent, snapshot.lookahead
        self._is_probed = snapshot.is_probed
        self._n_prompt, self._n_unrecalled = snapshot.n_prompt, snapshot.n_unrecalled
        self._n_ahead = 0


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


def cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
