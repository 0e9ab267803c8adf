"""How far a pruned cache moves the next token's distribution, on any model and text.

Accuracy hides small damage. So a text is cut into windows of a prompt and its true continuation.
Over every cache the continuation is decoded token by token, whatever the model would have said, and
at every step the distribution is held against the full cache's.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from csp_edge.engine import Engine
from csp_edge.errors import OptionError, PolicyError, PromptError
from csp_edge.eval.contenders import Budget, Contender
from csp_edge.eval.protocol import prefill, prune
from csp_edge.tokenizer import Prompt

LogProbs: TypeAlias = npt.NDArray[np.float64]
Key: TypeAlias = tuple[str, int, str, Budget | None]


class Window(NamedTuple):
    """A prompt, and the tokens that follow it in the text."""

    text: str  # the text's name
    start: int  # of its tokens
    prompt: list[int]
    continuation: list[int]


@dataclass(frozen=True, slots=True)
class Divergence:
    """One pruned cache against the full one, in the mean over a window's continuation.

    kl: KL(full || pruned) of the next token's distribution, in nats. top1: the share of steps with
    the same likeliest token. Both None, and `error` says why, where the policy can't run.
    """

    text: str
    start: int
    policy: str
    budget: Budget
    n_tokens: int
    n_kept: float | None
    kl: float | None
    top1: float | None
    error: str | None = None

    @property
    def key(self) -> Key:
        return self.text, self.start, self.policy, self.budget


def default_text() -> str:
    """English prose that is on every machine: Python's own language reference, 460 kB of it."""
    from pydoc_data import topics

    return "\n\n".join(text for _, text in sorted(topics.topics.items()))


def read_text(path: Path) -> str:
    """A file in UTF-8.

    Raises:
        OptionError: it can't be read, or is no such text.
    """
    try:
        if path.exists() and not path.is_file():
            raise OptionError(f"{path}: not a regular file, give a text")
        return path.read_text("utf-8")
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: not UTF-8 at byte {error.start}: give a text file") from None


def windows(
    engine: Engine, name: str, text: str, *, n_windows: int, n_prompt: int, n_continuation: int
) -> list[Window]:
    """Windows of a text, spread evenly over it and not overlapping.

    Raises:
        OptionError: the text has not tokens enough for one.
    """
    with engine.tokenizer.tokenize([text]) as prompt:
        tokens = [item for item in prompt.items if isinstance(item, int)]
    # what a vocabulary puts before every text stands before every window
    lead = tokens[:1] if not engine.tokenizer.piece(tokens[0]) else []
    tokens = tokens[len(lead) :]
    n_prompt -= len(lead)
    size = n_prompt + n_continuation
    n_windows = min(n_windows, len(tokens) // size)
    if not n_windows:
        raise OptionError(
            f"{name}: {len(tokens)} tokens, and a window is {size}: "
            "give a longer text, or fewer --tokens"
        )
    starts = np.linspace(0, len(tokens) - size, n_windows).astype(int).tolist()
    return [
        Window(name, i, lead + tokens[i : i + n_prompt], tokens[i + n_prompt : i + size])
        for i in starts
    ]


def diverge(
    engine: Engine,
    windows: Sequence[Window],
    contenders: Sequence[Contender],
    budgets: Sequence[Budget],
    *,
    done: Container[Key] = frozenset(),
) -> Iterator[Divergence]:
    """Hold every contender at every budget against the full cache, window by window.

    Args:
        engine: made with prune=True.
        done: keys of what need not be measured again.

    Raises:
        PromptError: a window is beyond the context.
        MemoryLimitError: it doesn't fit.
    """
    for window in windows:
        cells = [
            (contender, budget)
            for contender in contenders
            for budget in budgets
            if _key(window, contender, budget) not in done
        ]
        if cells:
            yield from _diverge(engine, window, cells)


def keys(
    windows: Sequence[Window], contenders: Sequence[Contender], budgets: Sequence[Budget]
) -> frozenset[Key]:
    """Of all that diverge() finds."""
    return frozenset(_key(*each) for each in product(windows, contenders, budgets))


def _key(window: Window, contender: Contender, budget: Budget) -> Key:
    return window.text, window.start, contender.label, budget


def _diverge(
    engine: Engine, window: Window, cells: Sequence[tuple[Contender, Budget]]
) -> Iterator[Divergence]:
    n_tokens = len(window.prompt)
    policies = [contender.at(budget) for contender, budget in cells]
    prompt = Prompt(list(window.prompt))
    prefilled = prefill(engine, prompt, policies, room=len(window.continuation))
    prune(engine, prefilled, None)
    full = list(_steps(engine, window.continuation))
    for (contender, budget), policy in zip(cells, policies, strict=True):
        n_kept = kl = top1 = reason = None
        try:
            n_kept = prune(engine, prefilled, policy)
            kl, top1 = _compare(full, _steps(engine, window.continuation))
        except (PolicyError, PromptError) as error:
            reason = str(error)
        yield Divergence(
            window.text, window.start, contender.label, budget, n_tokens, n_kept, kl, top1, reason
        )


def _steps(engine: Engine, continuation: Sequence[int]) -> Iterator[LogProbs]:
    """float64 [n_vocab] for each token of the continuation, from before it is decoded."""
    yield _log_softmax(engine.logits)
    for token in continuation[:-1]:
        engine.decode(token)
        yield _log_softmax(engine.logits)


def _log_softmax(logits: npt.NDArray[np.float32]) -> LogProbs:
    x = logits.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    return x


def _compare(full: Sequence[LogProbs], pruned: Iterator[LogProbs]) -> tuple[float, float]:
    """The mean KL(full || pruned), and the share of steps with the same likeliest token."""
    kl, same = [], []
    for p, q in zip(full, pruned, strict=True):
        kl.append(np.exp(p) @ (p - q))
        same.append(p.argmax() == q.argmax())
    return float(np.mean(kl)), float(np.mean(same))
