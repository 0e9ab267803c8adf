"""Pictures in prompts: laid out by their sizes, loaded one by one, encoded as they are decoded."""

import ctypes
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import csp_edge.engine
import tiny_models
from csp_edge import EdgeVLM, Full, images
from csp_edge.engine import Engine
from csp_edge.errors import ImageError
from csp_edge.images import Picture, Pictures, image_key
from csp_edge.native import mtmd
from csp_edge.tokenizer import _POSITIONAL, Patches
from small_gguf import MMPROJ, MODEL, copy

SOURCE = Path(__file__).parents[1] / "build/patched/source/tools/mtmd/mtmd.cpp"
STAR = "What color is the star in image 2?"


def noise(*size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.fixture
def files(tmp_path):
    """Two pictures of 96 x 96."""
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        Image.fromarray(noise(96, 96, seed=i)).save(path)
    return paths


@pytest.fixture(scope="module", params=["mlp", "tiles", "qwen2vl", "hunyuanvl"])
def engine(request, tmp_path_factory):
    """One size of picture; tiles; rows and columns (M-RoPE); and pictures that are counted."""
    folder = tmp_path_factory.mktemp("engine")
    model, mmproj = MODEL, MMPROJ
    if request.param == "tiles":
        pinpoints = [192, 96, 96, 192, 192, 192]
        mmproj = copy(MMPROJ, folder / "mmproj.gguf", clip__vision__image_grid_pinpoints=pinpoints)
    elif request.param != "mlp":
        model, mmproj = folder / "model.gguf", folder / "mmproj.gguf"
        tiny_models.qwen2vl(model, MODEL)
        getattr(tiny_models, f"{request.param}_projector")(mmproj)
    engine = Engine(model, mmproj, n_threads=1)
    yield engine
    engine.close()


def tokenize(engine, *parts):
    """A prompt of texts and arrays."""
    pictures = iter(Pictures().open([part for part in parts if not isinstance(part, str)]))
    return engine.tokenizer.tokenize(
        [part if isinstance(part, str) else next(pictures) for part in parts]
    )


# what mtmd makes of the whole prompt, pixels and all


class Whole:
    def __init__(self, projector, parts):
        self.projector = projector
        self.texts, self.bitmaps, inputs = [], [], []
        for part in parts:
            if isinstance(part, str):
                text = mtmd.mtmd_input_text(part.encode(), len(part), False, True)
                self.texts.append(text)
                inputs.append(mtmd.mtmd_input_part(ctypes.pointer(text), None))
            else:
                height, width, _ = part.shape
                data = part.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
                self.bitmaps.append(mtmd.mtmd_bitmap_init(width, height, data))
                inputs.append(mtmd.mtmd_input_part(None, self.bitmaps[-1]))
        pointers = (ctypes.POINTER(mtmd.mtmd_input_part) * len(inputs))(
            *map(ctypes.pointer, inputs)
        )
        self.chunks = mtmd.mtmd_input_chunks_init()
        assert not mtmd.mtmd_tokenize_from_parts(
            projector, self.chunks, pointers, len(inputs), False
        )

    def items(self):
        """Tokens, and picture chunks."""
        for i in range(mtmd.mtmd_input_chunks_size(self.chunks)):
            chunk = mtmd.mtmd_input_chunks_get(self.chunks, i)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                n = ctypes.c_size_t()
                tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, n)
                yield from tokens[: n.value]
            else:
                yield ctypes.c_void_p(chunk)

    def close(self):
        for bitmap in self.bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)
        mtmd.mtmd_input_chunks_free(self.chunks)


def positions(chunk):
    """Of a chunk at position 7: [n_tokens, 4], and how far it goes."""
    tokens = mtmd.mtmd_input_chunk_get_tokens_image(chunk)
    n = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
    each = [mtmd.mtmd_image_tokens_get_decoder_pos(tokens, 7, i) for i in range(n)]
    return [(p.t, p.x, p.y, p.z) for p in each], mtmd.mtmd_input_chunk_get_n_pos(chunk)


def embedding(engine, chunk, n_tokens):
    assert not mtmd.mtmd_encode_chunk(engine.encoder.handle, chunk)
    pointer = mtmd.mtmd_get_output_embd(engine.encoder.handle)
    return np.ctypeslib.as_array(pointer, (n_tokens, engine.encoder.n_embd)).copy()


def test_a_prompt_is_as_of_all_pixels_at_once(engine):
    large, small = noise(150, 64), noise(64, 80, seed=1)
    parts = ["Look:", large, "x", small, large, " and", small, "?"]
    whole = Whole(engine.encoder.handle, parts)
    with tokenize(engine, *parts) as prompt:
        expected = list(whole.items())
        n_bos = len(prompt.items) - len(expected)
        assert n_bos in (0, 1)
        for i, (item, other) in enumerate(zip(prompt.items[n_bos:], expected, strict=True), n_bos):
            if not isinstance(item, Patches):
                assert item == other
                continue
            chunk = prompt.placeholder(i)
            assert positions(chunk) == positions(other)
            assert item.n_tokens == mtmd.mtmd_input_chunk_get_n_tokens(other)
            np.testing.assert_array_equal(
                embedding(engine, prompt.with_pixels(i), item.n_tokens),
                embedding(engine, other, item.n_tokens),
            )
            assert mtmd.mtmd_encode_chunk(engine.encoder.handle, chunk)  # it holds no pixels
        pictures = [item for item in prompt.items if isinstance(item, Patches)]
    whole.close()
    assert sorted({item.picture for item in pictures}) == [0, 1, 2, 3]
    for before, item in pairwise(pictures):
        same = before.picture == item.picture
        assert item.picture - before.picture == (not same)
        assert item.tile == (before.tile + 1 if same else 0)
    keys = [next(item.key for item in pictures if item.picture == i) for i in range(4)]
    assert keys == [image_key(p) for p in (large, small, large, small)]


def test_placeholders_decode_as_the_chunks_do(engine, monkeypatch):
    logits = []
    for _ in range(2):
        engine.clear()
        with tokenize(engine, "Look:", noise(150, 64), "x", noise(64, 80, seed=1), "?") as prompt:
            engine.prefill(prompt)
        logits.append(engine.logits.copy())
        monkeypatch.setattr(type(prompt), "placeholder", type(prompt).with_pixels)
    np.testing.assert_array_equal(*logits)


def test_a_picture_of_tiles_is_loaded_once_for_all(engine, monkeypatch):
    loads = []
    load = Picture.pixels
    monkeypatch.setattr(Picture, "pixels", lambda self: loads.append(self.key) or load(self))
    engine.clear()
    pictures = noise(150, 64, seed=5), noise(64, 80, seed=6)
    with tokenize(engine, "a", pictures[0], "b", pictures[1], "c") as prompt:
        n_tiles = sum(isinstance(item, Patches) for item in prompt.items)
        assert not loads
        assert engine.prefill(prompt).n_encoded == n_tiles
        assert loads == [image_key(picture) for picture in pictures]


def test_what_depends_on_the_place_in_the_prompt():
    """Beside these projectors, mtmd lays a picture out alone as it does in a prompt."""
    body = SOURCE.read_text().split("int32_t add_media(")[1].split("handle audio")[0]
    kinds = {kind.lower() for kind in re.findall(r"PROJECTOR_TYPE_(\w+)", body)}
    assert kinds == _POSITIONAL


def test_chunks_that_come_out_otherwise_are_refused(engine):
    if engine.info.projector.type == "mlp" and engine.info.projector.tokens_per_picture:
        pytest.skip("it lays out all pictures alike")
    pixels = noise(50, 50)
    picture = Picture("picture", pixels, image_key(pixels), 192, 192)
    engine.clear()
    with (
        engine.tokenizer.tokenize(["a", picture, "b"]) as prompt,
        pytest.raises(ImageError, match="picture 1: with pixels it has other tiles"),
    ):
        engine.prefill(prompt)


# order and memory


def test_each_picture_is_encoded_right_before_it_is_decoded(monkeypatch, files):
    calls = []
    for name in ("mtmd_encode_chunk", "mtmd_helper_decode_image_chunk"):
        call = getattr(mtmd, name)
        monkeypatch.setattr(
            csp_edge.engine.mtmd,
            name,
            lambda *args, name=name, call=call: calls.append(name.split("_")[-2]) or call(*args),
        )
    with EdgeVLM.demo(n_threads=1, cache=Full()) as vlm:
        result = vlm.chat(STAR, [*files, files[0]], max_tokens=1)
    assert calls == ["encode", "image", "encode", "image", "image"]
    assert 0 < result.timings.encode_s < result.timings.first_token_s


_PEAK = """
import sys
from csp_edge import EdgeVLM, Full

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

with EdgeVLM.demo(n_threads=1, cache=Full(), n_ctx=2048) as vlm:
    vlm.chat("What is this?", sys.argv[1:3], max_tokens=1)
    before = peak()
    vlm.chat("What is this?", sys.argv[1:], max_tokens=1)
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_pictures(tmp_path):
    paths = []
    for i in range(20):
        paths.append(tmp_path / f"{i}.bmp")
        Image.fromarray(np.full((1024, 1024, 3), i * 10, np.uint8)).save(paths[-1])
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *paths], capture_output=True, text=True, check=True
    )
    # of pixels there are 60 MiB
    assert float(done.stdout) < 20


# files


def test_a_conversation_decodes_no_picture_again(files, monkeypatch):
    decoded = []
    decode = images._decode
    monkeypatch.setattr(
        images, "_decode", lambda name, *rest: decoded.append(name) or decode(name, *rest)
    )
    with EdgeVLM.demo(n_threads=1, cache=Full()) as vlm:
        vlm.chat("What is in image 1?", [files[0]], max_tokens=1)
        assert len(decoded) == 1  # for its key and for the encoder
        vlm.chat("What is in image 2?", [files[0]], max_tokens=1)
        assert len(decoded) == 1
        vlm.chat("What is in image 2?", files, max_tokens=1)
        assert len(decoded) == 2
        # the embedding is gone, not what the file holds
        vlm.reset()
        vlm.engine.encoder.embeddings.clear()
        vlm.chat("What is in image 2?", files, max_tokens=1)
        assert len(decoded) == 4


def test_pictures_are_the_same_by_pixels_not_by_files(files, tmp_path):
    pixels = np.asarray(Image.open(files[0]))
    Image.open(files[0]).save(tmp_path / "same.bmp")
    pictures = Pictures().open([files[0], tmp_path / "same.bmp", files[1], pixels, files[0]])
    keys = [picture.key for picture in pictures]
    assert keys[0] == keys[1] == keys[3] == keys[4] == image_key(pixels) != keys[2]
    for picture in (pictures[0], pictures[1], pictures[3], pictures[4]):
        np.testing.assert_array_equal(picture.pixels(), pixels)


def test_the_size_is_of_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(20, 30)).save(tmp_path / "turned.png", exif=exif)
    pictures = Pictures()
    for _ in range(2):  # decoded, and known
        (picture,) = pictures.open([tmp_path / "turned.png"])
        assert (picture.width, picture.height) == (20, 30)
        assert picture.pixels().shape == (30, 20, 3)


def test_only_one_picture_holds_its_pixels(files):
    pictures = Pictures().open([*files, noise(9, 9), noise(8, 8)])
    assert [picture._held is not None for picture in pictures] == [True, False, False, False]
    pictures[0].pixels()
    assert pictures[0]._held is None


def test_known_files_are_few_and_short(files, monkeypatch):
    pictures = Pictures()
    monkeypatch.setattr(images, "_N_KNOWN", 1)
    pictures.open(files)
    assert len(pictures._known) == 1
    monkeypatch.setattr(images, "_KNOWN_BYTES", 100)
    pictures = Pictures()
    (picture,) = pictures.open(files[:1])
    assert not pictures._known
    assert picture.key == image_key(np.asarray(Image.open(files[0])))


def test_a_file_that_changes_while_it_is_in_use(files):
    def meddle(stage, done, total):
        if stage == "encode" and done == 0:
            change()

    def rewrite():
        Image.fromarray(noise(96, 96, seed=9)).save(files[1])

    with EdgeVLM.demo(n_threads=1, cache=Full(), progress=meddle) as vlm:
        for change, message in (
            (rewrite, "1.png': has changed since it was opened, send it again"),
            (lambda: os.truncate(files[1], 50), "1.png': .*corrupt|1.png': not a picture"),
            (lambda: files[1].unlink(missing_ok=True), "1.png': no such file"),
        ):
            Image.fromarray(noise(96, 96, seed=1)).save(files[1])
            with pytest.raises(ImageError, match=message):
                vlm.chat(STAR, files, max_tokens=1)
            change = bool  # no more
            assert vlm.chat("hello", files[:1], max_tokens=1).usage.prompt_tokens
