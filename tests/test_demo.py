import re
from pathlib import Path

import pytest
from PIL import Image

from csp_edge import demo
from csp_edge.cli import main

QUESTIONS = {
    question: right for questions in demo.CONVERSATIONS for question, right in questions.items()
}


def test_questions_have_right_answers(contents: dict[str, list[str]]) -> None:
    things = [contents[path.name] for path in demo.PICTURES]
    for question, right in QUESTIONS.items():
        words = question.split()
        if question.startswith("what color is the "):
            assert f"{right} {words[4]}" in things[int(words[7]) - 1]
        elif question.startswith("which image has the "):
            assert [" ".join(words[4:6]) in names for names in things].index(True) == int(right) - 1
        else:
            assert right.split(" , ") == things[int(words[4]) - 1]


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "kept.png"
    assert main(["demo", "--png", str(png)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert str(png) in out
    with Image.open(png) as page:
        assert page.format == "PNG" and page.width > 1000

    full, pruned = out.split("Pruned to 20%")
    for question, right in QUESTIONS.items():
        assert f"  {question}\n    {right}\n" in full
        assert question in pruned
    figures = dict(re.findall(r"^(\w[^\n]*?)  +([\d.]+ +[\d.]+)$", pruned, re.MULTILINE))
    assert figures["KV cells, first question"].split() == ["246", "49"]
    assert figures["KV MiB, first question"].split() == ["0.72", "0.14"]
    n_right = int(re.search(r"right answers +8/8 +(\d)/8", pruned)[1])
    assert n_right == 8 - pruned.count("(wrong: ")
    assert {
        "first token, first question, ms",
        "first token, follow-ups, ms",
        "tokens/s",
    } <= figures.keys()


def test_where_nothing_can_be_saved(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(demo, "CONVERSATIONS", demo.CONVERSATIONS[:1])
    assert main(["demo", "--png", str(tmp_path / "no/such/kept.png")]) == 1
    assert "kept.png: can't be written: No such file" in capsys.readouterr().err
