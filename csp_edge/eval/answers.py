"""What a run finds: one scored answer after another."""

from dataclasses import dataclass
from typing import TypeAlias

from csp_edge.eval.contenders import Budget

Key: TypeAlias = tuple[str, str, str, Budget | None, int]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer over one cache.

    sample: its name within the dataset. n_images: shown. turn: from 1 on. policy, budget: as a
    contender is called; None: the full cache. n_tokens: of the prompt up to the first question.
    n_kept: cells of that, in the mean over KV heads. n_answer: tokens. score: in [0, 1]. seconds:
    to answer, and before the first question to prune. Where the policy can't run or the prompt is
    refused, `error` says why, and what was not found is None.
    """

    dataset: str
    sample: str
    group: str
    skill: str
    n_images: int
    turn: int
    policy: str
    budget: Budget | None
    right: str
    n_tokens: int | None = None
    n_kept: float | None = None
    answer: str | None = None
    n_answer: int | None = None
    score: float | None = None
    seconds: float | None = None
    error: str | None = None

    @property
    def key(self) -> Key:
        return self.dataset, self.sample, self.policy, self.budget, self.turn
