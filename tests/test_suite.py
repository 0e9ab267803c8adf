"""The built-in suite: its scenes, questions and answers."""

import numpy as np
import pytest
from PIL import ImageChops

from csp_edge.errors import OptionError
from csp_edge.eval.scenes import (
    CELLS,
    COLORS,
    EMOJI,
    N_PIXELS,
    SHAPES,
    VENDOR_HELD_OUT,
    VENDORS,
    Scene,
    Thing,
    draw,
)
from csp_edge.eval.suite import COLOR_HELD_OUT, SKILLS, WORDS_HELD_OUT, album, ask, suite

CAT, DOG, RED_STAR = Thing("cat"), Thing("dog"), Thing("star", "red")
BLUE_STAR = Thing("star", "blue")


def answers(scenes, skill, n=200):
    """All questions of a skill about these scenes, with their answers."""
    rng = np.random.default_rng(0)
    found = (ask(rng, scenes, skill) for _ in range(n))
    return {question.text: question.answer for question in found if question}


@pytest.mark.parametrize(
    ("skill", "scenes", "expected"),
    [
        (
            "attribute",
            [Scene({0: RED_STAR, 4: CAT}), Scene({0: RED_STAR, 1: BLUE_STAR})],
            {"What color is the star in image 1?": "red"},
        ),
        (
            "find",
            [Scene({0: RED_STAR, 4: CAT}), Scene({0: BLUE_STAR, 8: CAT})],
            {
                "Which image shows the red star?": "1",
                "Which image shows the blue star?": "2",
            },
        ),
        (
            "read",
            [Scene({0: CAT}), Scene({}, (1, "A7"))],
            {"What is written in image 2?": "A7"},
        ),
        (
            "count",
            [Scene({0: CAT, 3: CAT, 4: DOG})],
            {"How many cats are in image 1?": "2", "How many dogs are in image 1?": "1"},
        ),
        (
            "relation",
            [Scene({0: CAT, 1: RED_STAR, 4: DOG})],
            {
                "What is right of the cat in image 1?": "red star",
                "What is left of the star in image 1?": "cat",
                "What is below the star in image 1?": "dog",
                "What is above the dog in image 1?": "red star",
            },
        ),
        (
            "compare",
            [Scene({0: CAT}), Scene({0: CAT, 5: RED_STAR}), Scene({5: RED_STAR})],
            {
                "What changed from image 1 to image 2?": "red star appeared",
                "What changed from image 2 to image 3?": "cat vanished",
            },
        ),
        (
            "compare",
            [Scene({0: CAT, 1: DOG}), Scene({0: CAT, 7: DOG}), Scene({0: CAT, 7: BLUE_STAR})],
            {
                "What changed from image 1 to image 2?": "dog moved",
                "What changed from image 2 to image 3?": "dog became blue star",
            },
        ),
        ("compare", [Scene({0: CAT, 1: DOG}), Scene({0: DOG, 1: CAT})], {}),
        (
            "follow",
            [Scene({0: CAT, 2: DOG}), Scene({4: CAT, 2: DOG}), Scene({8: CAT, 2: DOG})],
            {"Where is the cat from image 1 to image 3?": "top left, center, bottom right"},
        ),
        (
            "list",
            [Scene({2: CAT, 4: RED_STAR, 7: DOG}, (0, "X"))],
            {"What is in image 1?": "cat, red star, dog"},
        ),
    ],
)
def test_questions_and_answers(skill, scenes, expected):
    assert answers(scenes, skill) == expected


def test_the_same_seed_gives_the_same_suite():
    a, b = list(suite(n_samples=1, seed=5)), list(suite(n_samples=1, seed=5))
    assert [(s.id, s.turns) for s in a] == [(s.id, s.turns) for s in b]
    for left, right in zip(a[-1].content, b[-1].content, strict=True):
        assert not ImageChops.difference(left(), right()).getbbox()
    c = list(suite(n_samples=1, seed=6))
    assert [s.turns for s in a] != [s.turns for s in c]


def test_a_suite_holds_what_was_asked_for():
    samples = list(suite(["compare", "read"], n_samples=3, n_images=(1, 4), n_turns=2))
    assert len({s.id for s in samples}) == len(samples) == 9  # a lone picture can't be compared
    for sample in samples:
        assert len(sample.turns) == 2
        assert sample.turns[0].skill in ("compare", "read")
        assert sample.turns[1].skill != sample.turns[0].skill
        assert sample.turns[0].group == SKILLS[sample.turns[0].skill]
        assert sample.n_pictures in (1, 4)


def test_what_is_held_out_is_never_in_training():
    rng = np.random.default_rng(0)
    seen = [scene for _ in range(200) for scene in album(rng, 8, held_out=False)]
    assert all(
        thing.color != COLOR_HELD_OUT[thing.kind]
        for scene in seen
        for thing in scene.things.values()
        if thing.color
    )
    assert not {scene.sign[1] for scene in seen if scene.sign} & set(WORDS_HELD_OUT)
    tested = [scene for _ in range(200) for scene in album(rng, 8, held_out=True)]
    held_out = {Thing(kind, color) for kind, color in COLOR_HELD_OUT.items()}
    assert held_out <= {thing for scene in tested for thing in scene.things.values()}
    assert set(WORDS_HELD_OUT) & {scene.sign[1] for scene in tested if scene.sign}


@pytest.mark.parametrize("vendor", [*VENDORS, VENDOR_HELD_OUT])
def test_every_thing_can_be_seen_in_its_cell(vendor):
    empty = draw(Scene({}), (0,), vendor)
    assert empty.size == (N_PIXELS, N_PIXELS)
    looks = set()
    for i, kind in enumerate([*EMOJI, *SHAPES]):
        cell = i % 9
        thing = Thing(kind, next(iter(COLORS)) if kind in SHAPES else None)
        picture = draw(Scene({cell: thing}), (0,), vendor)
        left, top, right, bottom = ImageChops.difference(picture, empty).getbbox()
        x, y = cell % 3 * 32, cell // 3 * 32
        assert x <= left < right <= x + 32 and y <= top < bottom <= y + 32
        looks.add(picture.tobytes())
    assert len(looks) == len(EMOJI) + len(SHAPES)
    assert len(CELLS) == 9


def test_unknown_skills_and_vendors_are_refused():
    with pytest.raises(OptionError, match="unknown skill 'sing'"):
        list(suite(["sing"]))
    with pytest.raises(OptionError, match="unknown vendor 'acme'"):
        list(suite(vendor="acme"))


def test_as_many_turns_as_a_picture_has():
    assert {len(s.turns) for s in suite(n_samples=2, n_images=(1,), n_turns=8)} == {8}
    for n_turns in (0, 9):
        with pytest.raises(OptionError, match=f"n_turns={n_turns}: give an integer from 1 to 8"):
            list(suite(n_turns=n_turns))
