"""What the README shows, works."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from csp_edge.cli import _parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python(code: str, tmp_path: Path, monkeypatch, capsys, scenes, demo_paths) -> None:
    for name, path in zip(
        ("a.png", "b.png", "model.gguf", "mmproj.gguf"), [*scenes[:2], *demo_paths], strict=True
    ):
        shutil.copy(path, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line: str) -> None:
    words = shlex.split(line.partition(" < ")[0], comments=True)
    words = [word for word in words if not word.startswith("CMAKE_ARGS=")]
    match words:
        case ["csp-edge", *argv]:
            assert _parser().parse_args(argv).run
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case [_, script, *_] if script.endswith(".py"):
            assert (ROOT / script).is_file()
        case _:
            assert words == ["pip", "install", "."]


def test_links() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_transcript_is_of_this_demo() -> None:
    from csp_edge.demo import CONVERSATIONS

    (transcript,) = blocks("console")
    for questions in CONVERSATIONS:
        assert all(transcript.count(f"  {question}\n") == 2 for question in questions)
