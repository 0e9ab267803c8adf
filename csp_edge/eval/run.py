"""The sweep: every prompt is prefilled once, pruned by every policy to every budget, and asked.

Later questions of a conversation go on over the same cache, which is not pruned again. What stands
between them is the right answers, whatever the model has said: so every policy is asked every
question after the same words.
"""

import time
from bisect import bisect_right
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

from csp_edge.engine import Engine
from csp_edge.errors import ImageError, PolicyError, PromptError, TemplateError
from csp_edge.eval.answers import Answer, Key
from csp_edge.eval.contenders import FULL, Budget, Contender
from csp_edge.eval.protocol import Prefilled, greedy, prefill, prune
from csp_edge.eval.samples import Sample
from csp_edge.eval.scoring import score
from csp_edge.policies import Policy
from csp_edge.template import normalize_messages
from csp_edge.tokenizer import Prompt
from csp_edge.vlm import EdgeVLM

# what a sample or a policy is to blame for: the others go on
_REFUSALS = (ImageError, PolicyError, PromptError, TemplateError)


class Cell(NamedTuple):
    """One cache to answer over. policy: None for the full one."""

    label: str
    budget: Budget | None
    policy: Policy | None


def cells(contenders: Sequence[Contender], budgets: Sequence[Budget]) -> list[Cell]:
    """The full cache, then every contender at every budget."""
    pruned = [Cell(c.label, budget, c.at(budget)) for c in contenders for budget in budgets]
    return [Cell(FULL, None, None), *pruned]


def sweep(
    vlm: EdgeVLM,
    samples: Iterable[Sample],
    cells: Sequence[Cell],
    *,
    n_turns: int | None = None,
    max_tokens: int = 64,
    done: Container[Key] = frozenset(),
) -> Iterator[Answer]:
    """Ask every sample's questions over every cache.

    A prompt beyond the context loses its first pictures.

    Args:
        vlm: made to prune, with cache=CSP() say.
        n_turns: ask no more questions of a conversation.
        max_tokens: of an answer. Answers are greedy.
        done: keys of answers that need not be given again.

    Raises:
        ProjectorError: there are pictures, and the model has no projector.
        MemoryLimitError: a prompt doesn't fit.
    """
    for sample in samples:
        todo = {}
        for cell in cells:
            blanks = _blanks(sample, cell, n_turns)
            if any(blank.key not in done for blank in blanks):
                todo[cell] = blanks
        if todo:
            answers = _converse(vlm, sample, todo, max_tokens)
            yield from (answer for answer in answers if answer.key not in done)


def keys(
    samples: Iterable[Sample], cells: Sequence[Cell], n_turns: int | None = None
) -> frozenset[Key]:
    """Of all answers that sweep() gives."""
    return frozenset(
        blank.key
        for sample in samples
        for cell in cells
        for blank in _blanks(sample, cell, n_turns)
    )


def _blanks(sample: Sample, cell: Cell, n_turns: int | None) -> list[Answer]:
    return [
        Answer(
            dataset=sample.dataset,
            sample=sample.id,
            group=question.group,
            skill=question.skill,
            n_images=sample.n_pictures,
            turn=turn,
            policy=cell.label,
            budget=cell.budget,
            right=question.answer,
        )
        for turn, question in enumerate(sample.turns[:n_turns], 1)
    ]


def _converse(
    vlm: EdgeVLM,
    sample: Sample,
    todo: Mapping[Cell, Sequence[Answer]],
    max_tokens: int,
) -> Iterator[Answer]:
    engine = vlm.engine
    n_turns = max(map(len, todo.values()))
    with ExitStack() as stack:
        try:
            sample, prompts = _prompts(vlm, sample, n_turns, max_tokens, stack)
            prefilled = prefill(
                engine,
                prompts[0],
                (cell.policy for cell in todo),
                room=prompts[-1].n_tokens - prompts[0].n_tokens + max_tokens,
            )
        except _REFUSALS as error:
            for blanks in todo.values():
                yield from (replace(blank, error=str(error)) for blank in blanks)
            return
        for cell, blanks in todo.items():
            said = _say(engine, prefilled, cell.policy, prompts, max_tokens)
            yield from _scored(sample, blanks, said)


def _prompts(
    vlm: EdgeVLM, sample: Sample, n_turns: int, max_tokens: int, stack: ExitStack
) -> tuple[Sample, list[Prompt]]:
    """The conversation up to each question, and the sample without the pictures that don't fit."""
    whole = stack.enter_context(_prompt(vlm, sample, n_turns))
    limit = vlm.engine.n_ctx_max - max_tokens
    if whole.n_tokens > limit:
        n_fitting = bisect_right(range(sample.n_pictures), limit, key=_length(vlm, sample, n_turns))
        sample = sample.shortened(max(0, n_fitting - 1))
        whole = stack.enter_context(_prompt(vlm, sample, n_turns))
    earlier = [stack.enter_context(_prompt(vlm, sample, turn)) for turn in range(1, n_turns)]
    return sample, [*earlier, whole]


def _length(vlm: EdgeVLM, sample: Sample, turn: int) -> Callable[[int], int]:
    """Tokens up to a question, by how many of the pictures are left."""

    def length(n_pictures: int) -> int:
        with _prompt(vlm, sample.shortened(n_pictures), turn) as prompt:
            return prompt.n_tokens

    return length


def _prompt(vlm: EdgeVLM, sample: Sample, turn: int) -> Prompt:
    rights = [question.answer for question in sample.turns[: turn - 1]]
    return vlm.tokenize(normalize_messages(sample.messages(rights)))


class _Said(NamedTuple):
    """What Answer tells of an answer."""

    n_tokens: int
    n_kept: float
    answer: str
    n_answer: int
    seconds: float


def _say(
    engine: Engine,
    prefilled: Prefilled,
    policy: Policy | None,
    prompts: Sequence[Prompt],
    max_tokens: int,
) -> Iterator[_Said]:
    """The answers over one cache.

    Raises:
        PolicyError, PromptError: the policy can't run on this prompt, or the cache can't go on to
            the next question.
    """
    start = time.perf_counter()
    n_kept = prune(engine, prefilled, policy)
    n_tokens = engine.n_tokens
    for prompt in prompts:
        if prompt is not prompts[0] and engine.prefill(prompt).n_reused < n_tokens:
            raise PromptError(
                "the pruned cache can't go on to the next question: the chat template rewrites "
                "what was before, or the model's cache can't be cut: ask one turn"
            )
        tokens = greedy(engine, max_tokens)
        text = b"".join(map(engine.tokenizer.piece, tokens)).decode(errors="replace").strip()
        seconds = time.perf_counter() - start
        yield _Said(n_tokens, n_kept, text, len(tokens), seconds)
        start = time.perf_counter()


def _scored(sample: Sample, blanks: Sequence[Answer], said: Iterator[_Said]) -> Iterator[Answer]:
    for blank, question in zip(blanks, sample.turns, strict=False):
        try:
            found = next(said)
        except _REFUSALS as error:
            # the conversation ends here, for this cache
            yield from (replace(rest, error=str(error)) for rest in blanks[blank.turn - 1 :])
            return
        points = score(sample.metric, found.answer, question.answer, question.choices)
        yield replace(blank, n_images=sample.n_pictures, score=points, **found._asdict())
