import re
import runpy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from csp_edge import EdgeVLM, demo
from csp_edge.cli import main
from csp_edge.eval.scenes import draw
from csp_edge.eval.suite import SKILLS, ask

RECIPE = Path(__file__).parents[1] / "tools/demo_vlm/pictures.py"
SCENES = runpy.run_path(str(RECIPE))["SCENES"]
QUESTIONS = {
    question: right for questions in demo.CONVERSATIONS for question, right in questions.items()
}
# what the model surely knows, over the full cache
SURE = ("Which image shows the blue star?", "What color is the star in image 2?")


def test_questions_have_right_answers() -> None:
    rng = np.random.default_rng(0)
    known = {}
    for skill in SKILLS:
        found = [ask(rng, SCENES, skill) for _ in range(200)]
        answers = {question.text: question.answer for question in found if question}
        assert any(question in answers for question in QUESTIONS), skill
        known |= answers
    assert {question: known.get(question) for question in QUESTIONS} == QUESTIONS


def test_pictures_are_as_their_recipe_draws_them(contents: dict[str, list[str]]) -> None:
    assert [path.name for path in demo.PICTURES] == list(contents)
    assert len(SCENES) == len(demo.PICTURES) == 12
    for i, (path, scene) in enumerate(zip(demo.PICTURES, SCENES, strict=True), 1):
        assert contents[path.name] == [str(thing) for thing in scene.things.values()]
        with Image.open(path) as picture:
            assert not ImageChops.difference(draw(scene, (i,), "noto"), picture).getbbox()


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EdgeVLM, "demo", partial(EdgeVLM.demo, n_threads=1))


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "kept.png"
    assert main(["demo", "--png", str(png)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert str(png) in out
    with Image.open(png) as page:
        assert page.format == "PNG" and page.width > 1000

    full, pruned = out.split("Pruned to 20%")
    n_right = []
    for part in (full, pruned):
        told = re.findall(r"^  (\w.*\?)\n    (.*?)(?:   \(wrong: (.*)\))?$", part, re.MULTILINE)
        assert [question for question, _, _ in told] == list(QUESTIONS)
        for question, answer, right in told:
            assert right == ("" if answer == QUESTIONS[question] else QUESTIONS[question])
        n_right.append(sum(not right for _, _, right in told))
    for question in SURE:
        assert f"  {question}\n    {QUESTIONS[question]}\n" in full
    told = re.search(r"right answers +(\d+)/(\d+) +(\d+)/(\d+)\n", pruned)
    n = len(QUESTIONS)
    assert [int(figure) for figure in told.groups()] == [n_right[0], n, n_right[1], n]
    figures = dict(re.findall(r"^(\w[^\n]*?)  +([\d.]+ +[\d.]+)$", pruned, re.MULTILINE))
    assert figures["KV cells, first question"].split() == ["814", "162"]
    assert figures["KV MiB, first question"].split() == ["2.38", "0.47"]
    assert {
        "first token, first question, ms",
        "first token, follow-ups, ms",
        "tokens/s",
    } <= figures.keys()


def test_where_nothing_can_be_saved(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(demo, "CONVERSATIONS", demo.CONVERSATIONS[:1])
    assert main(["demo", "--png", str(tmp_path / "no/such/kept.png")]) == 1
    assert "kept.png: can't be written: No such file" in capsys.readouterr().err
