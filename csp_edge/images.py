"""Pictures from wherever they come, as RGB arrays."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import http.client
import importlib
import io
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from csp_edge.errors import ImageError

MAX_PIXELS = 64 * 1024**2
# longer ones come out of the encoders' resizing without a single row
MAX_ASPECT = 200
MAX_DOWNLOAD = 64 * 1024**2  # bytes
DOWNLOAD_SECONDS = 60.0

_KNOWN_BYTES = 64 * 1024**2  # longer files are decoded each time
_N_KNOWN = 4096

# only decoders that check the size in the header and start no other programs, with their modules in
# Pillow: importing all of them, and the rest, takes longer than opening a picture
FORMATS = {
    "PNG": "Png",
    "JPEG": "Jpeg",
    "WEBP": "WebP",
    "GIF": "Gif",
    "BMP": "Bmp",
    "TIFF": "Tiff",
    "PPM": "Ppm",
    "AVIF": "Avif",
    "JPEG2000": "Jpeg2K",
}


def load_image(
    source: Source, *, max_pixels: int = MAX_PIXELS, allow_url: bool = False
) -> npt.NDArray[np.uint8]:
    """A picture as uint8 [height, width, 3], RGB, C-contiguous.

    Turned upright by its EXIF orientation, blended over white where it is transparent, 16 bits
    scaled to 8; of an animation the first frame.

    Args:
        source: a path, an http(s) URL, a data URI, an encoded file's bytes, a PIL image, or an
            array: [height, width] or [height, width, 1, 3 or 4], of uint8, uint16, bool, or
            floats in [0, 1].
        max_pixels: refuse larger pictures, before they are decoded.
        allow_url: fetch http(s) URLs.

    Raises:
        ImageError: it can't be read, is empty, too large or too narrow, or is a URL not allowed.
    """
    return _load(_name(source), source, max_pixels, allow_url)


def image_key(pixels: npt.NDArray[np.uint8]) -> bytes:
    """16 bytes that name a picture by its content: equal for equal pixels and shape."""
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


class Picture:
    """A picture that is known by its pixels, and loads them when they are asked for.

    Attributes:
        key: 16 bytes, see image_key.
        width, height: of the upright picture, in pixels.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        key: bytes,
        width: int,
        height: int,
        digest: bytes = b"",
    ) -> None:
        self.key = key
        self.width = width
        self.height = height
        self._name = name
        self._source = source
        self._digest = digest  # of the file
        self._held: npt.NDArray[np.uint8] | None = None

    def __repr__(self) -> str:
        return f"<{self._name}, {self.width} x {self.height}>"

    def hold(self, pixels: npt.NDArray[np.uint8] | None) -> None:
        """Have these pixels ready for the next pixels()."""
        self._held = pixels

    def file(self) -> bytes:
        """The encoded file that the pixels come from, or a PNG of them.

        Raises:
            ImageError: it can't be read any more, is very large, or is another file now.
        """
        if isinstance(self._source, (np.ndarray, Image.Image)):
            file = io.BytesIO()
            Image.fromarray(self.pixels()).save(file, "PNG")
            self._source = file.getvalue()
            self._digest = _digest(self._source)
        data = _file(self._name, self._source, allow_url=False)
        if isinstance(data, Path):
            data = _read(self._name, data)
        if isinstance(data, Path) or _digest(data) != self._digest:
            raise ImageError(f"{self._name}: too large, or changed since it was opened")
        return data

    def pixels(self) -> npt.NDArray[np.uint8]:
        """uint8 [height, width, 3], RGB, C-contiguous.

        Raises:
            ImageError: it can't be read any more, or is another picture now.
        """
        pixels, self._held = self._held, None
        if pixels is None:
            pixels = _load(self._name, self._source)
            if image_key(pixels) != self.key:
                raise ImageError(f"{self._name}: has changed since it was opened, send it again")
        return pixels


Source: TypeAlias = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | Image.Image
    | npt.NDArray[Any]
    | Picture
)


def remembered(key: bytes, width: int, height: int, data: bytes) -> Picture:
    """A picture that was opened before, from its file's bytes. Empty: only its key is left.

    Raises:
        ImageError: the size is none that a picture has.
    """
    name = f"picture of {len(data)} bytes" if data else "picture whose file is gone"
    _check_size(name, (width, height), MAX_PIXELS)
    return Picture(name, data, key, width, height, _digest(data))


class Pictures:
    """Opens pictures, and knows files again by their bytes, without decoding them.

    Args:
        allow_url: fetch http(s) URLs. Of these the encoded file stays in memory.
    """

    def __init__(self, *, allow_url: bool = False) -> None:
        self._allow_url = allow_url
        self._known: OrderedDict[bytes, tuple[bytes, int, int]] = OrderedDict()

    def open(self, sources: Iterable[Source]) -> list[Picture]:
        """Pictures from all that load_image takes, one after the other.

        One of those that had to be decoded holds its pixels, so that a single new one is not
        decoded twice. The first: it is the first to be encoded.

        Raises:
            ImageError: as load_image.
        """
        pictures = []
        is_held = False
        for source in sources:
            if isinstance(source, Picture):
                pictures.append(source)
                continue
            picture, pixels = self._open(_name(source), source)
            if pixels is not None and not is_held:
                picture.hold(pixels)
                is_held = True
            del pixels
            pictures.append(picture)
        return pictures

    def _open(self, name: str, source: Source) -> tuple[Picture, npt.NDArray[np.uint8] | None]:
        data: Source = source
        if not isinstance(source, (np.ndarray, Image.Image)):
            data = _file(name, source, self._allow_url)
            if _is_url(source):
                source = data
            if isinstance(data, Path):
                data = _read(name, data)
        digest = _digest(data) if isinstance(data, bytes) else b""
        if digest in self._known:
            return Picture(name, source, *self._known[digest], digest), None
        pixels = _load(name, data)
        height, width, _ = pixels.shape
        picture = Picture(name, source, image_key(pixels), width, height, digest)
        if digest:
            self._known[digest] = picture.key, width, height
            if len(self._known) > _N_KNOWN:
                self._known.popitem(last=False)
        return picture, pixels


def _load(
    name: str, source: Source, max_pixels: int = MAX_PIXELS, allow_url: bool = False
) -> npt.NDArray[np.uint8]:
    if isinstance(source, Picture):
        return source.pixels()
    if isinstance(source, np.ndarray):
        if source.ndim >= 2:
            _check_size(name, source.shape[1::-1], max_pixels)
        return _rgb(name, _from_array(name, source))
    with warnings.catch_warnings():
        # about large pictures, which are refused, and broken metadata, which is skipped
        warnings.filterwarnings("ignore", module=r"PIL\.")
        if isinstance(source, Image.Image):
            return _decode(name, source, max_pixels)
        with _open(name, _file(name, source, allow_url), max_pixels) as image:
            return _decode(name, image, max_pixels)


def _name(source: object) -> str:
    match source:
        case str() | os.PathLike():
            text = os.fspath(source)
            return f"picture {text if len(text) <= 100 else text[:60] + '...'!r}"
        case bytes() | bytearray() | memoryview():
            return f"picture of {memoryview(source).nbytes} bytes"
        case Image.Image():
            return "PIL image"
        case np.ndarray():
            return f"array of shape {source.shape}"
        case Picture():
            return source._name
    raise ImageError(f"a {type(source).__name__} is no picture: give a path, bytes, image or array")


def _file(name: str, source: object, allow_url: bool) -> Path | bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif isinstance(source, str) and source[:5].lower() == "data:":
        data = _from_data_uri(name, source)
    elif isinstance(source, str) and _is_url(source):
        if not allow_url:
            raise ImageError(f"{name}: fetching URLs is off; allow it, or give the file itself")
        data = _download(name, source)
    elif isinstance(source, str) and re.match(r"\w+://", source):
        raise ImageError(f"{name}: only http and https URLs are fetched; give files as paths")
    else:
        return _path(name, source)
    if not data:
        raise ImageError(f"{name}: empty")
    return data


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data).digest()


def _is_url(source: object) -> bool:
    return isinstance(source, str) and bool(re.match(r"https?://", source, re.IGNORECASE))


def _read(name: str, path: Path) -> Path | bytes:
    try:
        return path.read_bytes() if path.stat().st_size <= _KNOWN_BYTES else path
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror}") from None


def _path(name: str, source: Any) -> Path:
    path = Path(source)
    try:
        path.stat()
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{name}: {getattr(error, 'strerror', error)}") from None
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise ImageError(f"{name}: {kind}, give a picture file")
    return path


def _from_data_uri(name: str, uri: str) -> bytes:
    head, comma, body = uri[5:].partition(",")
    media_type, *parameters = head.lower().split(";")
    if not comma or not media_type.strip().startswith("image/"):
        raise ImageError(f"{name}: not a data URI of a picture (data:image/...;base64,...)")
    data = urllib.parse.unquote_to_bytes(body)
    if "base64" not in [parameter.strip() for parameter in parameters]:
        return data
    data = b"".join(data.split())
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error:
        raise ImageError(f"{name}: its base64 is broken") from None


def _download(name: str, url: str) -> bytes:
    # not build_opener(): that one follows redirects to ftp, and opens file:// too
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    request = urllib.request.Request(url, headers={"User-Agent": "csp-edge"})
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    data = bytearray()
    try:
        with opener.open(request, timeout=DOWNLOAD_SECONDS / 3) as response:
            while block := response.read1(2**16):
                data += block
                if len(data) > MAX_DOWNLOAD:
                    raise ImageError(f"{name}: more than the limit of {MAX_DOWNLOAD} bytes")
                if time.monotonic() > deadline:
                    raise ImageError(f"{name}: not fetched within {DOWNLOAD_SECONDS:g} seconds")
    except urllib.error.HTTPError as error:
        raise ImageError(f"{name}: the server answered {error.code}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise ImageError(f"{name}: can't be fetched: {reason or type(error).__name__}") from None
    return bytes(data)


def _open(name: str, file: Path | bytes, max_pixels: int) -> Image.Image:
    known: list[str] = []
    for formats in (("PNG", "JPEG"), FORMATS):
        known = _decoders(formats)
        try:
            return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=known)
        except Image.DecompressionBombError:
            raise ImageError(
                f"{name}: more than the limit of {max_pixels} pixels, scale it"
            ) from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise ImageError(f"{name}: {error.strerror}") from None
    raise ImageError(f"{name}: not a picture ({', '.join(known)})")


def _decoders(formats: Iterable[str]) -> list[str]:
    """Those of the formats that Pillow was built for, ready."""
    for form in formats:
        with contextlib.suppress(ImportError):  # an older Pillow
            importlib.import_module(f"PIL.{FORMATS[form]}ImagePlugin")
    return [form for form in formats if form in Image.OPEN]


def _check_size(name: str, size: tuple[int, ...], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: empty, it has no pixels")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} is more than the limit of {max_pixels} pixels, scale it"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{name}: {width} x {height} is longer than {MAX_ASPECT} : 1, crop it")


def _decode(name: str, image: Image.Image, max_pixels: int) -> npt.NDArray[np.uint8]:
    _check_size(name, image.size, max_pixels)
    # decoders fail on broken files with whatever exception comes first
    try:
        image.load()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: truncated or corrupt: {reason}") from None
    # unreadable EXIF says nothing about the orientation
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    return _rgb(name, image)


def _rgb(name: str, image: Image.Image) -> npt.NDArray[np.uint8]:
    try:
        if image.mode == "F":
            image = _from_array(name, np.asarray(image))
        elif image.mode == "I" or image.mode.startswith("I;16"):
            # 32-bit "I" is what some decoders make of 16 bits
            image = _from_array(name, np.asarray(image).clip(0, 65535).astype(np.uint16))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return np.array(image.convert("RGB"), order="C")
    except (ValueError, OSError) as error:
        raise ImageError(f"{name}: can't be converted from {image.mode} to RGB: {error}") from None


def _from_array(name: str, array: npt.NDArray[Any]) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ImageError(f"{name}: give [height, width] or [height, width, 1, 3 or 4]")
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = (array.astype(np.uint32) * 255 + 32767) // 65535
    elif array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):
            raise ImageError(
                f"{name}: floats from {array.min():g} to {array.max():g}, give them in [0, 1]"
            )
        array = np.rint(array.astype(np.float32) * 255)
    elif array.dtype != np.uint8:
        raise ImageError(f"{name}: of {array.dtype}, give uint8, uint16, bool or floats in [0, 1]")
    return Image.fromarray(array.astype(np.uint8))
