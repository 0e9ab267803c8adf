"""What is measured: a model, how it is run, and prompts of any length."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image

from csp_edge.engine import Engine
from csp_edge.errors import OptionError
from csp_edge.eval.contenders import Budget, budget_name
from csp_edge.eval.fidelity import default_text
from csp_edge.eval.scenes import VENDORS, draw
from csp_edge.eval.suite import album
from csp_edge.images import Pictures
from csp_edge.loading import Progress
from csp_edge.policies import CSP
from csp_edge.tokenizer import Item, Patches, Prompt, Tokenizer

N_WARM = 2  # tokens that are decoded before the clock runs: the first ones lay out a graph anew
N_DECODE = 32  # tokens of an answer that are timed
N_ANSWER = N_WARM + N_DECODE

_N_QUESTION = 64  # tokens of text after pictures, where no length is asked for
_N_BYTES_PER_TOKEN = 8  # that text is hardly ever above
_N_PIXELS = 512  # side of a picture, where the projector takes any size


@dataclass(frozen=True, slots=True)
class Case:
    """A model, and how it is run. As for Engine.

    n_images: pictures that every prompt begins with.
    """

    model: str
    mmproj: str | None
    n_images: int = 0
    n_threads: int | None = None
    n_gpu_layers: int = 0
    kv_type: str = "f16"

    def engine(self, progress: Progress | None = None) -> Engine:
        """Raises as Engine does."""
        return Engine(
            Path(self.model),
            Path(self.mmproj) if self.mmproj else None,
            n_threads=self.n_threads,
            n_gpu_layers=self.n_gpu_layers,
            kv_type=self.kv_type,
            prune=True,
            progress=progress,
        )

    def prompt(self, engine: Engine, n_tokens: int | None) -> Prompt:
        """Drawn pictures, no two of them the same, and English text up to `n_tokens`.

        It holds pictures: close it.

        Args:
            n_tokens: None: what the pictures take, and 64 of text.

        Raises:
            OptionError: it is beyond the context, or the pictures take all of it.
            ProjectorError: there are pictures, and the model has no projector.
        """
        n_most = engine.n_ctx_max - N_ANSWER
        if n_tokens is not None and n_tokens > n_most:
            raise OptionError(
                f"length {n_tokens}: with {N_ANSWER} tokens of answer beyond the context of "
                f"{engine.n_ctx_max}: give at most {n_most}"
            )
        prompt = self._pictures(engine, n_tokens - 1 if n_tokens else n_most - _N_QUESTION)
        n_text = n_tokens - prompt.n_tokens if n_tokens else _N_QUESTION
        prompt.items += text(engine.tokenizer, n_text)
        prompt.n_tokens += n_text
        prompt.n_pos += n_text
        return prompt

    def _pictures(self, engine: Engine, n_most: int) -> Prompt:
        if not self.n_images:
            return Prompt([])
        projector = engine.info.projector
        pictures = Pictures()
        drawn = _drawn(projector.image_size if projector else 0)
        first = pictures.open([next(drawn)])
        # one tells how many would be too many
        with engine.tokenizer.tokenize(first) as one:
            n_tokens = self.n_images * n_image_tokens(one)
        if n_tokens <= n_most:
            rest = pictures.open(islice(drawn, self.n_images - 1))
            prompt = engine.tokenizer.tokenize(first + rest)
            if prompt.n_tokens <= n_most:
                return prompt
        raise OptionError(
            f"{self.n_images} pictures take {n_tokens} tokens, and a prompt has room for {n_most} "
            "beside its text: give fewer --images or greater --lengths"
        )


def n_image_tokens(prompt: Prompt) -> int:
    """Tokens that stand for pictures."""
    return sum(item.n_tokens for item in prompt.items if isinstance(item, Patches))


def _drawn(n_pixels: int) -> Iterator[Image.Image]:
    """Scenes of the built-in suite, of the projector's own size."""
    rng = np.random.default_rng(0)
    side = n_pixels or _N_PIXELS
    while True:
        for scene in album(rng, 1, held_out=False):
            yield draw(scene, rng, VENDORS[0]).resize((side, side))


def text(tokenizer: Tokenizer, n_tokens: int) -> list[Item]:
    """That many tokens of English prose."""
    with tokenizer.tokenize([default_text()[: _N_BYTES_PER_TOKEN * n_tokens]]) as prompt:
        return list(islice(cycle(prompt.items), n_tokens))


def policy(budget: Budget, n_tokens: int) -> CSP:
    """What prunes a prompt of `n_tokens`.

    Raises:
        OptionError: nothing would be pruned.
    """
    found = CSP(budget)
    if found.resolve(n_tokens).budget >= n_tokens:
        raise OptionError(
            f"budget {budget_name(budget)}: keeps all of a prompt of {n_tokens} tokens: "
            "give a smaller one, or greater --lengths"
        )
    return found
