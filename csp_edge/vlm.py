"""Chat with pictures: the package's front door."""

import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

from csp_edge.engine import Engine, Prefill
from csp_edge.errors import CspEdgeError, OptionError, PolicyError, TemplateError
from csp_edge.images import Pictures, Source
from csp_edge.loading import Progress
from csp_edge.memory import disk_folder
from csp_edge.model_files import find_model
from csp_edge.policies import CSP, Full, Policy, Resolved
from csp_edge.results import CacheFigures, ChatResult, pictures_of
from csp_edge.sampling import Sampler, Sampling, TextStream, schema_to_grammar
from csp_edge.session import Session, save_session
from csp_edge.stream import ChatStream, Start
from csp_edge.template import (
    ChatTemplate,
    Message,
    Text,
    normalize_messages,
    replace_pictures,
)
from csp_edge.tokenizer import Prompt

_MARKER = "<__media__>"
DEMO_MODEL = Path(__file__).parent / "models" / "csp-demo-q8_0.gguf"


class EdgeVLM:
    """A model to chat with about pictures.

    Threads may share it: calls queue, and a stream holds its place until it has ended or is closed.
    A chat that begins while a stream of the same thread is open closes that stream.

    Args:
        path: a model's GGUF file, or a folder that holds one. A projector beside it is found.
        mmproj: the projector's file.
        memory: bytes of the host's memory, like "4GiB", that this process stays within: what
            doesn't fit of a conversation is pruned as with max_cells, and the cache's type, the
            batches and the size of pictures are chosen so that the most is kept: csp_edge.plan.
            What `recall` keeps then is in a file without a name, in TMPDIR or else /var/tmp.
        n_ctx: cells that the KV cache may grow to. None: as many as the model knows positions.
        max_cells: cells that the KV cache never exceeds, however long the prompt is: what doesn't
            fit is pruned while the prompt is read, and while the answer is written.
        recall: keep what is evicted, in the host's memory or, with `memory`, in a file, and let
            each question choose anew among all that there ever was. A type as for kv_type to keep
            it in; True: kv_type.
        n_threads: None: one for each CPU.
        n_gpu_layers: layers to offload, -1: all. None: all if there are RPC servers, else none.
        rpc: "host:port" of RPC servers (csp-edge rpc-server), which share the offloaded layers with
            this machine's GPUs, by free memory. They are trusted.
        kv_type: type of K and V in the cache: f32, f16, bf16, q8_0 or q4_0. None: f16, or what
            loses least within `memory`.
        cache: what is kept of each prompt: CSP(...), another of csp_edge.policies, or Full().
        allow_urls: fetch pictures given as http(s) URLs.
        progress: called with ("load" | "encode" | "prefill", done, total).

    Raises:
        ModelError: the model can't be read, can't chat, or `cache` can't prune it.
        ProjectorError: the projector can't be read, or belongs to another model.
        TemplateError: its chat template is broken.
        PolicyError, OptionError: a setting makes no sense.
        ServerError: an RPC server can't be reached. Once one is lost, close this.
        MemoryLimitError: it doesn't fit.
        LibraryError: the patched llama.cpp libraries are missing.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        mmproj: str | PathLike[str] | None = None,
        memory: int | str | None = None,
        n_ctx: int | None = None,
        max_cells: int | None = None,
        recall: bool | str = False,
        n_threads: int | None = None,
        n_gpu_layers: int | None = None,
        rpc: Sequence[str] = (),
        kv_type: str | None = None,
        cache: Policy | Full = CSP(),  # noqa: B008
        allow_urls: bool = False,
        progress: Progress | None = None,
    ) -> None:
        if not isinstance(cache, (Policy, Full)):
            raise PolicyError(f"cache={cache!r}: give a policy like CSP(...), or Full()")
        if max_cells is not None and not isinstance(cache, Policy):
            raise PolicyError(f"max_cells={max_cells!r}: cache={cache!r} can't hold it: give CSP()")
        files = find_model(path)
        projector = files.mmproj if mmproj is None else Path(mmproj)
        self.cache = cache
        self._pictures = Pictures(allow_url=allow_urls)
        if n_gpu_layers is None:
            n_gpu_layers = -1 if rpc else 0
        fitted: dict[str, Any] = {}
        self._settings = {
            "memory": memory,
            "n_ctx": n_ctx,
            "max_cells": max_cells,
            "recall": recall or False,
        }
        if memory is not None:
            if max_cells is not None or rpc:
                other = "max_cells" if max_cells is not None else "rpc"
                raise OptionError(f"memory={memory!r} and {other}: give one of them")
            fitted = _fit(files.model, projector, memory, kv_type, n_gpu_layers, cache, recall)
            kv_type = fitted.pop("kv_type")
            max_cells = fitted.pop("max_cells", None)
            n_cells = fitted.pop("n_ctx", None)
            if n_ctx is None or (isinstance(n_ctx, int) and n_cells and n_cells < n_ctx):
                n_ctx = n_cells
        kv_type = self._settings["kv_type"] = kv_type or "f16"
        self.engine = Engine(
            files.model,
            projector,
            n_ctx=n_ctx,
            max_cells=max_cells,
            recall=kv_type if recall is True else recall or None,
            n_threads=n_threads,
            n_gpu_layers=n_gpu_layers,
            rpc=rpc,
            kv_type=kv_type,
            prune=isinstance(cache, Policy),
            progress=progress,
            **fitted,
        )
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._close = weakref.finalize(self, _close_idle, self.engine, self._lock, self._pid)
        self._owner: threading.Thread | None = None
        self._stream: weakref.ref[ChatStream] | None = None
        self._messages: list[Message] = []
        try:
            self._template = ChatTemplate(
                self.engine.chat_template,
                bos_token=self.engine.tokenizer.bos_text,
                eos_token=self.engine.tokenizer.eos_text,
                marker=_MARKER,
            )
        except BaseException:
            self._close()
            raise
        self._lead = self._answer_lead()

    @classmethod
    def demo(cls, **options: Any) -> "EdgeVLM":
        """The small model in this package. It knows drawn scenes; options as for EdgeVLM."""
        return cls(DEMO_MODEL, **options)

    @classmethod
    def load(
        cls, path: str | PathLike[str], model: str | PathLike[str] | None = None, **options: Any
    ) -> "EdgeVLM":
        """A conversation that save() wrote, where it stood: `messages` are those so far.

        The same tokens give the same logits as they would have before. No picture is encoded again.

        Args:
            path: the file.
            model: the model's file or folder, if it is no longer where it was.
            options: as for EdgeVLM. memory, n_ctx, max_cells, recall, kv_type and cache are the
                saved ones where they are not given.

        Raises:
            SessionError: the file can't be read, is damaged, or is of another version, model,
                projector or kv_type.
            Whatever EdgeVLM raises.
        """
        with Session(path) as session:
            vlm = cls(**session.options(model, options))
            try:
                vlm._messages = session.restore(vlm.engine, vlm.cache)
            except BaseException:
                vlm.close()
                raise
        return vlm

    def save(self, path: str | PathLike[str]) -> None:
        """Write the conversation to a file, with the cache, the pictures and what was said.

        Whatever happens meanwhile, the file then is the old one or the new one. It is for the same
        model, projector and kv_type. Only the policies of this package are saved with it.

        Raises:
            SessionError: it can't be written.
            ModelError: the model's cache can't be saved.
            MemoryLimitError: a copy of the cache doesn't fit.
        """
        self._acquire()
        try:
            save_session(path, self.engine, self._messages, self.cache, self._settings)
        finally:
            self._release()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far: what the last chat was given, and its answer, for the next one.

        vlm.chat([*vlm.messages, {"role": "user", "content": "And in image 2?"}])
        """
        return [message.as_dict() for message in self._messages]

    @overload
    def chat(
        self,
        prompt: str | bytes | Sequence[Any],
        images: Sequence[Source] | None = ...,
        *,
        stream: Literal[False] = ...,
        max_tokens: int | None = ...,
        stop: str | Sequence[str] | None = ...,
        grammar: str | None = ...,
        json_schema: str | Mapping[str, Any] | None = ...,
        **sampling: float | None,
    ) -> ChatResult: ...

    @overload
    def chat(
        self,
        prompt: str | bytes | Sequence[Any],
        images: Sequence[Source] | None = ...,
        *,
        stream: Literal[True],
        max_tokens: int | None = ...,
        stop: str | Sequence[str] | None = ...,
        grammar: str | None = ...,
        json_schema: str | Mapping[str, Any] | None = ...,
        **sampling: float | None,
    ) -> ChatStream: ...

    def chat(
        self,
        prompt: str | bytes | Sequence[Any],
        images: Sequence[Source] | None = None,
        *,
        stream: bool = False,
        max_tokens: int | None = 512,
        stop: str | Sequence[str] | None = None,
        grammar: str | None = None,
        json_schema: str | Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> ChatResult | ChatStream:
        """The answer to a prompt, or to messages in OpenAI's shape.

        What the cache holds of the conversation already is not computed again: give the messages
        so far, the answers as they came, and a new one.

        Args:
            images: pictures before the prompt: paths, data URIs, bytes, PIL images, arrays.
            stream: return the pieces as they come.
            max_tokens: of the answer. None: as many as the context holds.
            stop: strings that end the answer.
            grammar: GBNF that the answer follows.
            json_schema: JSON schema that the answer follows, as a mapping or as text.
            sampling: temperature, top_k, top_p, min_p, repeat_penalty, frequency_penalty,
                presence_penalty, seed: see csp_edge.sampling.Sampling. Greedy by default.

        Raises:
            PromptError: the prompt is empty, malformed, not valid text, or beyond the context.
            ImageError: a picture can't be read.
            ProjectorError: there are pictures, and the model has no projector.
            TemplateError: the chat template refuses the messages.
            OptionError, PolicyError: a setting makes no sense, for this prompt.
            MemoryLimitError: the prompt's cache doesn't fit.
        """
        drawing = Sampling(**sampling)
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise OptionError(f"max_tokens={max_tokens!r}: give an integer of at least 1, or None")
        if grammar is not None and json_schema is not None:
            raise OptionError("grammar and json_schema: give one of them")
        if json_schema is not None:
            grammar = schema_to_grammar(json_schema)
        text = TextStream(stop, lead=self._lead)
        messages = normalize_messages(prompt, () if images is None else images)

        self._acquire()
        try:
            sampler = Sampler(self.engine.model, drawing, grammar)
            try:
                start = self._begin(messages, sampler, max_tokens or self.engine.n_ctx_max)
            except BaseException:
                sampler.close()
                raise
        except BaseException:
            self._release()
            raise
        answer = ChatStream(self.engine, start, sampler, text, max_tokens, self._end)
        self._stream = weakref.ref(answer)
        if stream:
            return answer
        with answer:
            for _ in answer:
                pass
        assert answer.result is not None
        return answer.result

    def reset(self) -> None:
        """Forget the conversation."""
        self._acquire()
        try:
            self.engine.clear()
            self._messages = []
        finally:
            self._release()

    def close(self) -> None:
        """Free everything. Closing twice is fine; using it afterwards is an error."""
        if self._close.alive and self._pid == os.getpid():
            self._acquire()
            try:
                self._close.detach()
                self.engine.close()
            finally:
                self._release()

    def __enter__(self) -> "EdgeVLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _acquire(self) -> None:
        if self._pid != os.getpid():
            # threads don't come along: what waits for them would wait for ever
            raise CspEdgeError(
                "this EdgeVLM is of the process that forked this one: make a new one"
            )
        if self._owner is threading.current_thread():
            stream = self._stream and self._stream()
            if stream:
                stream.take_over()
        if self._owner is threading.current_thread():
            raise CspEdgeError("this EdgeVLM is at work on this thread: wait until it has answered")
        self._lock.acquire()
        if not self._close.alive:
            self._lock.release()
            raise CspEdgeError("this EdgeVLM is closed: make a new one")
        self._owner = threading.current_thread()

    def _release(self) -> None:
        self._owner = None
        self._lock.release()

    def _end(self, messages: list[Message]) -> None:
        self._messages = messages
        self._release()

    def _answer_lead(self) -> str:
        """What the template writes before an answer: mostly nothing, or a space."""
        question, answer = Message("user", (Text("a"),)), Message("assistant", (Text("<b>"),))
        try:
            before = self._template.render([question])
            whole = self._template.render([question, answer], add_generation_prompt=False)
        except TemplateError:
            return ""
        lead, found, _ = whole.removeprefix(before).partition("<b>")
        return lead if whole.startswith(before) and found else ""

    def tokenize(self, messages: Sequence[Message]) -> Prompt:
        """The prompt that asks for the next answer, for the engine.

        It holds pictures: close it.

        Raises:
            ImageError: a picture can't be read.
            ProjectorError: there are pictures, and the model has no projector.
            TemplateError: the chat template refuses the messages.
        """
        sources = [source for message in messages for source in message.pictures]
        pictures = self._pictures.open(sources)
        texts = self._template.render(messages).split(_MARKER)
        parts: list[Any] = [texts[0]]
        for picture, text in zip(pictures, texts[1:], strict=True):
            parts += [picture, text]
        return self.engine.tokenizer.tokenize(
            [part for part in parts if not isinstance(part, str) or part]
        )

    def _begin(self, messages: Sequence[Message], sampler: Sampler, room: int) -> Start:
        t0 = time.perf_counter()
        pictures = self._pictures.open([s for message in messages for s in message.pictures])
        messages = replace_pictures(messages, pictures)
        with self.tokenize(messages) as prompt:
            policy = self.cache if isinstance(self.cache, Policy) else None
            amounts = Resolved(0, 0, 0)
            if policy:
                amounts = policy.resolve(prompt.n_tokens, has_pictures=prompt.has_pictures)
                if amounts.budget >= prompt.n_tokens and not self.engine.max_cells:
                    policy, amounts = None, Resolved(0, 0, 0)
            prefill = self.engine.prefill(
                prompt,
                room=room,
                window=amounts.window,
                lookahead=amounts.lookahead,
                policy=policy,
            )
        for picture in pictures:
            picture.hold(None)
        # drawn from the whole prompt: pruning takes nothing from the first token
        token = sampler.sample(self.engine.logits)

        is_pruned = amounts.budget < prefill.n_cells or self.engine.n_cells < prefill.n_cells
        if not is_pruned and not self.engine.keeps_observing:
            self.engine.observe(0)
        prune = partial(self._prune, policy if is_pruned else None, prompt, prefill)
        lookahead = amounts.lookahead if is_pruned else 0
        pruned = None if lookahead else prune(True)
        first_token_s = time.perf_counter() - t0
        return Start(messages, token, prompt, prefill, lookahead, prune, pruned, first_token_s)

    def _prune(
        self, policy: Policy | None, prompt: Prompt, prefill: Prefill, is_due: bool
    ) -> tuple[CacheFigures, float]:
        """What it did to the prompt's cells, and the seconds that it took."""
        t0 = time.perf_counter()
        n_answer = self.engine.n_tokens - prompt.n_tokens
        pruning = self.engine.prune(policy) if policy and is_due else None
        seconds = time.perf_counter() - t0
        n_cells, n_kept = prefill.n_cells, max(0, self.engine.n_cells - n_answer)
        n_bytes = self.engine.bytes_per_cell
        # layers with a sliding window are not pruned
        share = len(pruning.layers) / self.engine.info.n_layer if pruning else 1.0
        return CacheFigures(
            self.cache,
            prompt.n_tokens,
            n_cells,
            n_kept,
            round(n_cells * n_bytes),
            round((n_kept * share + n_cells * (1 - share)) * n_bytes),
            pictures_of(prompt),
            pruning,
        ), seconds


def _close_idle(engine: Engine, lock: threading.Lock, pid: int) -> None:
    """Free everything, unless a daemon thread is at work on it when Python ends."""
    if pid == os.getpid() and lock.acquire(blocking=False):
        engine.close()


def _fit(
    model: Path,
    mmproj: Path | None,
    memory: int | str,
    kv_type: str | None,
    n_gpu_layers: int,
    cache: Policy | Full,
    recall: bool | str,
) -> dict[str, Any]:
    """The engine's settings by which a chat stays within `memory`."""
    from csp_edge.plan import plan

    planned = plan(
        model,
        mmproj,
        memory,
        kv_type=kv_type or "auto",
        n_gpu_layers=n_gpu_layers,
        policy=cache,
        recall=recall or False,
    )
    bound = "max_cells" if isinstance(cache, Policy) else "n_ctx"
    return {
        bound: planned.n_cells,
        "kv_type": planned.kv_type,
        "n_ubatch": planned.n_ubatch,
        "mmap": planned.mmap,
        "max_image_tokens": planned.max_image_tokens,
        "recall_folder": disk_folder() if recall else None,
    }
