"""Saved conversations: the same logits, whatever happens to the process or to the file."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import tiny_models
from csp_edge import CSP, EdgeVLM, Full, SessionError
from csp_edge.cli import main
from csp_edge.errors import CspEdgeError
from csp_edge.policies import AdaKV, LookM, Policy
from csp_edge.session import Session, save_session

STAR = "What color is the star in image 2?"
SQUARE = {"role": "user", "content": "What color is the square in image 3?"}
START = struct.Struct("<8sIQ")


def small(**options):
    return EdgeVLM.demo(n_threads=1, **options)


def load(path, model=None, **options):
    return EdgeVLM.load(path, model, n_threads=1, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, scenes):
    """A conversation about four pictures over a pruned cache, and the model that holds it."""
    path = tmp_path_factory.mktemp("saved") / "talk.csp"
    with small(cache=CSP(0.2)) as vlm:
        vlm.chat(STAR, scenes[:4])
        vlm.save(path)
        yield path, vlm


# what comes back


def go_on(vlm):
    """The logits of some tokens and of a second question, which goes on from before them."""
    logits = []
    for token in (5, 9, 100):
        vlm.engine.decode(token)
        logits.append(vlm.engine.logits.copy())
    result = vlm.chat([*vlm.messages, SQUARE], max_tokens=3)
    return [*logits, vlm.engine.logits.copy()], result


def check_equal(first, second):
    (ours, result), (theirs, other) = first, second
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    assert result.text == other.text
    assert result.usage == other.usage


@pytest.mark.parametrize(
    "options",
    [
        {"cache": CSP(0.2)},
        {"cache": CSP(0.3, sink="mass"), "kv_type": "q4_0"},
        {"cache": CSP(64, sink=2.0), "kv_type": "q8_0", "n_ctx": 600},
        {"cache": AdaKV(0.2)},
        {"cache": LookM(0.2)},
        {"cache": Full(), "kv_type": "f32"},
        {"cache": CSP(200), "max_cells": 256},
        {"cache": CSP(0.2), "recall": True},
    ],
    ids=["pruned", "mass", "sink", "ragged", "merged", "full", "bounded", "recalled"],
)
def test_the_same_logits(options, scenes, tmp_path):
    with small(**options) as vlm:
        vlm.chat(STAR, scenes[:4])
        vlm.save(tmp_path / "talk.csp")
        with load(tmp_path / "talk.csp") as again:
            assert again.cache == vlm.cache
            assert again.engine.items == vlm.engine.items
            assert again.engine.n_cells == vlm.engine.n_cells
            check_equal(go_on(vlm), go_on(again))


FRESH = """
import hashlib, sys
sys.path.insert(0, "tests")
from test_session import go_on, load
vlm = load(sys.argv[1])
logits, result = go_on(vlm)
digests = [hashlib.sha256(row.tobytes()).hexdigest() for row in logits]
print(*digests, result.usage.cached_tokens, result.text, vlm.engine.encoder.n_encoded)
"""


def test_in_a_fresh_process_without_the_picture_files(scenes, tmp_path):
    pictures = [shutil.copy(scene, tmp_path) for scene in scenes[:4]]
    path = tmp_path / "talk.csp"
    with small(cache=CSP(0.2)) as vlm:
        vlm.chat(STAR, pictures)
        vlm.save(path)
        for picture in pictures:
            os.unlink(picture)
        done = subprocess.run(
            [sys.executable, "-c", FRESH, str(path)],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        logits, result = go_on(vlm)
        digests = [hashlib.sha256(row.tobytes()).hexdigest() for row in logits]
        assert done.stdout.split() == [
            *digests,
            str(result.usage.cached_tokens),
            result.text,
            "0",
        ]


def test_a_conversation_that_starts_anew_encodes_nothing_while_embeddings_are_there(saved, scenes):
    path, vlm = saved
    with load(path) as again:
        text = again.chat("What is in image 1?", scenes[:4]).text
        assert again.engine.encoder.n_encoded == 0
        # a picture comes from the file where its embedding does not
        again.engine.clear()
        again.engine.encoder.embeddings.clear()
        question = {"role": "user", "content": [*again.messages[0]["content"]]}
        question["content"][-1] = {"type": "text", "text": "What is in image 1?"}
        assert again.chat([question]).text == text
        assert again.engine.encoder.n_encoded == 4


def test_pictures_from_anywhere(scenes, tmp_path):
    from PIL import Image

    gone = shutil.copy(scenes[3], tmp_path)
    with Image.open(scenes[0]) as image:
        sources = [image.copy(), np.array(image), scenes[1].read_bytes(), gone]
    with small() as vlm:
        vlm.chat(STAR, sources)
        os.unlink(gone)
        vlm.save(tmp_path / "talk.csp")
        with load(tmp_path / "talk.csp") as again:
            messages = [*again.messages, SQUARE]
            assert again.chat(messages).text == vlm.chat([*vlm.messages, SQUARE]).text
            assert again.engine.encoder.n_encoded == 0
            again.engine.clear()
            again.engine.encoder.embeddings.clear()
            with pytest.raises(CspEdgeError, match="picture whose file is gone"):
                again.chat(messages)
            kept = [part for part in messages[0]["content"] if part["type"] == "image"][:3]
            again.chat([{"role": "user", "content": [*kept, {"type": "text", "text": STAR}]}])
            assert again.engine.encoder.n_encoded == 2  # the first two are one picture


def test_a_sliding_window(demo_paths, tmp_path):
    model = tmp_path / "gemma2.gguf"
    tiny_models.gemma2(model, demo_paths[0])
    with EdgeVLM(model, cache=CSP(0.25), n_threads=1) as vlm:
        vlm.chat(" red" * 200, max_tokens=40)
        vlm.save(tmp_path / "talk.csp")
        with load(tmp_path / "talk.csp") as again:
            check_equal(go_on(vlm), go_on(again))


def test_m_rope(demo_paths, tmp_path):
    model = tmp_path / "qwen2vl.gguf"
    tiny_models.qwen2vl(model, demo_paths[0])
    tiny_models.qwen2vl_projector(tmp_path / "mmproj.gguf")
    image = np.random.default_rng(0).integers(0, 255, (56, 84, 3), np.uint8)
    with EdgeVLM(model, cache=CSP(0.5), n_threads=1) as vlm:
        vlm.chat(" red" * 100, [image, image[::-1]], max_tokens=3)
        vlm.save(tmp_path / "talk.csp")
        with load(tmp_path / "talk.csp") as again:
            check_equal(go_on(vlm), go_on(again))


def test_queries_observed_before_prune_after(demo_paths, scenes, tmp_path):
    """What is not pruned yet is pruned as it would have been."""
    with small() as vlm, small() as again:
        engine = vlm.engine
        with vlm.tokenize([_message(STAR, scenes[:2])]) as prompt:
            engine.prefill(prompt, window=8)
        from csp_edge.session import save_session

        save_session(tmp_path / "talk.csp", engine, [], vlm.cache, vlm._settings)
        with Session(tmp_path / "talk.csp") as session:
            session.restore(again.engine, again.cache)
        ours = engine.prune(CSP(0.2), inspect=True)
        theirs = again.engine.prune(CSP(0.2), inspect=True)
        for a, b in zip(ours.layers, theirs.layers, strict=True):
            np.testing.assert_array_equal(a.cross[0], b.cross[0])
            for x, y in zip(a.kept, b.kept, strict=True):
                np.testing.assert_array_equal(x, y)


def _message(text, images):
    from csp_edge.template import Message, Picture, Text

    return Message("user", (*map(Picture, images), Text(text)))


def test_an_empty_conversation(tmp_path):
    with small() as vlm:
        vlm.save(tmp_path / "talk.csp")
        with load(tmp_path / "talk.csp") as again:
            assert again.messages == []
            assert again.chat("hello").text == vlm.chat("hello").text


def test_messages_follow_the_conversation(scenes):
    with small() as vlm:
        assert vlm.messages == []
        first = vlm.chat(STAR, scenes[:2])
        assert [message["role"] for message in vlm.messages] == ["user", "assistant"]
        assert vlm.messages[1]["content"] == [{"type": "text", "text": first.text}]
        again = vlm.chat([*vlm.messages, SQUARE])
        assert again.usage.cached_tokens >= first.usage.prompt_tokens
        with pytest.raises(CspEdgeError):
            vlm.chat("")
        assert len(vlm.messages) == 4
        vlm.reset()
        assert vlm.messages == []


@dataclass(frozen=True)
class Last(Policy):
    def select(self, layer):
        n = layer.token.shape[1]
        return [np.arange(n - layer.budget, n)] * len(layer.token)


def test_a_policy_of_ones_own_is_given_again(scenes, tmp_path):
    path = tmp_path / "talk.csp"
    with small(cache=Last(0.2)) as vlm:
        vlm.chat(STAR, scenes[:2])
        vlm.save(path)
        with pytest.raises(SessionError, match="policy of your own: give cache="):
            load(path)
        with load(path, cache=Last(0.2)) as again:
            check_equal(go_on(vlm), go_on(again))


def test_too_many_cells_for_a_smaller_n_ctx(scenes, tmp_path):
    with small(cache=Full()) as vlm:
        vlm.chat(STAR, scenes[:4])
        vlm.save(tmp_path / "talk.csp")
    with pytest.raises(SessionError, match=r"has 2\d\d cells, more than n_ctx=200: raise it"):
        load(tmp_path / "talk.csp", n_ctx=200)


def test_other_settings_may_be_given(saved):
    path, vlm = saved
    with load(path, n_ctx=512) as again:
        assert again.chat([*again.messages, SQUARE]).usage.cached_tokens > 256
    with load(path, cache=Full(), n_ctx=512) as again:
        assert again.cache == Full()
        assert again.engine.n_ctx_max == 512
        assert again.engine.n_cells == vlm.engine.n_cells


# what is refused


def test_a_memory_limit_is_kept(scenes, tmp_path):
    path = tmp_path / "talk.csp"
    with EdgeVLM.demo(memory="16GiB", n_threads=1) as vlm:
        vlm.chat("What is in image 1?", images=scenes[:2], max_tokens=4)
        max_cells = vlm.engine.max_cells
        vlm.save(path)
    for options in ({}, {"memory": "16GiB"}, {"kv_type": None}):
        with load(path, **options) as vlm:
            assert vlm.engine.max_cells == max_cells
            question = [*vlm.messages, {"role": "user", "content": "What is in image 2?"}]
            assert vlm.chat(question, max_tokens=4).usage.cached_tokens > 128
            assert vlm.engine.encoder.n_encoded == 0
    with load(path, max_cells=512) as vlm:
        assert vlm.engine.max_cells == 512
    with EdgeVLM.demo(max_cells=512, n_threads=1) as vlm:
        vlm.save(path)
    with load(path, memory="16GiB") as vlm:
        assert vlm.engine.max_cells == max_cells


def test_a_larger_budget_than_it_was_pruned_to(scenes, tmp_path):
    path = tmp_path / "talk.csp"
    with EdgeVLM.demo(cache=CSP(0.1), recall=True, n_threads=1) as vlm:
        vlm.chat("What is in image 1?", images=scenes, max_tokens=4)
        vlm.save(path)
    with load(path, cache=CSP(0.6)) as vlm:
        question = [*vlm.messages, {"role": "user", "content": "What is in image 2?"}]
        answer = vlm.chat(question, max_tokens=8)
        assert answer.cache.cells_after == int(0.6 * answer.usage.prompt_tokens)


def test_another_model_projector_or_kv_type(saved, demo_paths, tmp_path):
    path, _ = saved
    model, mmproj = (Path(shutil.copy(each, tmp_path)) for each in demo_paths)
    with load(path, model) as again:
        assert again.engine.info.path == model
        assert again.engine.info.projector.path == mmproj
    with pytest.raises(SessionError, match="kv_type='f16', not 'q8_0'"):
        load(path, kv_type="q8_0")
    with pytest.raises(SessionError, match="damaged: type of the evicted cells"):
        load(path, recall=True)
    for file, what in ((mmproj, "mmproj"), (model, "model")):
        data = bytearray(file.read_bytes())
        data[-1000] ^= 1
        file.write_bytes(data)
        with pytest.raises(SessionError, match=f"saved with another {what} than"):
            load(path, model)
    with pytest.raises(SessionError, match="saved with another mmproj than"):
        load(path, mmproj=mmproj)
    mmproj.unlink()
    with pytest.raises(SessionError, match="saved with another model than"):
        load(path, model)


def test_a_model_that_has_moved(demo_paths, scenes, tmp_path):
    (tmp_path / "here").mkdir()
    for each in demo_paths:
        shutil.copy(each, tmp_path / "here")
    path = tmp_path / "talk.csp"
    with EdgeVLM(tmp_path / "here", n_threads=1) as vlm:
        vlm.chat(STAR, scenes[:2])
        vlm.save(path)
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(SessionError, match=r"there is no file .*/here/.*: give model="):
        load(path)
    with load(path, tmp_path / "there") as again:
        assert len(again.messages) == 2
    (tmp_path / "there" / demo_paths[1].name).unlink()
    with pytest.raises(SessionError, match="give mmproj="):
        load(path, tmp_path / "there")


def test_another_version(saved, tmp_path):
    data = bytearray(saved[0].read_bytes())
    struct.pack_into("<I", data, 8, 1)
    (tmp_path / "talk.csp").write_bytes(data)
    with pytest.raises(SessionError, match="a session of version 1, this csp-edge reads 3"):
        load(tmp_path / "talk.csp")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.write_bytes(b""), "not a saved session"),
        (lambda path: path.write_bytes(b"GGUF" * 100), "not a saved session"),
        (lambda path: path.write_bytes(b"CSPEDGE\n\1"), "damaged: it is cut off"),
    ],
)
def test_files_that_are_none(make, message, tmp_path):
    make(tmp_path / "talk.csp")
    with pytest.raises(SessionError, match=message):
        load(tmp_path / "talk.csp")


def test_no_byte_may_be_wrong(saved, tmp_path):
    data = saved[0].read_bytes()
    path = tmp_path / "talk.csp"
    places = np.random.default_rng(0).integers(0, len(data), 150).tolist()
    for i in [*range(START.size), *places, len(data) - 1]:
        wrong = bytearray(data)
        wrong[i] ^= 1 << i % 8
        path.write_bytes(wrong)
        with pytest.raises(SessionError):
            Session(path)
    for n in [*range(0, START.size, 3), *places[:50], len(data) - 1]:
        path.write_bytes(data[:n])
        with pytest.raises(SessionError):
            Session(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(SessionError):
        Session(path)


# forged files: the checksum is right, and the content is not


def parts(data):
    """The head of a session's bytes, and what follows it."""
    _, _, n = START.unpack_from(data)
    return json.loads(data[START.size : START.size + n]), data[START.size + n : -32]


def joined(head, rest):
    text = json.dumps(head).encode()
    data = START.pack(b"CSPEDGE\n", 1, len(text)) + text + rest
    return data + hashlib.sha256(data).digest()


def walk(value, path=()):
    """Every place in JSON; of a long list the first and the last three."""
    yield path
    if isinstance(value, dict):
        for key, each in value.items():
            yield from walk(each, (*path, key))
    if isinstance(value, list):
        for i in {0, 1, *range(len(value) - 3, len(value))} & {*range(len(value))}:
            yield from walk(value[i], (*path, i))


def replaced(value, path, new):
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def heads(head):
    for path in walk(head):
        for new in (None, -1, 0, 2**40, 1e300, "x", [], {}, [[[]]]):
            yield replaced(head, path, new)
        if path:
            *front, last = path
            within = head
            for key in front:
                within = within[key]
            less = within.copy()
            del less[last]
            yield replaced(head, tuple(front), less)


FORGED = """
import sys
sys.path.insert(0, "tests")
import test_session
getattr(test_session, sys.argv[1])(*sys.argv[2:])
"""


def in_a_process(function, *args):
    """A crash there is a test that fails here, and not the end of all."""
    done = subprocess.run(
        [sys.executable, "-c", FORGED, function, *map(str, args)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        # freed and new memory is full of garbage
        env={**os.environ, "MALLOC_PERTURB_": "165", "MALLOC_CHECK_": "3"},
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_a_forged_head_is_refused_or_harmless(saved, tmp_path):
    n_all, n_refused = map(int, in_a_process("forge_heads", saved[0], tmp_path / "t.csp").split())
    assert n_refused > n_all // 2


def forge_heads(source, path):
    path = Path(path)
    head, rest = parts(Path(source).read_bytes())
    # a third of them: with another value in each place
    forgeries = list(heads(head))[::3]
    n_refused = 0
    with small(cache=CSP(0.2)) as vlm:
        for forged in forgeries:
            path.write_bytes(joined(forged, rest))
            vlm.reset()
            try:
                with Session(path) as session:
                    session.options(None, {})
                    messages = session.restore(vlm.engine, vlm.cache)
                    messages = [message.as_dict() for message in messages]
                vlm.engine.decode(5)
                vlm.chat([*messages, SQUARE], max_tokens=2)
            except CspEdgeError:
                n_refused += 1
    print(len(forgeries), n_refused)


@pytest.mark.parametrize("kind", ["ragged", "bounded"])
def test_a_forged_cache_is_refused_or_harmless(kind, scenes, tmp_path):
    n_all, n_refused = map(int, in_a_process("forge_caches", kind, tmp_path).split())
    assert n_refused > n_all // 8


def forge_caches(kind, folder):
    """A cache with one 32-bit word wrong, or cut off, at work."""
    scenes = sorted((Path(__file__).parents[1] / "csp_edge" / "pictures").glob("scene*.png"))
    options = {
        "ragged": {"cache": AdaKV(0.2), "recall": True},
        "bounded": {"cache": CSP(100, sink="mass"), "max_cells": 256},
    }[kind]
    source, path = Path(folder, "source.csp"), Path(folder, "talk.csp")
    rng = np.random.default_rng(0)
    n_all = n_refused = 0
    with small(**options) as vlm:
        vlm.chat(STAR, scenes[:2])
        vlm.save(source)
        head, rest = parts(source.read_bytes())
        start = 4 * vlm.engine.encoder.n_embd * sum(n for *_, n in head["embeddings"])
        start += sum(n for *_, n in head["pictures"])
        words = (len(rest) - start) // 4
        # the first ones are what all else depends on
        places = [*range(30), *rng.integers(30, min(words, 4000), 40), *rng.integers(0, words, 10)]
        for i in map(int, places):
            forged = bytearray(rest)
            old = struct.unpack_from("<I", forged, start + 4 * i)[0]
            new = rng.choice([0, 1, old + 1, old - 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 65536])
            struct.pack_into("<I", forged, start + 4 * i, int(new) % 2**32)
            if i % 5 == 4:
                del forged[start + 4 * i :]
            path.write_bytes(joined(head, bytes(forged)))
            n_all += 1
            try:
                with Session(path) as session:
                    messages = session.restore(vlm.engine, vlm.cache)
                    messages = [message.as_dict() for message in messages]
                vlm.engine.observe(4)
                for token in (5, 9, 100):
                    vlm.engine.decode(token)
                vlm.engine.prune(CSP(0.1))
                vlm.engine.decode(7)
                vlm.chat([*messages, SQUARE], max_tokens=2)
            except CspEdgeError:
                n_refused += 1
        # none of them leaves anything behind
        with Session(source) as session:
            messages = [m.as_dict() for m in session.restore(vlm.engine, vlm.cache)]
        vlm.chat([*messages, SQUARE])
    print(n_all, n_refused)


# writing


def test_a_file_that_cant_be_written(saved, tmp_path):
    _, vlm = saved
    for path, message in (
        (tmp_path / "none" / "talk.csp", "No such file"),
        (tmp_path, "directory"),
        ("/dev/full/talk.csp", "Not a directory"),
        ("a\0b", "null"),
    ):
        with pytest.raises(SessionError, match=message):
            vlm.save(path)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(saved, tmp_path, monkeypatch):
    source, vlm = saved
    path = tmp_path / "talk.csp"
    shutil.copy(source, path)
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SessionError, match="No space left"):
        vlm.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file(saved, tmp_path, monkeypatch):
    from csp_edge import hook

    source, vlm = saved
    path = tmp_path / "talk.csp"
    shutil.copy(source, path)
    before = path.read_bytes()
    stream = hook._stream

    def interrupted(take, failures):
        def once(part):
            raise KeyboardInterrupt

        return stream(once, failures)

    monkeypatch.setattr(hook, "_stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vlm.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_devices_and_pipes_stay_what_they_are(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with small() as vlm, pytest.raises(SessionError, match="not a regular file"):
        vlm.save(path)
    assert path.is_fifo()


def test_settings_as_they_come(tmp_path):
    path = tmp_path / "talk.csp"
    with small(n_ctx=np.int64(2048), recall=None) as vlm:
        vlm.save(path)
    with load(path) as vlm:
        assert vlm.engine.n_ctx_max == 2048


def test_a_link_stays_a_link(saved, tmp_path):
    _, vlm = saved
    (tmp_path / "link.csp").symlink_to("talk.csp")
    vlm.save(tmp_path / "link.csp")
    assert (tmp_path / "link.csp").is_symlink()
    Session(tmp_path / "talk.csp").__exit__(None, None, None)


def test_killed_at_any_moment_the_old_file_or_the_new_one_is_there(tmp_path):
    n_whole, n_left = map(int, in_a_process("kill_savers", tmp_path).split())
    assert n_whole == 20
    assert n_left > 5  # files that were being written


def kill_savers(folder):
    """Processes that save two conversations in turn, killed at random moments."""
    import random
    import signal
    import time

    scenes = sorted((Path(__file__).parents[1] / "csp_edge" / "pictures").glob("scene*.png"))
    path = Path(folder, "talk.csp")
    random.seed(0)
    n_whole = 0
    with small() as one, small(cache=Full()) as two:
        one.chat(STAR, scenes[:1])
        two.chat(STAR, scenes[:4])
        one.save(path)
        for _ in range(20):
            child = os.fork()
            while not child:
                for vlm in two, one:
                    save_session(path, vlm.engine, vlm._messages, vlm.cache, vlm._settings)
            time.sleep(random.uniform(0.005, 0.05))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            with Session(path) as session:
                n_whole += len(session._head["pictures"]) in (1, 4)
        with load(path) as again:
            assert again.chat([*again.messages, SQUARE]).usage.cached_tokens > 0
    print(n_whole, len(list(Path(folder).glob(".talk.csp.*.tmp"))))


# the command line


def test_chat_goes_on_from_a_file(scenes, tmp_path, capsys):
    path = str(tmp_path / "talk.csp")
    threads = ["--threads", "1"]
    pictures = ["-i", str(scenes[0]), "-i", str(scenes[1])]
    assert main(["chat", "--session", path, "--budget", "64", *threads, *pictures, STAR]) == 0
    assert capsys.readouterr().out == "blue\n"
    assert main(["chat", "--session", path, *threads, "--json", "What is in image 2?"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["cache"]["budget"] == 64
    assert said["usage"]["cached_tokens"] > 128
    assert said["usage"]["image_tokens"] == 128
    with load(path) as vlm:
        assert len(vlm.messages) == 4
    assert main(["chat", "--session", path, "--kv-type", "q8_0", "a"]) == 1
    assert "saved with kv_type='f16', not 'q8_0'" in capsys.readouterr().err


def test_nothing_bounded_where_nothing_is_pruned(tmp_path):
    path = tmp_path / "talk.csp"
    with small(max_cells=512) as vlm:
        vlm.save(path)
    with load(path, cache=Full()) as vlm:
        assert vlm.engine.max_cells is None
