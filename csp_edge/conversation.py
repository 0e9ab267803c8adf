"""A conversation on a terminal."""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csp_edge.errors import CspEdgeError, printable
from csp_edge.images import Source, load_image
from csp_edge.results import ChatResult
from csp_edge.terminal import Progress, answer, write
from csp_edge.vlm import EdgeVLM

HELP = """\
/image PATH   show a picture with the next question
/stats        tokens, time and cache of the last answer
/reset        forget the conversation
/help         this list
/quit         leave, as Ctrl-D does; Ctrl-C stops an answer"""
_PROMPT = "> "
_HISTORY_LINES = 1000


def converse(
    vlm: EdgeVLM,
    progress: Progress,
    pictures: Sequence[Source] = (),
    *,
    allow_urls: bool = False,
    session: str | None = None,
    **options: Any,
) -> None:
    """Questions from the terminal until it ends, answers to stdout, all else to stderr.

    Args:
        pictures: shown with the first question.
        allow_urls: whether /image takes URLs.
        session: a file to save the conversation to after each answer.
        options: of every `EdgeVLM.chat`.
    """
    history = _read_history()
    _say(f"{printable(vlm.engine.info.name)}: ask something; /help lists the commands")
    conversation = _Conversation(vlm, progress, list(pictures), allow_urls, session, options)
    try:
        while True:
            try:
                line = _read_line().strip()
                if line == "/quit":
                    break
                conversation.take(line)
            except EOFError:
                _say("")
                break
            except KeyboardInterrupt:
                _say("")
            except UnicodeDecodeError as error:
                _say(f"error: the line is not valid UTF-8 at position {error.start}")
            except CspEdgeError as error:
                _say(f"error: {error}")
    finally:
        _write_history(history)


def stats(result: ChatResult) -> str:
    """Three lines about an answer."""
    usage, timings, cache = result.usage, result.timings, result.cache
    return (
        f"tokens  {usage.prompt_tokens} of the prompt ({usage.image_tokens} of pictures, "
        f"{usage.cached_tokens} known), {usage.completion_tokens} of the answer\n"
        f"time    {timings.first_token_s:.2f} s to the first token (encode {timings.encode_s:.2f}, "
        f"prefill {timings.prefill_s:.2f}), {timings.prune_s:.2f} s to prune, then "
        f"{timings.tokens_per_second:.1f} tokens/s\n"
        f"cache   {cache.cells_before} -> {cache.cells_after} cells, "
        f"{cache.bytes_before / 2**20:.2f} -> {cache.bytes_after / 2**20:.2f} MiB"
    )


class _Conversation:
    def __init__(
        self,
        vlm: EdgeVLM,
        progress: Progress,
        pictures: list[Source],
        allow_urls: bool,
        session: str | None,
        options: dict[str, Any],
    ) -> None:
        self._vlm = vlm
        self._progress = progress
        self._pictures = pictures  # for the next question
        self._allow_urls = allow_urls
        self._session = session
        self._options = options
        self._messages = vlm.messages
        self._last: ChatResult | None = None

    def take(self, line: str) -> None:
        """A question or a command."""
        command, _, argument = line.partition(" ")
        match command:
            case "":
                pass
            case "/image":
                self._show(argument.strip().strip("'\""))
            case "/stats":
                _say(stats(self._last) if self._last else "nothing has been answered yet")
            case "/reset":
                self._vlm.reset()
                self._messages.clear()
                self._pictures.clear()
                self._last = None
            case "/help":
                _say(HELP)
            case _ if command.startswith("/"):
                _say(f"error: unknown command {command!r}: /help lists them")
            case _:
                self._ask(line)

    def _show(self, path: str) -> None:
        if not path:
            _say("error: /image: give the path of a picture")
            return
        # pixels, not the path: the file may change before it is asked about again
        pixels = load_image(os.path.expanduser(path), allow_url=self._allow_urls)
        self._pictures.append(pixels)
        _say(f"{pixels.shape[1]} x {pixels.shape[0]}, goes with the next question")

    def _ask(self, question: str) -> None:
        pictures = [{"type": "image", "image": picture} for picture in self._pictures]
        self._messages.append(
            {"role": "user", "content": [*pictures, {"type": "text", "text": question}]}
        )
        try:
            result = answer(self._vlm, self._progress, write, self._messages, **self._options)
        except BaseException as error:
            self._messages.pop()
            if isinstance(error, CspEdgeError):
                self._pictures.clear()
            raise
        write("\n")
        self._messages = self._vlm.messages
        self._pictures.clear()
        self._last = result
        if result.finish_reason == "length":
            _say("(cut off: --max-tokens or the context is reached)")
        if self._session is not None:
            self._vlm.save(self._session)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _read_line() -> str:
    if sys.stdout.isatty():
        return input(_PROMPT)
    # stdout is for answers alone
    print(_PROMPT, end="", file=sys.stderr, flush=True)
    return input()


def _read_history() -> Path | None:
    """Line editing and the lines of earlier conversations, where Python has readline."""
    try:
        import readline
    except ImportError:
        return None
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = Path(state, "csp-edge", "history")
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY_LINES)
    return path


def _write_history(path: Path | None) -> None:
    if path is None:
        return
    import readline

    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        readline.write_history_file(path)
