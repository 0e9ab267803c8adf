"""The built-in suite: questions about drawn scenes, arranged after MileBench's groups."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from csp_edge.errors import OptionError
from csp_edge.eval.samples import Sample, Turn
from csp_edge.eval.scenes import (
    CELLS,
    COLORS,
    EMOJI,
    SHAPES,
    SIGN_MAX,
    VENDOR_HELD_OUT,
    VENDORS,
    Rng,
    Scene,
    Thing,
    draw,
)

# shown in the suite alone, never in training: each shape's one color, and these signs
COLOR_HELD_OUT = {shape: list(COLORS)[i] for i, shape in enumerate(SHAPES)}
WORDS_HELD_OUT = (
    "SUN SEA OAK ELM FOX OWL TEA PIE NUT JAM INK PEN MAP BOX CUP JAR TAXI EXIT OPEN SHOP "
    "PARK ZOO GYM CAFE BANK ROAD WEST EAST NORD MILK SALT RICE CORN WINE BEER FISH LAMB MINT "
    "GOLD IRON SAND SNOW WIND RAIN WOLF BEAR HAWK SWAN LION DEER"
).split()

PLURALS = {"fish": "fish", "bus": "buses", "cross": "crosses"}

SKILLS = {
    "attribute": "semantic",
    "find": "retrieval",
    "read": "needle",
    "count": "semantic",
    "relation": "semantic",
    "compare": "temporal",
    "follow": "temporal",
    "list": "semantic",
}

# fewer pictures can't ask it
N_IMAGES_LEAST = {"compare": 2, "follow": 3}


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answer, and for each part of the answer (each thing, number or place in it)
    the cells that show it: (image, cell), both from 0. None for a sign, which stands across cells.

    `via`: the cell that has to be found first, as it points to those.
    """

    skill: str
    text: str
    answer: str
    where: tuple[tuple[tuple[int, int], ...], ...] = ()
    via: tuple[int, int] | None = None


#
# scenes
#


def album(rng: Rng, n_images: int, *, held_out: bool) -> list[Scene]:
    """Pictures: single ones, pairs of which the second is the first with one change, and runs of
    three or four in which one thing moves."""
    scenes: list[Scene] = []
    while len(scenes) < n_images:
        left = n_images - len(scenes)
        kind = rng.random()
        if kind < 0.25 and left >= 2:
            scenes += pair(rng, held_out=held_out)
        elif kind < 0.4 and left >= 3:
            scenes += _run(rng, int(rng.integers(3, min(left, 4) + 1)), held_out)
        else:
            scenes.append(_single(rng, held_out))
    return scenes


def _single(rng: Rng, held_out: bool) -> Scene:
    sign = None
    cells = list(range(9))
    if rng.random() < 0.3:
        row = int(rng.integers(3))
        sign = row, _sign(rng, held_out)
        cells = [cell for cell in cells if cell // 3 != row]
    things = _things(rng, int(rng.integers(1, 6)), held_out)
    if rng.random() < 0.35:
        n_more = int(rng.integers(1, len(cells) - len(things) + 1)) if len(cells) > 5 else 0
        kind = things[0].kind
        things += [_colored(rng, kind, held_out) for _ in range(min(n_more, 5))]
    places = rng.permutation(cells)[: len(things)]
    return Scene(dict(sorted(zip(places.tolist(), things, strict=False))), sign)


def pair(rng: Rng, *, held_out: bool) -> list[Scene]:
    """Two pictures that differ in one thing: it appeared, vanished, became another, or moved."""
    new, old, *rest = _things(rng, int(rng.integers(3, 6)), held_out)
    place, free, *places = rng.permutation(9).tolist()
    before = dict(zip(places, rest, strict=False))
    after = dict(before)
    match rng.integers(4):
        case 0:  # appeared
            after[place] = new
        case 1:  # vanished
            before[place] = old
        case 2:  # became
            before[place], after[place] = old, new
        case 3:  # moved
            before[place], after[free] = old, old
    return [Scene(dict(sorted(things.items()))) for things in (before, after)]


def _run(rng: Rng, n: int, held_out: bool) -> list[Scene]:
    things = _things(rng, int(rng.integers(1, 4)), held_out)
    places = rng.permutation(9).tolist()
    rest = dict(zip(places, things[1:], strict=False))
    free = places[len(rest) :]
    return [Scene(dict(sorted({**rest, cell: things[0]}.items()))) for cell in free[:n]]


def _things(rng: Rng, n: int, held_out: bool) -> list[Thing]:
    """Of n kinds."""
    is_shape = rng.random(n) < 0.35
    shapes = iter(rng.permutation(SHAPES).tolist())
    emoji = iter(rng.permutation(EMOJI).tolist())
    return [_colored(rng, next(shapes if s else emoji), held_out) for s in is_shape]


def _colored(rng: Rng, kind: str, held_out: bool) -> Thing:
    if kind not in SHAPES:
        return Thing(kind)
    colors = [c for c in COLORS if held_out or c != COLOR_HELD_OUT[kind]]
    return Thing(kind, colors[int(rng.integers(len(colors)))])


def _sign(rng: Rng, held_out: bool) -> str:
    if held_out and rng.random() < 0.5:
        return WORDS_HELD_OUT[int(rng.integers(len(WORDS_HELD_OUT)))]
    n = int(rng.integers(1, SIGN_MAX + 1))
    if rng.random() < 0.4:
        return str(rng.integers(2, 10)) + "".join(str(d) for d in rng.integers(0, 10, n - 1))
    text = "".join(chr(ord("A") + int(c)) for c in rng.integers(0, 26, n))
    return _sign(rng, held_out) if text in WORDS_HELD_OUT else text


#
# questions
#


def _cells(scenes: Sequence[Scene], k: int, kind: str) -> tuple[tuple[int, int], ...]:
    return tuple((k, cell) for cell in scenes[k].find(kind))


def _attribute(rng: Rng, scenes: Sequence[Scene], k: int) -> Question | None:
    things = [t for t in scenes[k].things.values() if t.color and len(scenes[k].find(t.kind)) == 1]
    if not things:
        return None
    thing = things[int(rng.integers(len(things)))]
    assert thing.color
    text = f"What color is the {thing.kind} in image {k + 1}?"
    return Question("attribute", text, thing.color, (_cells(scenes, k, thing.kind),))


def _find(rng: Rng, scenes: Sequence[Scene], k: int) -> Question | None:
    shown = [set(scene.things.values()) for scene in scenes]
    things = [t for t in scenes[k].things.values() if sum(t in s for s in shown) == 1]
    if not things:
        return None
    thing = things[int(rng.integers(len(things)))]
    where = tuple((k, cell) for cell, other in scenes[k].things.items() if other == thing)
    return Question("find", f"Which image shows the {thing}?", str(k + 1), (where,))


def _read(rng: Rng, scenes: Sequence[Scene], k: int) -> Question | None:
    sign = scenes[k].sign
    return Question("read", f"What is written in image {k + 1}?", sign[1]) if sign else None


def _count(rng: Rng, scenes: Sequence[Scene], k: int) -> Question | None:
    kinds = sorted({thing.kind for thing in scenes[k].things.values()})
    many = [kind for kind in kinds if len(scenes[k].find(kind)) > 1]
    if not kinds:
        return None
    if many and rng.random() < 0.8:
        kinds = many
    kind = kinds[int(rng.integers(len(kinds)))]
    plural = PLURALS.get(kind, kind + "s")
    answer = str(len(scenes[k].find(kind)))
    text = f"How many {plural} are in image {k + 1}?"
    return Question("count", text, answer, (_cells(scenes, k, kind),))


# a step to the neighbouring cell, where there is one
STEPS: dict[str, Callable[[int], int | None]] = {
    "left of": lambda cell: cell - 1 if cell % 3 > 0 else None,
    "right of": lambda cell: cell + 1 if cell % 3 < 2 else None,
    "above": lambda cell: cell - 3 if cell >= 3 else None,
    "below": lambda cell: cell + 3 if cell < 6 else None,
}


def _relation(rng: Rng, scenes: Sequence[Scene], k: int) -> Question | None:
    things = scenes[k].things
    found = []
    for cell, thing in things.items():
        for words, step in STEPS.items():
            other = step(cell)
            if other is not None and other in things and len(scenes[k].find(thing.kind)) == 1:
                found.append((words, cell, other))
    if not found:
        return None
    words, cell, other = found[int(rng.integers(len(found)))]
    text = f"What is {words} the {things[cell].kind} in image {k + 1}?"
    return Question("relation", text, str(things[other]), (((k, other),),), via=(k, cell))


def _compare(rng: Rng, scenes: Sequence[Scene], k: int) -> Question | None:
    if k + 1 >= len(scenes) or scenes[k].sign or scenes[k + 1].sign:
        return None
    before, after = scenes[k].things, scenes[k + 1].things
    cells = [c for c in range(9) if before.get(c) != after.get(c)]
    old, new = (tuple((i, c) for c in cells if c in scenes[i].things) for i in (k, k + 1))
    where: tuple[tuple[tuple[int, int], ...], ...]
    match [(before.get(c), after.get(c)) for c in cells]:
        case [(Thing() as thing, None)]:
            answer, where = f"{thing} vanished", (old,)
        case [(None, Thing() as thing)]:
            answer, where = f"{thing} appeared", (new,)
        case [(Thing() as thing, Thing() as other)]:
            answer, where = f"{thing} became {other}", (old, new)
        case [(Thing() as thing, None), (None, Thing() as other)] if thing == other:
            answer, where = f"{thing} moved", (old + new,)
        case [(None, Thing() as other), (Thing() as thing, None)] if thing == other:
            answer, where = f"{thing} moved", (old + new,)
        case _:
            return None
    text = f"What changed from image {k + 1} to image {k + 2}?"
    return Question("compare", text, answer, where, via=(k + 1, cells[0]))


def _follow(rng: Rng, scenes: Sequence[Scene], k: int) -> Question | None:
    for thing in scenes[k].things.values():
        end = k
        while (
            end < len(scenes)
            and end < k + 4
            and list(scenes[end].things.values()).count(thing) == 1
        ):
            end += 1
        cells = [scene.find(thing.kind) for scene in scenes[k:end]]
        if len(cells) >= 3 and all(len(c) == 1 for c in cells) and len({c[0] for c in cells}) > 1:
            text = f"Where is the {thing} from image {k + 1} to image {end}?"
            where = tuple(((k + i, c[0]),) for i, c in enumerate(cells))
            return Question("follow", text, ", ".join(CELLS[c[0]] for c in cells), where)
    return None


def _list(rng: Rng, scenes: Sequence[Scene], k: int) -> Question | None:
    things = scenes[k].things
    if len(things) > 5:
        return None
    answer = ", ".join(map(str, things.values()))
    where = tuple(((k, cell),) for cell in things)
    return Question("list", f"What is in image {k + 1}?", answer, where)


_ASK = {
    "attribute": _attribute,
    "find": _find,
    "read": _read,
    "count": _count,
    "relation": _relation,
    "compare": _compare,
    "follow": _follow,
    "list": _list,
}


def ask(rng: Rng, scenes: Sequence[Scene], skill: str) -> Question | None:
    """A question of this skill about one of the pictures. None: it can't be asked of any."""
    for k in rng.permutation(len(scenes)).tolist():
        question = _ASK[skill](rng, scenes, k)
        if question:
            return question
    return None


def suite(
    skills: Sequence[str] = tuple(SKILLS),
    *,
    n_samples: int = 10,
    n_images: Sequence[int] = (1, 2, 4, 8, 16),
    n_turns: int = 3,
    vendor: str | None = None,
    seed: int = 0,
) -> Iterator[Sample]:
    """Held-out conversations: `n_samples` for each skill and number of pictures that can ask it.

    The first question is of the sample's skill, each later one of any other, about any picture.

    Args:
        n_turns: questions in a conversation, at most 8: one picture has no more to ask.
        vendor: whose emoji are drawn, one of VENDORS or VENDOR_HELD_OUT. None: any of VENDORS.

    Raises:
        OptionError: there is no such skill or vendor, or n_turns is out of range.
    """
    if not 1 <= n_turns <= 8:
        raise OptionError(f"n_turns={n_turns!r}: give an integer from 1 to 8")
    for skill in skills:
        if skill not in SKILLS:
            raise OptionError(f"unknown skill {skill!r}: choose from {', '.join(SKILLS)}")
    if vendor not in (None, *VENDORS, VENDOR_HELD_OUT):
        known = ", ".join((*VENDORS, VENDOR_HELD_OUT))
        raise OptionError(f"unknown vendor {vendor!r}: choose one of {known}")
    for i in range(n_samples):
        for n in n_images:
            for skill in skills:
                if n >= N_IMAGES_LEAST.get(skill, 1):
                    yield _sample(
                        skill, n, n_turns, vendor, (seed, n, list(SKILLS).index(skill), i)
                    )


def _sample(
    skill: str, n_images: int, n_turns: int, vendor: str | None, seed: tuple[int, ...]
) -> Sample:
    rng = np.random.default_rng(seed)
    questions: list[Question] = []
    # an album may have less to ask than that
    while len(questions) < n_turns:
        scenes = album(rng, n_images, held_out=True)
        questions = _questions(rng, scenes, skill, n_turns)
    drawn_by = vendor or VENDORS[int(rng.integers(len(VENDORS)))]
    return Sample(
        id="-".join(map(str, (skill, *seed))),
        dataset="suite",
        metric="exact",
        content=tuple(partial(draw, scene, (*seed, k), drawn_by) for k, scene in enumerate(scenes)),
        turns=tuple(Turn(q.text, q.answer, q.skill, SKILLS[q.skill]) for q in questions),
    )


def _questions(rng: Rng, scenes: Sequence[Scene], skill: str, n: int) -> list[Question]:
    """At most n different ones, the first of this skill, the others of others."""
    others = [name for name in SKILLS if name != skill]
    drawn = [skill, *(others[int(i)] for i in rng.integers(0, len(others), 8 * n))]
    found = [ask(rng, scenes, name) for name in drawn]
    return list(dict.fromkeys(q for q in found if q))[:n] if found[0] else []
