"""Messages, and the prompt that a model's chat template makes of them."""

import functools
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from types import FrameType
from typing import Any, Literal, NoReturn, TypeAlias, cast

from jinja2 import TemplateError as JinjaError
from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from csp_edge.errors import PromptError, TemplateError
from csp_edge.images import Source

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]

# what llama.cpp falls back to as well
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

MAX_PROMPT_CHARS = 64 * 1024**2
# lines of Python that a template may run, in about a second
MAX_TEMPLATE_STEPS = 2_000_000


@dataclass(frozen=True, slots=True)
class Text:
    """Text in a message."""

    text: str


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture in a message: `source` is anything that `load_image` takes."""

    source: Source


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    parts: tuple[Text | Picture, ...]

    @property
    def pictures(self) -> list[Source]:
        """Where its pictures come from, in order."""
        return [part.source for part in self.parts if isinstance(part, Picture)]

    def as_dict(self) -> dict[str, Any]:
        """In OpenAI's shape, what normalize_messages takes."""
        content = [
            {"type": "text", "text": part.text}
            if isinstance(part, Text)
            else {"type": "image", "image": part.source}
            for part in self.parts
        ]
        return {"role": self.role, "content": content}


def replace_pictures(messages: Sequence[Message], sources: Iterable[Source]) -> list[Message]:
    """The messages, each picture coming from the next of `sources` instead."""
    left = iter(sources)
    return [
        Message(
            message.role,
            tuple(p if isinstance(p, Text) else Picture(next(left)) for p in message.parts),
        )
        for message in messages
    ]


def normalize_messages(
    prompt: str | bytes | Sequence[Mapping[str, Any]], images: Sequence[Source] = ()
) -> list[Message]:
    """A prompt, or messages in OpenAI's shape, as messages.

    Args:
        prompt: the user's text, or a list of `{"role": ..., "content": ...}`, where content is
            a str or a list of parts: `{"type": "text", "text": str}`, `{"type": "image_url",
            "image_url": {"url": str}}` or `{"type": "image", "image": source}`. The roles are
            system (or developer), user, assistant and tool.
        images: pictures that come before the text of the last user message.

    Raises:
        PromptError: there is nothing to answer, a message is malformed, or its text is no
            valid Unicode or holds a NUL character.
    """
    if isinstance(prompt, (str, bytes)):
        messages = [Message("user", _texts("the prompt", prompt))]
        empty = not _has_text(messages)
    elif isinstance(prompt, Sequence):
        messages = [_message(f"messages[{i}]", message) for i, message in enumerate(prompt)]
        empty = not any(message.pictures for message in messages) and not _has_text(messages)
    else:
        raise PromptError(f"a {type(prompt).__name__} is no prompt: give a str or a message list")
    if empty:
        raise PromptError("the prompt is empty: ask something")

    if isinstance(images, (str, bytes)) or not isinstance(images, Sequence):
        raise PromptError(f"images={type(images).__name__}: give a list of pictures")
    if images:
        last = max((i for i, m in enumerate(messages) if m.role == "user"), default=None)
        if last is None:
            raise PromptError("images were given, but no user message to put them in")
        pictures = tuple(Picture(source) for source in images)
        messages[last] = Message("user", pictures + messages[last].parts)
    return messages


def _has_text(messages: Sequence[Message]) -> bool:
    parts = (part for message in messages for part in message.parts)
    return any(isinstance(part, Text) and part.text.strip() for part in parts)


def _message(where: str, message: object) -> Message:
    if not isinstance(message, Mapping):
        raise PromptError(f"{where} is a {type(message).__name__}: give a dict")
    role = message.get("role")
    if role == "developer":
        role = "system"
    if role not in ("system", "user", "assistant", "tool"):
        raise PromptError(
            f"{where} has role {role!r}: give system, developer, user, assistant or tool"
        )
    if message.get("tool_calls"):
        raise PromptError(f"{where} has tool calls, which are not supported")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, (str, bytes)):
        parts: tuple[Text | Picture, ...] = _texts(f"{where}.content", content)
    elif isinstance(content, Sequence):
        parts = tuple(_part(f"{where}.content[{i}]", part) for i, part in enumerate(content))
    else:
        raise PromptError(
            f"{where}.content is a {type(content).__name__}: give a str or a list of parts"
        )
    return Message(cast(Role, role), parts)


def _part(where: str, part: object) -> Text | Picture:
    if not isinstance(part, Mapping):
        raise PromptError(f"{where} is a {type(part).__name__}: give a dict")
    match part.get("type"):
        case "text" | "input_text":
            return Text(_text(f"{where}.text", part.get("text")))
        case "image_url" | "input_image":
            source = part.get("image_url")
            if isinstance(source, Mapping):
                source = source.get("url")
        case "image":
            source = part.get("image")
        case kind:
            raise PromptError(f"{where} has type {kind!r}: give text, image_url or image")
    if source is None:
        raise PromptError(f"{where} has no picture: give one as image_url.url or image")
    return Picture(source)


def _texts(where: str, text: str | bytes) -> tuple[Text, ...]:
    return (Text(_text(where, text)),) if text else ()


def _text(where: str, text: object) -> str:
    try:
        if isinstance(text, bytes):
            text = text.decode()
        if not isinstance(text, str):
            raise PromptError(f"{where} is a {type(text).__name__}: give a str")
        text.encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise PromptError(f"{where} is not valid UTF-8 at position {error.start}") from None
    if "\0" in text:
        raise PromptError(f"{where} holds a NUL character at position {text.index(chr(0))}")
    return text


class ChatTemplate:
    """A model's chat template.

    Pictures become text parts that hold the marker, since mtmd adds the model's own tokens
    around each picture. Where the template takes no lists of parts, they become one string.

    Args:
        source: the template, Jinja as in `tokenizer.chat_template`. None: ChatML.
        bos_token, eos_token: the tokens' text, for the template.
        marker: the text that stands for a picture.

    Raises:
        TemplateError: its syntax is broken, or it renders neither a string nor a list of parts.
    """

    def __init__(
        self, source: str | None, *, bos_token: str = "", eos_token: str = "", marker: str
    ) -> None:
        self._marker = marker
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(
            raise_exception=_raise_exception,
            strftime_now=lambda form: datetime.now().strftime(form),
            bos_token=bos_token,
            eos_token=eos_token,
            tools=None,
            documents=None,
        )
        with _one_line_errors():
            self._template = environment.from_string(CHATML if source is None else source)

        probe = "probe"
        self._takes_string = self._accepts(probe, probe)
        self._takes_parts = self._accepts([{"type": "text", "text": probe}], probe)
        if not self._takes_string and not self._takes_parts:
            # once more, for the error
            rendered = self._run([{"role": "user", "content": probe}], True)
            raise TemplateError(f"the chat template loses the user's text: {rendered[:80]!r}")

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt, with the marker where each picture goes, in order.

        Raises:
            PromptError: a text holds the marker.
            TemplateError: the template fails, refuses the messages, or loses a picture.
        """
        for i, message in enumerate(messages):
            if any(isinstance(part, Text) and self._marker in part.text for part in message.parts):
                raise PromptError(
                    f"messages[{i}] holds {self._marker!r}, which stands for a picture: remove it"
                )
        prompt = self._run(
            [{"role": message.role, "content": self._content(message)} for message in messages],
            add_generation_prompt,
        )
        n_pictures = sum(len(message.pictures) for message in messages)
        n_markers = prompt.count(self._marker)
        if n_markers != n_pictures:
            raise TemplateError(
                f"the chat template puts {n_markers} pictures where the messages have {n_pictures}"
            )
        return prompt

    def _content(self, message: Message) -> str | list[dict[str, str]]:
        texts = [part.text if isinstance(part, Text) else self._marker for part in message.parts]
        if self._takes_parts and (message.pictures or not self._takes_string):
            return [{"type": "text", "text": text} for text in texts]
        content = ""
        for i, text in enumerate(texts):
            # a line for each text, but nothing next to a picture
            if i and self._marker not in (text, texts[i - 1]):
                content += "\n"
            content += text
        return content

    def _accepts(self, content: object, probe: str) -> bool:
        try:
            rendered = self._run([{"role": "user", "content": content}], True)
        except TemplateError:
            return False
        # a list that is printed as such shows its keys
        return probe in rendered and not any(
            f"{q}text{q}: {q}{probe}{q}" in rendered for q in ("'", '"')
        )

    def _run(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        prompt = []
        n_chars = 0
        with _one_line_errors(), _step_limit(MAX_TEMPLATE_STEPS):
            for piece in self._template.generate(
                messages=messages, add_generation_prompt=add_generation_prompt
            ):
                n_chars += len(piece)
                if n_chars > MAX_PROMPT_CHARS:
                    raise TemplateError("the chat template doesn't end")
                prompt.append(piece)
        return "".join(prompt)


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox that computes no huge numbers or strings either."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters = {name: _within_limits(name, f) for name, f in self.filters.items()}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sequences = [x for x in (left, right) if isinstance(x, Sized)]
        counts = [x for x in (left, right) if isinstance(x, int)]
        n_chars = 0
        if operator == "*" and sequences and counts:
            n_chars = len(sequences[0]) * counts[0]
        elif operator == "+":
            n_chars = sum(map(len, sequences))
        elif operator == "%" and isinstance(left, str):
            n_chars = _width(left)
        if operator == "**" or n_chars > MAX_PROMPT_CHARS:
            raise _too_expensive(operator)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, *args: Any, **options: Any) -> Any:
        name = getattr(function, "__name__", "a call")
        _check_amounts(name, (*args, *options.values()))
        if name in ("format", "format_map"):
            method = inspect.unwrap(function)  # of the sandbox's own
            _check_amounts(name, [_width(str(getattr(method, "__self__", "")))])
        return super().call(context, function, *args, **options)


def _within_limits(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # jinja's marks, too
    def call(*args: Any, **options: Any) -> Any:
        _check_amounts(name, (*args, *options.values()))
        if name == "format" and args:
            _check_amounts(name, [_width(str(args[0]))])
        return function(*args, **options)

    return call


def _check_amounts(name: str, values: Iterable[Any]) -> None:
    """Numbers may say how wide something is to be."""
    if any(isinstance(value, int) and value > MAX_PROMPT_CHARS for value in values):
        raise _too_expensive(name)


def _width(form: str) -> int:
    """The largest number in a format: a width, maybe, which may also come as an argument."""
    numbers = [int(n[:10]) for n in re.findall(r"\d+", form)]
    return MAX_PROMPT_CHARS + 1 if "%*" in form else max(numbers, default=0)


def _too_expensive(name: str) -> TemplateError:
    return TemplateError(f"the chat template is broken: {name} is too expensive")


class _Generation(Extension):
    """{% generation %}, which marks the assistant's part for training. Here: just its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(f"the chat template refuses the messages: {' '.join(str(message).split())}")


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except TemplateError:
        raise
    except TemplateSyntaxError as error:
        reason = f"line {error.lineno}: {error.message}"
    except JinjaError as error:
        reason = error.message or type(error).__name__
    except Exception as error:  # what the template's expressions raise
        reason = f"{type(error).__name__}: {error}"
    else:
        return
    raise TemplateError(f"the chat template is broken: {' '.join(reason.split())}") from None


@contextmanager
def _step_limit(n_steps: int) -> Iterator[None]:
    """Raise in the middle of the block once it has run `n_steps` lines of Python."""

    def trace(frame: FrameType, event: str, arg: object) -> Callable[..., Any]:
        nonlocal n_steps
        n_steps -= 1
        if n_steps < 0:
            raise TemplateError("the chat template doesn't end")
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(outer)
