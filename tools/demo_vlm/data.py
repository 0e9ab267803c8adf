"""Training examples: pictures with what covers each patch, and conversations about them."""

from dataclasses import dataclass

import numpy as np
import tokens
import torch
from model import N_GRID, N_PATCHES, N_PIXELS_PATCH
from torch import Tensor

from csp_edge.eval.scenes import (
    CELLS,
    COLORS,
    EMOJI,
    N_PIXELS_CELL,
    N_PIXELS_CHAR,
    SHAPES,
    VENDORS,
    Rng,
    Scene,
    Thing,
    draw,
)
from csp_edge.eval.suite import SKILLS, STEPS, Question, album, ask, pair

KINDS = [*EMOJI, *SHAPES]
CHARS = [*"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
CLASSES = ["", *KINDS, *CHARS]

# what the patches of a picture are asked for, and of how many classes
DENSE = {
    "class": len(CLASSES),
    "color": 1 + len(COLORS),
    "center": 2,
    "cell": 1 + len(CELLS),
    "count": 1 + len(CELLS),
    **{step: 1 + len(KINDS) for step in STEPS},
    **{f"color {step}": 1 + len(COLORS) for step in STEPS},
}

_KIND_WORDS = np.array(
    [-100, *(tokens.IDS[tokens.SPACE + kind] for kind in KINDS), *(-100 for _ in CHARS)]
)
_COLOR_WORDS = np.array([-100, *(tokens.IDS[tokens.SPACE + color] for color in COLORS)])

_BETWEEN_PARTS = (tokens.IDS[","], tokens.IDS[tokens.SPACE + "became"])

_CENTERS = (np.arange(N_GRID) + 0.5) * N_PIXELS_PATCH
_CELL = (_CENTERS // N_PIXELS_CELL).astype(int)
_CHAR = (_CENTERS // N_PIXELS_CHAR).astype(int)
_MIDDLE = (1, 4, 6)  # patch at the middle of each cell


def dense_labels(scene: Scene) -> np.ndarray:
    """int64 [len(DENSE), N_PATCHES]."""
    cells = np.zeros((len(DENSE), 9), np.int64)
    for cell, thing in scene.things.items():
        cells[0, cell] = CLASSES.index(thing.kind)
        cells[1, cell] = _color(thing)
        cells[3, cell] = 1 + cell
        cells[4, cell] = len(scene.find(thing.kind))
        for i, step in enumerate(STEPS.values()):
            other = step(cell)
            if other is not None and other in scene.things:
                cells[5 + i, cell] = 1 + KINDS.index(scene.things[other].kind)
                cells[5 + len(STEPS) + i, cell] = _color(scene.things[other])
    labels = cells.reshape(-1, 3, 3)[:, _CELL][:, :, _CELL]
    for cell in scene.things:
        labels[2, _MIDDLE[cell // 3], _MIDDLE[cell % 3]] = 1
    if scene.sign:
        row, text = scene.sign
        for i, char in enumerate(text):
            is_char = np.outer(row == _CELL, i == _CHAR)
            labels[0][is_char] = CLASSES.index(char)
            labels[2, _MIDDLE[row], 2 * i] = 1
    return labels.reshape(len(DENSE), N_PATCHES)


def _color(thing: Thing) -> int:
    return 1 + list(COLORS).index(thing.color) if thing.color else 0


def picture(scene: Scene, rng: Rng, vendor: str) -> np.ndarray:
    """float32 [N_PIXELS, N_PIXELS, 3] in [-1, 1], its light varied."""
    pixels = np.asarray(draw(scene, rng, vendor), np.float32) / 127.5 - 1
    gain = rng.uniform(0.85, 1.1, 3) * rng.uniform(0.9, 1.1)
    noise = rng.normal(0, rng.uniform(0, 0.04), pixels.shape)
    return np.clip((pixels + 1) * gain - 1 + noise, -1, 1).astype(np.float32)


def pictures(scenes: list[Scene], rng: Rng) -> Tensor:
    """Of one album: one vendor for most, each its own for some."""
    vendors = rng.choice(VENDORS, len(scenes))
    if rng.random() < 0.7:
        vendors[:] = vendors[0]
    drawn = [picture(s, rng, v) for s, v in zip(scenes, vendors, strict=True)]
    return torch.from_numpy(np.stack(drawn))


# tokens of a conversation, each with others
Shown = list[tuple[int, list[int]]]


def tinted(pictures: Tensor, rng: Rng) -> Tensor:
    """Pictures without their colors, in one of any color each: what things are is all they show."""
    gray = pictures.mean(-1, keepdim=True)
    tints = torch.from_numpy(rng.uniform(0.3, 1, (len(pictures), 1, 1, 3)).astype(np.float32))
    return (gray + 1) * tints - 1


def scrambled(pictures: Tensor, rng: Rng) -> Tensor:
    """Pictures with each patch's pixels in another order: colors are all they show."""
    n = len(pictures)
    patches = pictures.view(n, N_GRID, N_PIXELS_PATCH, N_GRID, N_PIXELS_PATCH, 3).transpose(2, 3)
    order = torch.from_numpy(rng.permutation(N_PIXELS_PATCH**2))
    mixed = patches.flatten(3, 4)[:, :, :, order].view(patches.shape)
    return mixed.transpose(2, 3).reshape(pictures.shape)


def colors_alone(dense: Tensor, are_colors: bool) -> Tensor:
    """dense_labels, several of them, with only what is said of colors, or only the rest."""
    is_other = torch.tensor([name.startswith("color") != are_colors for name in DENSE])
    return dense.masked_fill(is_other[:, None], -100)


@dataclass
class Batch:
    tokens: Tensor  # [n, t]
    is_picture: Tensor  # [n, t]
    labels: Tensor  # [n, t] the token that should follow, -100: none asked for
    skill: Tensor  # [n, t] of the answer that the label is part of
    where: list[Shown]  # [n] tokens, and those that show what follows them
    via: list[Shown]  # [n] tokens, and those that must be found before
    image: Tensor  # [n_pictures] which of its conversation
    before: Tensor  # [n_pictures, 2, N_PATCHES] class and color in the picture before, or -100
    dense: Tensor  # [n_pictures, len(DENSE), N_PATCHES]
    kind: Tensor  # [n_pictures, N_PATCHES] token of the word for what is there, -100: nothing
    color: Tensor  # [n_pictures, N_PATCHES] token of its color, -100: none
    pictures: Tensor  # [n_pictures, N_PIXELS, N_PIXELS, 3]


class Conversation:
    """Tokens, picture mask, labels and skills, and where the answers are shown."""

    def __init__(self, scenes: list[Scene]) -> None:
        self.scenes = scenes
        self.first = []  # token of each picture
        self.ids, self.mask = [tokens.IDS[tokens.BOS]], [False]
        self.labels, self.skills = [-100], [-1]
        self.where: Shown = []
        self.via: Shown = []
        for k in range(len(scenes)):
            self.say(tokens.encode(f" image {k + 1}:"))
            self.first.append(len(self.ids))
            self.say([0] * N_PATCHES, is_picture=True)

    def say(self, new: list[int], skill: int = -1, is_picture: bool = False) -> None:
        for token in new:
            if skill >= 0:
                self.labels[-1], self.skills[-1] = token, skill
            self.ids.append(token)
            self.mask.append(is_picture)
            self.labels.append(-100)
            self.skills.append(-1)

    def answer(self, question: Question, skill: int) -> None:
        answer = tokens.encode(" " + question.answer)
        parts = iter(question.where)
        part: list[int] | None = None
        for i, token in enumerate(answer):
            if question.skill == "read":
                part = self._sign(question, i)
            elif token in _BETWEEN_PARTS:
                part = None
            elif part is None:
                part = [t for image, cell in next(parts) for t in self._cell(image, cell)]
            if part:
                self.where.append((len(self.ids) - 1 + i, part))
                via = self._cell(*question.via) if question.via else part
                self.via.append((len(self.ids) - 1 + i, via))
        self.say([*answer, tokens.IDS[tokens.EOS]], skill)

    def _cell(self, image: int, cell: int) -> list[int]:
        is_cell = np.outer(cell // 3 == _CELL, cell % 3 == _CELL)
        return (self.first[image] + np.flatnonzero(is_cell)).tolist()

    def _sign(self, question: Question, i: int) -> list[int]:
        ends = (f"image {k + 1}?" for k in range(len(self.scenes)))
        image = next(k for k, end in enumerate(ends) if question.text.endswith(end))
        is_char = np.outer(self.scenes[image].sign[0] == _CELL, i == _CHAR)
        return (self.first[image] + np.flatnonzero(is_char)).tolist()


def conversation(rng: Rng, scenes: list[Scene], n_tokens: int, weights: np.ndarray) -> Conversation:
    """Of n_tokens."""
    talk = Conversation(scenes)
    names = list(SKILLS)
    had: set[Question] = set()
    while len(talk.ids) < n_tokens:
        i = int(rng.choice(len(names), p=weights))
        question = ask(rng, scenes, names[i])
        # three of five changes are that something moved
        if question is None or (" moved" in question.answer and rng.random() < 0.7):
            continue
        text = question.text
        if rng.random() < 0.15:
            text = text[0].lower() + text[1:]
        if rng.random() < 0.1:
            text = text.rstrip("?")
        asked = [tokens.IDS[tokens.USER], *tokens.encode(" " + text), tokens.IDS[tokens.ASSISTANT]]
        talk.say(asked)
        if question in had:  # its answer can be copied
            talk.say([*tokens.encode(" " + question.answer), tokens.IDS[tokens.EOS]])
        else:
            talk.answer(question, i)
        had.add(question)
    for column in (talk.ids, talk.mask, talk.labels, talk.skills):
        del column[n_tokens:]
    talk.where = [(t, shown) for t, shown in talk.where if t < n_tokens]
    talk.via = [(t, shown) for t, shown in talk.via if t < n_tokens]
    return talk


def _crowded(rng: Rng, n_images: int) -> list[Scene]:
    """The fuller one of two albums: neighbours and numbers are easy where there is little."""
    albums = (_album(rng, n_images) for _ in range(2))
    return max(albums, key=lambda scenes: sum(len(scene.things) for scene in scenes))


def _album(rng: Rng, n_images: int) -> list[Scene]:
    """Like the suite's, or of pairs in which something changed."""
    if rng.random() < 0.75:
        return album(rng, n_images, held_out=False)
    pairs = [scene for _ in range(n_images // 2) for scene in pair(rng, held_out=False)]
    return [*pairs, *album(rng, n_images % 2, held_out=False)]


def batch(rng: Rng, n: int, n_images: int, n_tokens: int, weights: np.ndarray) -> Batch:
    """n conversations of n_tokens each about n_images pictures."""
    albums = [_crowded(rng, n_images) for _ in range(n)]
    talks = [conversation(rng, a, n_tokens, weights) for a in albums]
    dense = np.stack([[dense_labels(s) for s in a] for a in albums])
    classes, colors = dense[:, :, 0], dense[:, :, 1]
    seen = dense[:, :, :2]
    before = np.concatenate([np.full_like(seen[:, :1], -100), seen[:, :-1]], 1)
    return Batch(
        torch.tensor([talk.ids for talk in talks]),
        torch.tensor([talk.mask for talk in talks]),
        torch.tensor([talk.labels for talk in talks]),
        torch.tensor([talk.skills for talk in talks]),
        [talk.where for talk in talks],
        [talk.via for talk in talks],
        torch.arange(n_images).repeat(n),
        torch.from_numpy(before).flatten(0, 1),
        torch.from_numpy(dense).flatten(0, 1),
        torch.from_numpy(_KIND_WORDS[classes]).flatten(0, 1),
        torch.from_numpy(_COLOR_WORDS[colors]).flatten(0, 1),
        torch.cat([pictures(a, rng) for a in albums]),
    )
