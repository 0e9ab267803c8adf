"""What models are tested with: pictures and text, then questions with their answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from csp_edge.eval.scoring import Metric

# pictures of thousands of samples don't fit in memory: a file, or what draws it when asked
Picture: TypeAlias = Path | Callable[[], Image.Image]


@dataclass(frozen=True, slots=True)
class Turn:
    """A question with its right answer, and what its score is listed under."""

    question: str
    answer: str
    skill: str
    group: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation: an instruction, then pictures and text (a str) in order, then the turns.

    `id` names it within `dataset`, and `metric` is what its answers are scored by.
    """

    id: str
    dataset: str
    metric: Metric
    content: tuple[str | Picture, ...]
    turns: tuple[Turn, ...]
    instruction: str = ""

    @property
    def n_pictures(self) -> int:
        """How many pictures there are, all of them before the first question."""
        return sum(not isinstance(part, str) for part in self.content)

    def messages(self, answers: Sequence[str] = ()) -> list[dict[str, Any]]:
        """The conversation up to its next question, in OpenAI's shape, for EdgeVLM.chat.

        Pictures that are drawn on demand are drawn at each call.

        Args:
            answers: one for each turn before: the model's own, or the right ones.
        """
        messages: list[dict[str, Any]] = []
        before: tuple[str | Picture, ...] = (self.instruction, *self.content)
        for turn, answer in zip(self.turns, answers, strict=False):
            messages.append({"role": "user", "content": _parts((*before, turn.question))})
            messages.append({"role": "assistant", "content": answer})
            before = ()
        question = self.turns[len(answers)].question
        return [*messages, {"role": "user", "content": _parts((*before, question))}]

    def shortened(self, n_pictures: int) -> "Sample":
        """With its last pictures alone, and of the text what follows those that are dropped.

        That is how MileBench fits a sample into a context: the instruction and the end stay.
        """
        content, n_dropped = self.content, self.n_pictures - n_pictures
        while n_dropped > 0:
            n_dropped -= not isinstance(content[0], str)
            content = content[1:]
        return replace(self, content=content)


def _parts(content: Sequence[str | Picture]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for part in content:
        if not isinstance(part, str):
            parts.append({"type": "image", "image": part() if callable(part) else part})
        elif parts and parts[-1]["type"] == "text":
            # in one part, since templates break the line between two
            parts[-1]["text"] += part
        elif part:
            parts.append({"type": "text", "text": part})
    return parts
