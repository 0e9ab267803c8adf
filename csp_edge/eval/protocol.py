"""How pruned caches are compared: one prefill, many prunings, and each of them is felt.

The prompt is prefilled once, the queries of its end observed, the last token's among them. For each
policy its cache is brought back and pruned, and the last token is taken out and decoded again over
what is left: already the next token's distribution is the pruned cache's. The full cache goes the
same way, unpruned. A policy that looks ahead sees the beginning of the full cache's answer, which
is taken back: the whole answer then comes from the pruned cache.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from csp_edge.engine import Engine, Snapshot
from csp_edge.errors import PolicyError
from csp_edge.policies import Policy
from csp_edge.tokenizer import Prompt


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The cache of a prompt, and the beginning of the answer that it gives."""

    cache: Snapshot
    answer: tuple[int, ...]


def prefill(
    engine: Engine, prompt: Prompt, policies: Iterable[Policy | None], *, room: int
) -> Prefilled:
    """The cache of a prompt, with as many observed queries as the widest of the policies wants.

    Args:
        engine: made with prune=True.
        room: tokens that will come after the prompt.

    Raises:
        PromptError: the prompt is beyond the context, or ends with a picture.
        MemoryLimitError: it doesn't fit.
    """
    window = lookahead = 0
    for policy in policies:
        # what can't run on this prompt is found out when its turn comes
        with suppress(PolicyError):
            if policy:
                amounts = policy.resolve(prompt.n_tokens, has_pictures=prompt.has_pictures)
                window = max(window, amounts.window)
                lookahead = max(lookahead, amounts.lookahead)
    engine.clear()
    engine.prefill(prompt, room=room, window=window, lookahead=lookahead)
    cache = engine.snapshot()
    return Prefilled(cache, tuple(greedy(engine, lookahead)) if lookahead else ())


def greedy(engine: Engine, max_tokens: int) -> list[int]:
    """An answer's tokens, from the logits of now on."""
    tokens: list[int] = []
    while True:
        token = int(engine.logits.argmax())
        if engine.tokenizer.ends(token):
            return tokens
        tokens.append(token)
        if len(tokens) == max_tokens or not engine.room:
            return tokens
        engine.decode(token)


def look_ahead(engine: Engine, policy: Policy) -> None:
    """Show the policy the answer that the cache of a prompt gives as it is, which is taken back.

    The prompt was just prefilled, with the policy's window and lookahead.
    """
    n = engine.lookahead(policy)
    if n:
        cache = engine.snapshot()
        answer = greedy(engine, n)
        engine.restore(cache)
        engine.look_ahead(answer)


def prune(engine: Engine, prefilled: Prefilled, policy: Policy | None) -> float:
    """Prune the prompt's cache, by None not at all, and decode its last token again.

    Returns:
        How many cells a KV head keeps, in the mean over layers and heads.

    Raises:
        PolicyError: the policy can't run on this prompt.
        PromptError: it doesn't keep the last token for sure.
    """
    engine.restore(prefilled.cache)
    n_kept = float(engine.n_cells)
    if policy:
        engine.look_ahead(prefilled.answer[: engine.lookahead(policy)])
        layers = engine.prune(policy).layers
        n_kept = float(np.mean([len(head) for layer in layers for head in layer.kept]))
    engine.redecode()
    return n_kept
