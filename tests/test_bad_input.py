"""What can't be used is refused in one line that names it, and the engine goes on."""

import multiprocessing
import random
import struct
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import csp_edge.engine
import csp_edge.model_info
import tiny_models
from csp_edge import CSP, EdgeVLM, Full
from csp_edge.errors import (
    CspEdgeError,
    ImageError,
    MemoryLimitError,
    ModelError,
    PolicyError,
    ProjectorError,
    PromptError,
    TemplateError,
)
from csp_edge.gguf_file import read_header
from csp_edge.policies import policy
from small_gguf import MMPROJ, MODEL, copy, write

FRANCE = "What is the capital of France? Answer in one sentence."
STAR = "What color is the star in image 2?"


def load(path=MODEL, **options):
    return EdgeVLM(path, n_threads=1, **options)


@contextmanager
def refused(kind, *words):
    with pytest.raises(CspEdgeError) as error:
        yield
    message = str(error.value)
    assert type(error.value) is kind
    assert message.isprintable()
    assert len(message) < 400
    for word in words:
        assert str(word) in message


@pytest.fixture(autouse=True)
def goes_on(demo, scenes):
    """An engine that met the bad input, or stood by, answers a good question."""
    yield
    assert demo.chat(STAR, scenes[:2]).text == "blue"


# files


def test_no_such_file(tmp_path):
    for path in (tmp_path / "none.gguf", str(tmp_path / "none.gguf"), "a\nb", "a\0b"):
        with refused(ModelError, "no such file"):
            load(path)
    with refused(ModelError, tmp_path / "none.gguf", "no such file"):
        load(mmproj=tmp_path / "none.gguf")


def test_a_folder_without_a_model(tmp_path):
    with refused(ModelError, tmp_path, "holds no model"):
        load(tmp_path)
    (tmp_path / "mmproj.gguf").symlink_to(MMPROJ)
    with refused(ModelError, tmp_path, "holds no model"):
        load(tmp_path)
    with refused(ModelError, MMPROJ, "a projector"):
        load(MMPROJ)


@pytest.mark.parametrize("data", [b"", b"G", b"hello", bytes(4096), b"\x89PNG\r\n\x1a\n"])
def test_not_a_gguf(tmp_path, data):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with refused(ModelError, path, "not a GGUF file"):
        load(path)
    with refused(ModelError, path, "not a GGUF file"):
        load(mmproj=path)


@pytest.mark.parametrize("file", [MODEL, MMPROJ])
def test_truncated(tmp_path, file):
    data = file.read_bytes()
    n_header = min(tensor.offset for tensor in read_header(file).tensors.values())
    path = tmp_path / "x.gguf"
    for end in (4, 23, 24, 1000, n_header - 1, n_header, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        with refused(ModelError, path, "truncated"):
            load(path) if file == MODEL else load(mmproj=path)


def chat_over_flipped_bytes(folder, file, picture):
    """A hundred times one or two bytes of the header are others. Runs in a process of its own."""
    data = file.read_bytes()
    n_header = min(tensor.offset for tensor in read_header(file).tensors.values())
    path = Path(folder, "x.gguf")
    draw = random.Random(0)
    n_refused = 0
    for _ in range(100):
        flipped = bytearray(data)
        for _ in range(draw.randint(1, 2)):
            flipped[draw.randrange(n_header)] = draw.choice((0, 1, 255, draw.randrange(256)))
        path.write_bytes(flipped)
        try:
            with load(path, mmproj=MMPROJ) if file == MODEL else load(mmproj=path) as vlm:
                vlm.chat("What is in image 1?", [picture], max_tokens=2)
        except CspEdgeError as error:
            assert str(error).isprintable()
            n_refused += 1
    assert 10 < n_refused < 100


@pytest.mark.parametrize("file", [MODEL, MMPROJ])
def test_corrupt(tmp_path, scenes, file):
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=chat_over_flipped_bytes, args=(tmp_path, file, scenes[0]))
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == 0


def test_a_projector_for_another_model(tmp_path, smollm2_path, scenes, monkeypatch):
    with refused(ProjectorError, MMPROJ, "another model", 256, 576):
        load(smollm2_path, mmproj=MMPROJ)
    other = write(tmp_path / "mmproj.gguf", "clip", n_embd=64)
    with refused(ProjectorError, other, "another model", 64, 256):
        load(mmproj=other)
    with refused(ProjectorError, MODEL, "not a projector"):
        load(mmproj=MODEL)
    # beside a model it is passed over
    (tmp_path / "model.gguf").symlink_to(MODEL)
    with load(tmp_path) as vlm, refused(ProjectorError, "model.gguf", "need a projector"):
        vlm.chat(STAR, scenes[:1])
    # where its header doesn't tell
    monkeypatch.setattr(csp_edge.model_info, "check_pair", lambda *_: None)
    with refused(ProjectorError, MMPROJ, "n_embd"):
        load(smollm2_path, mmproj=MMPROJ)


def test_a_broken_chat_template(tmp_path):
    path = tmp_path / "m.gguf"
    for template, words in (
        ("{% for m in messages %}{{ m.content }", ["line 1", "'}'"]),
        ("{% fro m in messages %}{% endfor %}", ["line 1", "fro"]),
        ("{{ messages[0].content | shout }}", ["line 1", "shout"]),
        ("{{ messages[9].content.x }}", ["has no element 9"]),
        ("{{ raise_exception('not\nhere') }}", ["refuses the messages: not here"]),
        ("{% for i in range(10 ** 9) %}{{ i }}{% endfor %}", ["**"]),
        ("always the same", ["loses the user's text", "always the same"]),
    ):
        copy(MODEL, path, tokenizer__chat_template=template)
        with refused(TemplateError, "chat template", *words):
            load(path)


def test_a_model_without_a_vocabulary(tmp_path):
    path = tmp_path / "m.gguf"
    tiny_models.gemma2(path)
    with refused(ModelError, path, "vocabulary"):
        load(path)


# pictures


def test_pictures_without_a_projector(smollm2, smollm2_path, scenes):
    with refused(ProjectorError, smollm2_path, "need a projector"):
        smollm2.chat(STAR, scenes[:1])
    assert "Paris" in smollm2.chat(FRANCE, max_tokens=20).text


def test_an_unreadable_picture(demo, tmp_path, scenes):
    cut = tmp_path / "cut.png"
    cut.write_bytes(scenes[0].read_bytes()[:-200])
    (tmp_path / "text.png").write_text("hello")
    for picture, words in (
        (tmp_path / "none.png", [tmp_path / "none.png", "no such file"]),
        (tmp_path, [tmp_path, "a folder"]),
        (tmp_path / "text.png", ["text.png", "not a picture"]),
        (cut, ["cut.png", "truncated or corrupt"]),
        (b"hello", ["5 bytes", "not a picture"]),
        (b"", ["0 bytes", "empty"]),
        ("data:image/png;base64,%%%", ["data:image/png", "base64"]),
        ("https://example.org/a.png", ["https://example.org/a.png", "URLs is off"]),
        (np.zeros((0, 5, 3), np.uint8), ["(0, 5, 3)", "empty"]),
        (np.full((4, 4), np.nan), ["(4, 4)", "nan"]),
        (7, ["a int is no picture"]),
    ):
        with refused(ImageError, *words):
            demo.chat(STAR, [scenes[0], picture])


def test_a_huge_picture(demo, tmp_path):
    def chunk(name, data):
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    path = tmp_path / "huge.png"
    for size in (100_000, 10_000):
        header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b""))
        with refused(ImageError, path, "more than the limit of 67108864 pixels"):
            demo.chat(STAR, [path])


# prompts


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", ["empty"]),
        (" \n", ["empty"]),
        (b"", ["empty"]),
        ([], ["empty"]),
        ([{"role": "user", "content": ""}], ["empty"]),
        ([{"role": "user", "content": []}], ["empty"]),
        ([{"role": "user"}], ["messages[0].content", "NoneType"]),
        ([{"role": "robot", "content": "a"}], ["messages[0]", "'robot'"]),
        (["a"], ["messages[0]", "str"]),
        (None, ["NoneType"]),
        (b"what \xff", ["UTF-8", "position 5"]),
        (b"what \xe2\x82", ["UTF-8", "position 5"]),
        ("what \ud800 ?", ["UTF-8", "position 5"]),
        ([{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}], ["UTF-8", "[0]"]),
        ("a\0b", ["NUL", "position 1"]),
        ("a <__media__>", ["<__media__>"]),
        (" red" * 5000, ["tokens is beyond the context of 4096"]),
    ],
)
def test_bad_prompts(demo, prompt, words):
    with refused(PromptError, *words):
        demo.chat(prompt)


def test_a_prompt_beyond_n_ctx(scenes):
    for cache in (Full(), CSP(0.2)):
        with load(n_ctx=200, cache=cache) as vlm:
            with refused(PromptError, "beyond the context of 200"):
                vlm.chat(" red" * 300)
            with refused(PromptError, "beyond the context of 200"):
                vlm.chat(STAR, scenes[:4])
            assert vlm.chat(STAR, scenes[:2]).text == "blue"


# policies


@pytest.mark.parametrize("budget", [0, 0.0, -1, -0.5, 1.5, float("nan"), float("inf"), "20%", True])
def test_bad_budgets(budget):
    with refused(PolicyError, f"budget={budget!r}"):
        CSP(budget)
    with refused(PolicyError, f"budget={budget!r}"):
        policy("csp", budget=budget)


def test_a_window_larger_than_the_prompt(scenes):
    with load(cache=CSP(0.2, window=60)) as vlm:
        with refused(PolicyError, "window=60", "tokens"):
            vlm.chat("hello")
        assert vlm.chat(STAR, scenes[:4]).text == "blue"
        with refused(PolicyError, "window=60", "tokens"):
            vlm.chat("hello")


def test_an_unknown_policy():
    with refused(PolicyError, "'best'", "csp, full"):
        policy("best")
    with refused(PolicyError, "cache='full'"):
        load(cache="full")


# memory


def test_no_memory_for_the_cache(scenes, monkeypatch):
    for kv_type in ("f32", "q4_0"):
        with load(cache=Full(), kv_type=kv_type, n_ctx=2_000_000_000) as vlm:
            with monkeypatch.context() as patch:
                patch.setattr(csp_edge.engine, "available_memory", lambda: 1_000_000)
                with refused(
                    MemoryLimitError, f"a {kv_type} cache of 1760 cells", "1 MiB are free"
                ):
                    vlm.chat(" red" * 1500, max_tokens=8192)
            assert vlm.chat(STAR, scenes[:2]).text == "blue"


def test_a_cache_that_fails_though_it_should_fit(scenes, monkeypatch):
    monkeypatch.setattr(csp_edge.engine, "available_memory", lambda: None)
    for cache in (Full(), CSP(0.2)):
        with load(cache=cache) as vlm:
            with monkeypatch.context() as patch:
                patch.setattr(csp_edge.native, "csp_resize", lambda *_: False)
                with refused(MemoryLimitError, "no cache of 1760 cells"):
                    vlm.chat(" red" * 1500)
            assert vlm.chat(STAR, scenes[:2]).text == "blue"
