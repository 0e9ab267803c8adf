"""What a chat comes to: its answer, and what it took."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from csp_edge.hook import Pruning
from csp_edge.policies import Full, Policy
from csp_edge.tokenizer import Patches, Prompt

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens. Of the prompt's, `image_tokens` stand for pictures; `cached_tokens` were there."""

    prompt_tokens: int
    image_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. `first_token_s` is all of the time before the answer, but for waiting in a queue.

    A policy that looks ahead prunes after that.
    """

    encode_s: float
    prefill_s: float
    prune_s: float
    first_token_s: float
    decode_s: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class PictureTokens:
    """Where a picture, or a tile of it, stands in the conversation, and its grid of patches."""

    picture: int
    tile: int
    start: int
    n_rows: int
    n_cols: int


@dataclass(frozen=True, slots=True)
class CacheFigures:
    """The KV cache before and after pruning. Bytes are those of K and V in the cells in use.

    All figures are of the prompt. Within max_cells, the cells before are those that there would
    have been without that bound.

    n_tokens: of the prompt.
    pruning: what was kept, per layer and head, of an answer that had begun, too. None: nothing was
        evicted.
    """

    policy: Policy | Full
    n_tokens: int
    cells_before: int
    cells_after: int
    bytes_before: int
    bytes_after: int
    pictures: tuple[PictureTokens, ...]
    pruning: Pruning | None

    @property
    def kept(self) -> list[tuple[npt.NDArray[np.uint32], ...]]:
        """For each pruned layer and KV head uint32 [its cells]: tokens of the prompt."""
        layers = self.pruning.layers if self.pruning else ()
        return [tuple(head[head < self.n_tokens] for head in layer.kept) for layer in layers]

    def patches(self) -> list[npt.NDArray[np.floating]]:
        """For each of `pictures` float [n_rows, n_cols]: the share of heads that kept it."""
        if not self.pruning:
            return [np.ones((p.n_rows, p.n_cols)) for p in self.pictures]
        heads = [kept for layer in self.kept for kept in layer]
        share = np.bincount(np.concatenate(heads), minlength=self.n_tokens) / len(heads)
        return [
            share[p.start : p.start + p.n_rows * p.n_cols].reshape(p.n_rows, p.n_cols)
            for p in self.pictures
        ]


@dataclass(frozen=True, slots=True)
class ChatResult:
    """An answer.

    finish_reason: "stop": the model or a stop string ended it, or the grammar is fulfilled;
    "length": max_tokens or the context is reached; "cancelled": the stream was closed before.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    cache: CacheFigures


def pictures_of(prompt: Prompt) -> tuple[PictureTokens, ...]:
    """Where each picture stands in a conversation, tile by tile."""
    pictures = []
    start = 0
    for item in prompt.items:
        if isinstance(item, Patches):
            pictures.append(PictureTokens(item.picture, item.tile, start, item.n_rows, item.n_cols))
        start += 1 if isinstance(item, int) else item.n_tokens
    return tuple(pictures)
