"""The command line, as its users meet it."""

import fcntl
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from csp_edge import cli, demo
from csp_edge.cli import main
from csp_edge.model_info import describe
from csp_edge.terminal import Progress

COMMAND = [sys.executable, "-m", "csp_edge"]
COLOR = "What color is the cross in image 1?"  # of photo.png: green


class Stdin:
    """What is piped into a command, or a terminal that nobody types at."""

    def __init__(self, data: bytes = b"", is_terminal: bool = False) -> None:
        self.buffer = io.BytesIO(data)
        self.isatty = lambda: is_terminal


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenes, demo_paths) -> Path:
    """Where commands run: pictures, a model and its projector, a question."""
    for name, i in {"photo.png": 3, "a.png": 2, "b.png": 1}.items():
        shutil.copy(scenes[i - 1], tmp_path / name)
    for name, path in zip(("model.gguf", "mmproj.gguf"), demo_paths, strict=True):
        shutil.copy(path, tmp_path / name)
    (tmp_path / "question.txt").write_text(COLOR + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("sys.stdin", Stdin())
    return tmp_path


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a failing command prints."""
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    line, end, rest = err.partition("\n")
    assert line.startswith("csp-edge: error: ") and end and not rest
    return line.removeprefix("csp-edge: error: ")


# help


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, csp_edge\n"
        "from csp_edge.cli import main\n"
        "try: main(['chat', '--help'])\n"
        "except SystemExit: pass\n"
        "print(*{'numpy', 'PIL', 'llama_cpp', 'gguf', 'jinja2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: csp-edge chat")
    assert done.stdout.splitlines()[-1] == ""


EXAMPLES = [
    line.strip()
    for text in (cli.EXAMPLES, cli.CHAT_EXAMPLES, cli.DEMO_EXAMPLES, cli.INSPECT_EXAMPLES)
    for line in text.splitlines()[1:]
]


@pytest.mark.parametrize("example", dict.fromkeys(EXAMPLES))
def test_example(example: str, capsys, monkeypatch, folder: Path) -> None:
    command, _, file = example.partition(" < ")
    if file:
        monkeypatch.setattr("sys.stdin", Stdin((folder / file).read_bytes()))
    elif command == "csp-edge chat":
        monkeypatch.setattr("sys.stdin", Stdin(is_terminal=True))
        monkeypatch.setattr("builtins.input", lambda prompt="": "/quit")
    # all of it runs in test_demo.py
    monkeypatch.setattr(demo, "CONVERSATIONS", demo.CONVERSATIONS[:1])
    name, *argv = shlex.split(command)
    assert name == "csp-edge"
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert out or command == "csp-edge chat"
    assert not err or command == "csp-edge chat"


@pytest.mark.parametrize("command", ["chat", "demo", "inspect"])
def test_help_shows_the_examples(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    assert f"csp-edge {command}" in capsys.readouterr().out.partition("examples:")[2]


def test_version(capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert re.fullmatch(r"csp-edge \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["chat", "--threads", "many"], "invalid int value: 'many'"),
        (["chat", "--budget"], "expected one argument"),
        (["inspect"], "required: PATH"),
    ],
)
def test_usage(argv: list[str], match: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert match in err


# one answer


def test_answer(capsys) -> None:
    assert main(["chat", "-i", "photo.png", COLOR]) == 0
    assert capsys.readouterr() == ("green\n", "")


def test_several_pictures(capsys) -> None:
    argv = ["chat", "-i", "photo.png", "-i", "a.png", "-m", "model.gguf", "--policy", "full"]
    assert main([*argv, "Which image shows the blue star?"]) == 0
    assert capsys.readouterr() == ("2\n", "")


@pytest.mark.parametrize("argv", [[], ["-"]])
def test_prompt_from_stdin(argv: list[str], capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", Stdin(f"{COLOR}\r\n".encode()))
    assert main(["chat", "-i", "photo.png", *argv]) == 0
    assert capsys.readouterr() == ("green\n", "")


def test_json(capsys) -> None:
    argv = ["chat", "--json", "--budget", "25%", "-i", "photo.png", "-i", "a.png"]
    assert main([*argv, COLOR]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1
    answer = json.loads(out)
    assert answer.keys() == {"text", "finish_reason", "usage", "timings", "cache"}
    assert answer["text"] == "green"
    assert answer["usage"]["image_tokens"] == 128
    assert answer["timings"]["first_token_s"] > 0
    cache = answer["cache"]
    n_cells = cache["cells_before"]
    assert n_cells == answer["usage"]["prompt_tokens"]
    assert (cache["policy"], cache["budget"]) == ("csp", 0.25)
    assert cache["cells_after"] == n_cells // 4
    assert cache["bytes_after"] == 3072 * cache["cells_after"]
    assert [picture["n_cols"] for picture in cache["pictures"]] == [8, 8]
    # layers, heads, cells
    assert [[len(head) for head in layer] for layer in cache["kept"]] == [[n_cells // 4] * 2] * 6


def test_budget_in_cells(capsys) -> None:
    assert main(["chat", "--json", "--budget", "40", "-i", "photo.png", COLOR]) == 0
    assert json.loads(capsys.readouterr().out)["cache"]["cells_after"] == 40


def test_same_seed_same_answer(capsys) -> None:
    argv = ["chat", "--temp", "5", "--max-tokens", "5", "What is above image 3?"]
    answers = []
    for seed in ("1", "1", "2", "3", "4"):
        assert main([*argv, "--seed", seed]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert len(set(answers)) > 1


def test_a_text_model(capsys, smollm2_path: Path) -> None:
    argv = ["chat", "-m", str(smollm2_path), "--policy", "full", "--threads", "2", "--ctx", "256"]
    assert main([*argv, "--max-tokens", "4", "Say hello."]) == 0
    out, err = capsys.readouterr()
    assert out.strip() and err == ""


# progress


def test_bars_on_a_terminal(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(["chat", "-i", "photo.png", COLOR]) == 0
    out, err = capsys.readouterr()
    assert out == "green\n"
    for stage in ("loading", "encoding pictures", "reading the prompt"):
        assert re.search(rf"{stage} +#*\.+ \d+/\d+", err)
    assert err.count("\x1b7") == 3
    assert err.endswith("\x1b8\x1b[K"), "the bar is left standing"


# what goes wrong


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["-m", "nosuch.gguf", "a"], "nosuch.gguf: no such file"),
        (["-m", "photo.png", "a"], "photo.png: not a GGUF"),
        (["-m", "mmproj.gguf", "a"], "mmproj.gguf: a projector"),
        (["-m", "cut.gguf", "a"], "cut.gguf: .*(truncated|corrupt|cut off)"),
        (["--mmproj", "model.gguf", "a"], "model.gguf: not a projector"),
        (["--mmproj", "nosuch.gguf", "a"], "nosuch.gguf: no such file"),
        (["-i", "nosuch.png", "a"], "'nosuch.png': no such file"),
        (["-i", "question.txt", "a"], "'question.txt': not a picture"),
        (["-i", "https://localhost/a.png", "a"], "fetching URLs is off"),
        ([""], "the prompt is empty"),
        (["-i", "photo.png", " "], "the prompt is empty"),
        (["-i", "photo.png"], "the prompt is empty"),
        (["a\udcff"], "not valid UTF-8 at position 1"),
        (["word " * 5000], "beyond the context of 4096"),
        (["--ctx", "16", "word " * 300], "beyond the context of 16"),
        (["--budget", "0", "a"], "budget=0: give"),
        (["--budget", "-5", "a"], "budget=-5: give"),
        (["--budget=-20%", "a"], "budget=-0.2: give"),
        (["--budget", "150%", "a"], "budget=1.5: give"),
        (["--budget", "lots", "a"], "budget 'lots': give"),
        (["--policy", "best", "a"], "unknown policy 'best': choose one of csp, full"),
        (["--policy", "full", "--budget", "20%", "a"], "'full' has no setting 'budget'"),
        (["--kv-type", "f8", "a"], "unknown kv_type 'f8'"),
        (["--ctx", "0", "a"], "n_ctx=0: give"),
        (["--max-tokens", "0", "a"], "max_tokens=0: give"),
        (["--temp", "nan", "a"], "temperature=nan: give"),
        (["--seed", "-1", "a"], "seed=-1: give"),
    ],
)
def test_bad_input(argv: list[str], match: str, capsys, folder: Path) -> None:
    (folder / "cut.gguf").write_bytes((folder / "model.gguf").read_bytes()[:100_000])
    assert re.search(match, error_of(capsys, "chat", *argv))


@pytest.mark.parametrize("argv", [["-i", "photo.png", "a"], ["word " * 25]])
def test_a_context_smaller_than_a_batch(argv: list[str]) -> None:
    done = subprocess.run([*COMMAND, "chat", "--ctx", "16", *argv], capture_output=True, text=True)
    assert done.returncode == 1
    assert "beyond the context of 16" in done.stderr


def test_pictures_without_a_projector(capsys, folder: Path) -> None:
    (folder / "mmproj.gguf").unlink()
    error = error_of(capsys, "chat", "-m", "model.gguf", "-i", "photo.png", "What is this?")
    assert "pictures need a projector" in error


def test_bad_utf8_in_stdin(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", Stdin(b"what \xff"))
    assert "not valid UTF-8 at position 5" in error_of(capsys, "chat")


def test_stdin_without_end(capsys, monkeypatch) -> None:
    with open("/dev/zero", "rb") as zeros:
        stdin = Stdin()
        stdin.buffer = zeros
        monkeypatch.setattr("sys.stdin", stdin)
        assert "stdin: more than" in error_of(capsys, "chat")


def test_stdin_closed(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert "stdin is closed" in error_of(capsys, "chat")


def test_json_of_a_conversation(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", Stdin(is_terminal=True))
    with pytest.raises(SystemExit) as exit:
        main(["chat", "--json"])
    assert exit.value.code == 2
    assert "--json needs a PROMPT" in capsys.readouterr().err


def test_a_line_stays_a_line(capsys) -> None:
    assert "nosuch\\n\\x1b[31m" in error_of(capsys, "chat", "-m", "nosuch\n\x1b[31m", "a")


def test_reader_gone() -> None:
    with subprocess.Popen(
        [*COMMAND, "inspect", "."], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has it")
def test_disk_full() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "inspect", "."], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"csp-edge: error: stdout: No space left on device\n"


def test_ctrl_c(smollm2_path: Path) -> None:
    argv = ["chat", "-m", str(smollm2_path), "--max-tokens", "2000", "Tell a very long story."]
    with subprocess.Popen(
        [*COMMAND, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        begin = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert begin + out
    assert out.endswith(b"\n")
    assert (process.returncode, err) == (130, b"")


# inspect


def test_inspect(capsys, demo_paths) -> None:
    assert main(["inspect", "model.gguf"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    figures = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in out.splitlines())
    info = describe(*demo_paths)
    assert figures["name"] == "csp-demo"
    assert figures["licence"].startswith("MIT")
    assert figures["architecture"] == "llama"
    assert figures["layers"] == "6"
    assert figures["heads"] == "4, with 2 KV heads"
    assert figures["context"] == f"{info.n_ctx:,} tokens"
    assert figures["quantization"].startswith("Q8_0 (99.8% Q8_0")
    assert figures["projector"] == "mmproj.gguf"
    assert figures["tokens"] == "64"
    assert f"\nweights         {info.weight_bytes:,} bytes (5.2 MiB)\n" in out
    assert figures["KV per token"] == "3,072 bytes, f16"
    assert figures["KV per picture"] == "196,608 bytes"


def test_inspect_a_text_model(capsys, smollm2_path: Path) -> None:
    assert main(["inspect", str(smollm2_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"projector +none", out)
    assert "per picture" not in out


def test_inspect_what_is_no_model(capsys) -> None:
    assert "photo.png: not a GGUF" in error_of(capsys, "inspect", "photo.png")


# a conversation


class Terminal:
    """csp-edge chat on a pseudo-terminal."""

    def __init__(self, *argv: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, "chat", *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env=os.environ | {"TERM": "dumb"},
        )
        os.close(slave)
        self.wait_for("> ")

    def type(self, keys: str | bytes) -> None:
        os.write(self.master, keys.encode() if isinstance(keys, str) else keys)

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """All that comes until it ends with the pattern."""
        seen = b""
        end = time.monotonic() + seconds
        while not re.search(pattern + r"\Z", seen.decode(errors="replace")):
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {pattern!r} in {seen!r}"
            seen += os.read(self.master, 1)
        return seen.decode(errors="replace")

    def ask(self, line: str | bytes) -> str:
        """What comes after a line, up to the next prompt."""
        self.type(line + ("\r" if isinstance(line, str) else b"\r"))
        self.wait_for("\r\n")
        return self.wait_for(r"(\A|\n)> ").replace("\r\n", "\n").removesuffix("> ")


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal("--policy", "full", "--ctx", "1024", "-i", "photo.png")
    yield terminal
    terminal.process.kill()
    terminal.process.wait()


def test_conversation(terminal: Terminal, folder: Path) -> None:
    assert terminal.ask("/stats") == "nothing has been answered yet\n"
    assert terminal.ask(COLOR).endswith("green\n")
    assert "79 of the prompt (64 of pictures, 0 known), 1 of the answer" in terminal.ask("/stats")
    assert terminal.ask("/reset") == ""
    for name in ("photo.png", "'a.png'"):
        assert terminal.ask(f"/image {name}") == "96 x 96, goes with the next question\n"
    assert terminal.ask("Which image shows the blue star?").endswith("2\n")
    assert terminal.ask("What color is the heart in image 2?").endswith("pink\n")
    stats = terminal.ask("/stats")
    assert "128 of pictures" in stats and " 0 known" not in stats
    assert "/image PATH" in terminal.ask("/help")
    assert terminal.ask("") == ""
    terminal.type("/quit\r")
    assert terminal.process.wait(timeout=30) == 0
    history = (folder / "state/csp-edge/history").read_text()
    assert "Which image shows the blue star?\n" in history


def test_conversation_goes_on(terminal: Terminal) -> None:
    assert "error: picture 'nosuch.png': no such file" in terminal.ask("/image nosuch.png")
    assert "error: picture 'question.txt': not a picture" in terminal.ask("/image question.txt")
    assert "error: /image: give the path" in terminal.ask("/image")
    assert "error: unknown command '/dance'" in terminal.ask("/dance")
    assert "error: " in terminal.ask(b"\xff\xfe")
    assert "beyond the context" in terminal.ask("word " * 300)
    terminal.type("half a line\x03")
    terminal.wait_for("\r\n> ")
    assert terminal.ask("/image photo.png")
    assert terminal.ask(COLOR).endswith("green\n")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=30) == 0


def test_ctrl_c_stops_the_answer_alone(smollm2_path: Path) -> None:
    terminal = Terminal("-m", str(smollm2_path), "--max-tokens", "3000")

    def stopped(question: str) -> tuple[int, ...]:
        terminal.type(question + "\r")
        # the answer has begun where the bar was
        terminal.wait_for(r"\x1b8\x1b\[K(?!reading)[^\x1b]{8}")
        terminal.type("\x03")
        terminal.wait_for("\r\n> ")
        stats = terminal.ask("/stats")
        match = re.search(r"(\d+) known\), (\d+) of the answer", stats)
        assert match, stats
        return tuple(map(int, match.groups()))

    try:
        n_known, n_answer = stopped("Tell a very long story of a fox.")
        assert n_known == 0 < n_answer < 3000
        # and the conversation goes on from what was said
        n_known, _ = stopped("Tell another one.")
        assert n_known > n_answer
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()


@pytest.mark.parametrize(
    ("picture", "status", "out"), [("nothing.png", 1, ""), (None, 0, "blue\n")]
)
def test_a_closed_stderr_tells_nothing(picture, status, out, scenes):
    question = ["-i", picture or scenes[0], "-i", scenes[1], "What color is the star in image 2?"]
    done = subprocess.run(
        [*COMMAND, "chat", "--threads", "1", *question],
        stdout=subprocess.PIPE,
        preexec_fn=lambda: os.close(2),
        text=True,
    )
    assert (done.returncode, done.stdout) == (status, out)


def test_ctrl_c_between_two_steps_is_not_lost():
    progress = Progress()
    with progress:
        progress("load", 1, 1)
        os.kill(os.getpid(), signal.SIGINT)
    with progress, pytest.raises(KeyboardInterrupt):
        progress("prefill", 0, 2)
    with progress:
        progress("prefill", 0, 2)
