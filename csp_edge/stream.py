"""An answer as it comes."""

import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from types import TracebackType

from csp_edge.engine import Engine, Prefill
from csp_edge.errors import CspEdgeError
from csp_edge.results import CacheFigures, ChatResult, FinishReason, Timings, Usage
from csp_edge.sampling import Sampler, TextStream
from csp_edge.template import Message, Text
from csp_edge.tokenizer import Patches, Prompt


@dataclass(frozen=True, slots=True)
class Start:
    """A prompt that is in the cache, and the first token of its answer.

    lookahead: tokens of the answer that come before prune(), or, if it is shorter, all.
    prune: what it did, and the seconds that it took. False: it is not to do anything.
    pruned: the same, where nothing is looked at ahead.
    """

    messages: list[Message]
    token: int | None
    prompt: Prompt
    prefill: Prefill
    lookahead: int
    prune: Callable[[bool], tuple[CacheFigures, float]]
    pruned: tuple[CacheFigures, float] | None
    first_token_s: float


@dataclass(slots=True)
class _Said:
    """What an answer is and took so far."""

    pieces: list[str]
    n_tokens: int = 0
    n_decoded: int = 0
    decode_s: float = 0.0
    reason: FinishReason = "cancelled"
    pruned: tuple[CacheFigures, float] | None = None


class ChatStream(Iterator[str]):
    """An answer's pieces as they come, and its `result` once they have ended.

    It can be ended early, by close() from any thread, `with`, or by letting go of it. What was said
    until then stays in the cache.

    Args:
        end: called once, with the conversation as it is then.
    """

    def __init__(
        self,
        engine: Engine,
        start: Start,
        sampler: Sampler,
        text: TextStream,
        max_tokens: int | None,
        end: Callable[[list[Message]], None],
    ) -> None:
        self._start = start
        self._sampler = sampler
        self._end = end
        self._said = _Said([], pruned=start.pruned)
        # it knows nothing of the stream, which so ends as soon as nobody holds it
        self._pieces = _pieces(engine, start, sampler, text, max_tokens, self._said)
        self._lock = threading.RLock()
        self._is_closing = False
        self._taken_over = False
        self.result: ChatResult | None = None

    def __next__(self) -> str:
        with self._lock:
            if self._taken_over:
                raise CspEdgeError("this stream was closed by a later chat on the same thread")
            if self._is_closing:
                self.close()
            try:
                piece = next(filter(None, self._pieces))
            except StopIteration:
                self.close()
                raise
            except BaseException:
                # nothing is left to prune by
                self._said.pruned = self._said.pruned or self._start.prune(False)
                self.close()
                raise
            self._said.pieces.append(piece)
            return piece

    def close(self) -> None:
        """End the answer here."""
        # a thread that reads piece after piece hardly ever leaves the lock to this one
        self._is_closing = True
        with self._lock:
            if self.result is not None:
                return
            self._pieces.close()
            try:
                figures, prune_s = self._said.pruned or self._start.prune(True)
            except BaseException:
                figures, prune_s = self._start.prune(False)
                raise
            finally:
                self._sampler.close()
                self.result = self._result(figures, prune_s)
                answer = Message("assistant", (Text(self.result.text),))
                self._end([*self._start.messages, answer])

    def _result(self, figures: CacheFigures, prune_s: float) -> ChatResult:
        prompt, prefill, said = self._start.prompt, self._start.prefill, self._said
        return ChatResult(
            "".join(said.pieces),
            said.reason,
            Usage(
                prompt.n_tokens,
                sum(item.n_tokens for item in prompt.items if isinstance(item, Patches)),
                prefill.n_reused,
                said.n_tokens,
            ),
            Timings(
                prefill.encode_s,
                prefill.decode_s,
                prune_s,
                self._start.first_token_s,
                said.decode_s,
                said.n_decoded / said.decode_s if said.decode_s else 0.0,
            ),
            figures,
        )

    def take_over(self) -> None:
        """End the answer here: what reads on is told."""
        with self._lock:
            self._taken_over = self.result is None
            self.close()

    def __enter__(self) -> "ChatStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # a program that ends prunes no more
        if not sys.is_finalizing():
            self.close()


def _pieces(
    engine: Engine,
    start: Start,
    sampler: Sampler,
    text: TextStream,
    max_tokens: int | None,
    said: _Said,
) -> Generator[str]:
    """The answer from its first token on. Some pieces are empty."""
    token = start.token
    while token is not None and not engine.tokenizer.ends(token):
        said.n_tokens += 1
        yield text.push(engine.tokenizer.piece(token))
        if text.stopped:
            break
        if said.n_tokens == max_tokens or not engine.room:
            said.reason = "length"
            yield text.flush()
            return
        t0 = time.perf_counter()
        engine.decode(token)
        token = sampler.sample(engine.logits)
        said.decode_s += time.perf_counter() - t0
        said.n_decoded += 1
        if said.n_decoded == start.lookahead:
            said.pruned = start.prune(True)
    said.reason = "stop"
    yield text.flush()
