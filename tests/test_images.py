import base64
import io
import struct
import threading
import urllib.parse
import warnings
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from csp_edge import images
from csp_edge.errors import ImageError
from csp_edge.images import Pictures, image_key, load_image

Pixels = npt.NDArray[np.uint8]


@pytest.fixture
def pixels() -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encode(image: Image.Image | Pixels, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(file, form, **options)
    return file.getvalue()


def png(width: int, height: int) -> bytes:
    """A PNG's header, without any pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    ) + end


def refuse(source: Any, match: str, **options: Any) -> None:
    with pytest.raises(ImageError, match=match) as error:
        load_image(source, **options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


def test_every_kind_of_source(tmp_path: Path, pixels: Pixels) -> None:
    file = encode(pixels)
    path = tmp_path / "a picture.png"
    path.write_bytes(file)
    uri = "data:image/png;base64," + base64.b64encode(file).decode()
    sources = [
        path,
        str(path),
        file,
        bytearray(file),
        memoryview(file),
        memoryview(file + file)[: len(file)],
        uri,
        uri.replace("=", ""),
        uri.replace("data:image/png", "DATA:image/PNG;charset=x"),
        uri[:60] + "\n " + uri[60:],
        "data:image/png," + urllib.parse.quote_from_bytes(file),
        Image.fromarray(pixels),
        Image.open(path),
        pixels,
        pixels[:, ::-1][:, ::-1],
        np.asfortranarray(pixels),
        pixels.astype(np.uint16) * 257,
        pixels / 255,
        (pixels / 255).astype(np.float32),
    ]
    for source in sources:
        loaded = load_image(source)
        assert loaded.dtype == np.uint8
        assert loaded.flags.c_contiguous
        assert loaded.flags.writeable
        np.testing.assert_array_equal(loaded, pixels)


def test_result_is_a_copy(pixels: Pixels) -> None:
    loaded = load_image(pixels)
    loaded[:] = 0
    assert pixels.any()


def test_grey_arrays(pixels: Pixels) -> None:
    grey = pixels[:, :, 0]
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(load_image(grey), expected)
    np.testing.assert_array_equal(load_image(grey[:, :, None]), expected)
    np.testing.assert_array_equal(load_image(grey > 127), (expected > 127) * np.uint8(255))


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_lossless_formats(form: str) -> None:
    blocks = np.kron([[0, 255], [255, 0]], np.ones((8, 8)))[:, :, None] * [1, 0, 1]
    expected = blocks.astype(np.uint8)
    options = {"lossless": True} if form == "WEBP" else {}
    np.testing.assert_array_equal(load_image(encode(expected, form, **options)), expected)


def test_exif_orientation(pixels: Pixels) -> None:
    turns = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels.transpose(1, 0, 2)[:, ::-1],
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: pixels.transpose(1, 0, 2)[::-1],
    }
    for orientation, expected in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for form in ("PNG", "TIFF"):
            np.testing.assert_array_equal(load_image(encode(pixels, form, exif=exif)), expected)


def test_broken_exif_is_ignored(pixels: Pixels) -> None:
    file = encode(pixels, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    np.testing.assert_array_equal(load_image(file), pixels)


def test_alpha_is_blended_over_white() -> None:
    colours = [(255, 0, 0, 255), (255, 0, 0, 128), (255, 0, 0, 0), (0, 0, 0, 0)]
    expected = [(255, 0, 0), (255, 127, 127), (255, 255, 255), (255, 255, 255)]
    rgba = np.array([colours], np.uint8)
    for source in (rgba, encode(rgba), encode(rgba, "WEBP", lossless=True), rgba / 255):
        np.testing.assert_allclose(load_image(source)[0], expected, atol=1)
    grey = Image.fromarray(np.array([[[0, 255], [0, 0]]], np.uint8), "LA")
    np.testing.assert_array_equal(load_image(grey)[0], [(0, 0, 0), (255, 255, 255)])


def test_palette() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    np.testing.assert_array_equal(load_image(encode(image))[0], colours)
    colours[1] = (255, 255, 255)
    np.testing.assert_array_equal(load_image(encode(image, transparency=1))[0], colours)
    np.testing.assert_array_equal(load_image(encode(image, "GIF", transparency=1))[0], colours)
    rgb = Image.fromarray(np.array([[(1, 2, 3), (4, 5, 6)]], np.uint8))
    np.testing.assert_array_equal(
        load_image(encode(rgb, transparency=(1, 2, 3)))[0], [(255, 255, 255), (4, 5, 6)]
    )


def test_16_bits() -> None:
    values = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    expected = np.repeat(np.array([[0, 0, 1, 128, 255]], np.uint8)[:, :, None], 3, axis=2)
    for source in (
        values,
        values.astype(">u2"),
        encode(Image.fromarray(values)),
        encode(Image.fromarray(values), "TIFF"),
        Image.fromarray(values),
        Image.fromarray(values.astype(np.int32)),
        b"P5 5 1 65535\n" + values.astype(">u2").tobytes(),
    ):
        np.testing.assert_array_equal(load_image(source), expected)


def test_float_tiff() -> None:
    values = np.array([[0, 0.5, 1]], np.float32)
    loaded = load_image(encode(Image.fromarray(values), "TIFF"))
    np.testing.assert_array_equal(loaded[0, :, 0], [0, 128, 255])
    refuse(encode(Image.fromarray(values * 3), "TIFF"), r"floats from 0 to 3, give them in \[0, 1")


def test_cmyk_jpeg() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (90, 160, 200)]
    for colour in colours:
        image = Image.new("RGB", (16, 16), colour).convert("CMYK")
        loaded = load_image(encode(image, "JPEG", quality=95))
        np.testing.assert_allclose(loaded, np.broadcast_to(colour, (16, 16, 3)), atol=4)


def test_one_bit() -> None:
    image = Image.fromarray(np.array([[True, False]]))
    np.testing.assert_array_equal(load_image(encode(image)), [[(255,) * 3, (0,) * 3]])


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green")]
    for form in ("GIF", "PNG", "WEBP"):
        file = encode(frames[0], form, save_all=True, append_images=frames[1:])
        np.testing.assert_allclose(load_image(file)[0, 0], (255, 0, 0), atol=2)


def test_unreadable_files(tmp_path: Path, pixels: Pixels) -> None:
    refuse(tmp_path / "none.png", r"picture '.*none\.png': no such file")
    refuse(str(tmp_path / "none.png"), "no such file")
    refuse(tmp_path, "a folder, give a picture file")
    refuse("a" * 5000, "picture 'a{60}...': File name too long")
    refuse("a\0b", "null")
    text = tmp_path / "notes\n.txt"
    text.write_text("not a picture")
    refuse(text, r"notes\\n\.txt': not a picture \(PNG, JPEG")
    text.write_bytes(b"")
    refuse(text, "not a picture")
    refuse(b"", "picture of 0 bytes: empty")
    refuse(b"nothing", "picture of 7 bytes: not a picture")
    refuse(Path("/dev/zero"), "not a regular file")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_truncated_and_damaged_files(form: str, pixels: Pixels) -> None:
    file = encode(pixels, form)
    for end in range(0, len(file) - 20, max(1, len(file) // 60)):
        refuse(file[:end], "not a picture|truncated or corrupt|empty")
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(file)
        damaged[rng.integers(len(file))] = rng.integers(256)
        try:
            assert load_image(bytes(damaged)).shape[2] == 3
        except ImageError as error:
            assert "\n" not in str(error)


def test_size_is_bounded_before_decoding(monkeypatch: pytest.MonkeyPatch, pixels: Pixels) -> None:
    def decode(*args: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with warnings.catch_warnings(record=True) as caught:
        refuse(png(10_000, 9_000), "10000 x 9000 is more than the limit of 67108864 pixels")
        refuse(png(10_000, 10_000), "10000 x 10000 is more than the limit")
        refuse(png(60_000, 60_000), "more than the limit")
        refuse(png(2**31 - 1, 2**31 - 1), "more than the limit")
        refuse(png(0, 5), "empty|not a picture")
        refuse(png(2000, 9), "2000 x 9 is longer than 200 : 1")
        refuse(encode(pixels), "30 x 20 is more than the limit of 599 pixels", max_pixels=599)
        refuse(pixels, "more than the limit of 599", max_pixels=599)
        refuse(Image.fromarray(pixels), "more than the limit of 599", max_pixels=599)
    assert not caught
    monkeypatch.undo()
    assert load_image(encode(pixels), max_pixels=600).shape == (20, 30, 3)


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((0, 5, 3), np.uint8), r"array of shape \(0, 5, 3\): empty"),
        (np.zeros((5, 0), np.uint8), "empty"),
        (np.zeros(5, np.uint8), r"array of shape \(5,\): give \[height, width\]"),
        (np.array(3, np.uint8), r"array of shape \(\): give"),
        (np.zeros((2, 5, 5, 3), np.uint8), "give"),
        (np.zeros((5, 5, 2), np.uint8), "give"),
        (np.zeros((3, 5, 5), np.uint8), "give"),
        (np.zeros((5, 5), np.int64), "of int64, give uint8"),
        (np.zeros((5, 5), np.complex64), "of complex64"),
        (np.full((5, 5), "x"), "of <U1"),
        (np.full((5, 5), 2.0), r"floats from 2 to 2, give them in \[0, 1\]"),
        (np.full((5, 5), -0.1), "floats from -0.1"),
        (np.full((5, 5), np.nan), "floats from nan"),
    ],
)
def test_unusable_arrays(array: Any, match: str) -> None:
    refuse(array, match)


def test_unusable_objects() -> None:
    refuse(None, "a NoneType is no picture")
    refuse([1, 2], "a list is no picture")
    refuse(Image.new("RGB", (0, 5)), "PIL image: empty")
    closed = Image.open(io.BytesIO(png(5, 5)))
    closed.close()
    refuse(closed, "PIL image: truncated or corrupt")


@pytest.mark.parametrize(
    ("uri", "match"),
    [
        ("data:", "not a data URI of a picture"),
        ("data:image/png;base64", "not a data URI of a picture"),
        ("data:text/plain;base64,AAAA", "not a data URI of a picture"),
        ("data:,hello", "not a data URI of a picture"),
        ("data:image/png;base64,A", "its base64 is broken"),
        ("data:image/png;base64,A!AA", "its base64 is broken"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64," + "A" * 10_000, r"picture 'data:image/png;base64,A+\.\.\.': not"),
        ("data:image/svg+xml,<svg/>", "not a picture"),
    ],
)
def test_broken_data_uris(uri: str, match: str) -> None:
    refuse(uri, match)


class Handler(BaseHTTPRequestHandler):
    picture = b""

    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", urllib.parse.unquote(self.path[4:]))
            self.end_headers()
        elif self.path == "/picture.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.picture)
        else:
            self.send_error(404)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, pixels: Pixels) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Handler, "picture", encode(pixels))
    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_urls(server: str, tmp_path: Path, pixels: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{server}/picture.png"
    np.testing.assert_array_equal(load_image(url, allow_url=True), pixels)
    np.testing.assert_array_equal(load_image(f"{server}/to/{url}", allow_url=True), pixels)
    refuse(url, "fetching URLs is off")
    with pytest.raises(ImageError, match="fetching URLs is off"):
        Pictures().open([url])
    # what was fetched is kept
    picture, other = Pictures(allow_url=True).open([url, pixels])
    monkeypatch.setattr(Handler, "picture", b"")
    for _ in range(2):
        np.testing.assert_array_equal(picture.pixels(), pixels)
    monkeypatch.setattr(Handler, "picture", encode(pixels))
    assert picture.key == other.key
    refuse(url.upper(), "fetching URLs is off")
    refuse(f"{server}/none", "the server answered 404", allow_url=True)
    path = tmp_path / "secret.png"
    path.write_bytes(encode(pixels))
    refuse(f"{server}/to/{path.as_uri()}", "the server answered 302", allow_url=True)
    refuse(f"{server}/to/ftp://localhost/x", "unknown url type: ftp", allow_url=True)
    refuse(path.as_uri(), "only http and https URLs", allow_url=True)
    refuse("ftp://localhost/x.png", "only http and https URLs", allow_url=True)
    refuse("http://", "can't be fetched", allow_url=True)
    refuse("http://127.0.0.1:1/x.png", "can't be fetched: .*refused", allow_url=True)
    refuse("http://a b/", "can't be fetched", allow_url=True)
    monkeypatch.setattr(images, "MAX_DOWNLOAD", 100)
    refuse(url, "more than the limit of 100 bytes", allow_url=True)
    monkeypatch.setattr(images, "MAX_DOWNLOAD", 10**6)
    monkeypatch.setattr(images, "DOWNLOAD_SECONDS", -1)
    refuse(url, "fetched", allow_url=True)


def test_image_key(pixels: Pixels) -> None:
    key = image_key(pixels)
    assert len(key) == 16
    assert key == image_key(np.asfortranarray(pixels)) == image_key(load_image(pixels))
    assert key != image_key(pixels.reshape(30, 20, 3))
    changed = pixels.copy()
    changed[-1, -1, -1] ^= 1
    assert key != image_key(changed)
