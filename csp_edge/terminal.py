"""What the commands share: progress on a terminal, Ctrl-C, an answer as it comes."""

import signal
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from csp_edge.results import ChatResult
    from csp_edge.vlm import EdgeVLM

_STAGES = {
    "load": "loading",
    "encode": "encoding pictures",
    "prefill": "reading the prompt",
    "decode": "answering",
    "memory": "measuring memory",
}
_WIDTH = 30
# what stands in the line before the bar stays
_MARK, _CLEAR = "\x1b7", "\x1b8\x1b[K"


class Progress:
    """A bar on stderr, where that is a terminal. What EdgeVLM's `progress` wants.

    Within it, as a context manager, Ctrl-C waits for the next step, where the engine can stop:
    it sets `stopped`, and the step, if need be the first one of the next time, raises
    KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._is_terminal = sys.stderr.isatty()
        self._is_drawn = False

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self.stopped:
            self.stopped = False
            raise KeyboardInterrupt
        if done == total:
            self._clear()
        elif self._is_terminal:
            bar = ("#" * (_WIDTH * done // total)).ljust(_WIDTH, ".")
            start = _CLEAR if self._is_drawn else _MARK
            sys.stderr.write(f"{start}{_STAGES[stage]:<18} {bar} {done}/{total}")
            sys.stderr.flush()
            self._is_drawn = True

    def __enter__(self) -> "Progress":
        self._outer = signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._outer)
        self._clear()

    def _stop(self, *_: object) -> None:
        self.stopped = True

    def _clear(self) -> None:
        if self._is_drawn:
            sys.stderr.write(_CLEAR)
            sys.stderr.flush()
            self._is_drawn = False


def write(text: str) -> None:
    """To stdout, at once."""
    print(text, end="", flush=True)


def answer(
    vlm: "EdgeVLM",
    progress: Progress,
    write: Callable[[str], None],
    prompt: Any,
    images: Any = (),
    **options: Any,
) -> "ChatResult":
    """What `vlm.chat` answers, its pieces given to `write` as they come.

    Ctrl-C ends it: `finish_reason` is "cancelled" then.

    Raises:
        KeyboardInterrupt: Ctrl-C, before the answer began.
        CspEdgeError: whatever `EdgeVLM.chat` raises.
    """
    with progress, vlm.chat(prompt, images, stream=True, **options) as stream:
        for piece in stream:
            write(piece)
            if progress.stopped:
                break
    progress.stopped = False
    assert stream.result is not None
    return stream.result
