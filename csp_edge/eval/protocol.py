"""How pruned caches are compared: one prefill, many prunings, and each of them is felt.

The prompt is prefilled once, the queries of its end observed, the last token's among them. For each
policy its cache is brought back and pruned, and the last token is taken out and decoded again over
what is left: already the next token's distribution is the pruned cache's. The full cache goes the
same way, unpruned.
"""

from collections.abc import Iterable
from contextlib import suppress

import numpy as np

from csp_edge.engine import Engine, Snapshot
from csp_edge.errors import PolicyError
from csp_edge.policies import Policy
from csp_edge.tokenizer import Prompt


def prefill(
    engine: Engine, prompt: Prompt, policies: Iterable[Policy | None], *, room: int
) -> Snapshot:
    """The cache of a prompt, with as many observed queries as the widest of the policies wants.

    Args:
        engine: made with prune=True.
        room: tokens that will come after the prompt.

    Raises:
        PromptError: the prompt is beyond the context, or ends with a picture.
        MemoryLimitError: it doesn't fit.
    """
    window = 0
    for policy in policies:
        # what can't run on this prompt is found out when its turn comes
        with suppress(PolicyError):
            if policy:
                amounts = policy.resolve(prompt.n_tokens, has_pictures=prompt.has_pictures)
                window = max(window, amounts.window)
    engine.clear()
    engine.prefill(prompt, room=room, window=window)
    return engine.snapshot()


def prune(engine: Engine, snapshot: Snapshot, policy: Policy | None) -> float:
    """Prune the snapshot's cache, by None not at all, and decode its last token again.

    Returns:
        How many cells a KV head keeps, in the mean over layers and heads.

    Raises:
        PolicyError: the policy can't run on this prompt.
        PromptError: it doesn't keep the last token for sure.
    """
    engine.restore(snapshot)
    n_kept = float(engine.n_cells)
    if policy:
        layers = engine.prune(policy).layers
        n_kept = float(np.mean([len(head) for layer in layers for head in layer.kept]))
    engine.redecode()
    return n_kept
