"""The header of a GGUF file, with all that it says held against the file's size.

llama.cpp takes a header at its word in places, and ends the process where it is wrong.
"""

import math
import mmap
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from csp_edge.errors import ModelError

_MAX_KEYS = 2**12
_MAX_TENSORS = 2**18
_MAX_STRINGS = 2**23  # in all arrays together
_MAX_TEXT = 2**26  # bytes of all names and texts together
_MAX_VALUES = 2**10  # longer arrays keep their length alone

# ggml type -> (elements per block, bytes per block); the last one is newer than the gguf package
BLOCKS = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()} | {42: (64, 18)}

_SCALARS = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: struct.Struct("<I"),
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.BOOL: struct.Struct("<?"),
    GGUFValueType.UINT64: struct.Struct("<Q"),
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
}
_UINT = _SCALARS[GGUFValueType.UINT32]
_TYPE = _SCALARS[GGUFValueType.INT32]
_COUNT = _SCALARS[GGUFValueType.UINT64]

_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


class Array(NamedTuple):
    """An array of a header. Long ones, and those of strings, have no values here."""

    type: GGUFValueType
    length: int
    values: tuple[Any, ...] | None


class TensorInfo(NamedTuple):
    """A tensor: shape in ggml's order, the row first; offset in bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """A GGUF file's header: metadata by key, with their types, and tensors by name."""

    path: Path
    metadata: dict[str, Any]
    types: dict[str, GGUFValueType]
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """`general.architecture`, "clip" for a projector.

        Raises:
            ModelError: there is none.
        """
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str) or not name:
            raise ModelError(f"{self.path}: its header names no architecture, the file is corrupt")
        return name


def read_header(path: str | os.PathLike[str]) -> Header:
    """A GGUF file's header, with every count, length, type and offset checked against the file.

    Raises:
        ModelError: no such file, not a GGUF, or truncated or corrupt.
    """
    path = Path(path)
    with _opened(path) as reader:
        n_tensors, n_keys = reader.start()
        metadata: dict[str, Any] = {}
        types: dict[str, GGUFValueType] = {}
        for key, kind, value in reader.metadata(n_keys):
            if key in metadata:
                raise reader.corrupt(f"key {key!r} comes twice")
            metadata[key] = value
            types[key] = kind
        alignment = metadata.get("general.alignment", 32)
        kind = types.get("general.alignment", GGUFValueType.UINT32)
        if kind != GGUFValueType.UINT32 or alignment.bit_count() != 1:
            raise reader.corrupt(f"alignment {alignment}")
        return Header(path, metadata, types, reader.tensors(n_tensors, alignment))


def read_architecture(path: Path) -> str | None:
    """`general.architecture` without reading on behind it, None if there is none.

    Raises:
        ModelError: no such file, not a GGUF, or truncated or corrupt.
    """
    with _opened(path) as reader:
        _, n_keys = reader.start()
        for key, _, value in reader.metadata(n_keys):
            if key == "general.architecture":
                return str(value)
    return None


def read_parts(header: Header) -> list[Header]:
    """The headers of all parts of a split model (-00001-of-00003.gguf), `header` being the first.

    Raises:
        ModelError: a part is missing, or truncated or corrupt.
    """
    n_parts = header.metadata.get("split.count", 1)
    if not _PART.search(header.path.name) or not isinstance(n_parts, int):
        return [header]
    return [header, *(read_header(part_path(header.path, i)) for i in range(2, n_parts + 1))]


def part_path(path: Path, i: int) -> Path:
    """The `i`th part, from 1 on, of the split model that `path` is a part of, or else `path`."""
    return path.with_name(_PART.sub(rf"-{i:05}-of-\1.gguf", path.name))


def type_name(kind: int) -> str:
    """The name of one of ggml's types."""
    return GGMLQuantizationType(kind).name if kind in GGML_QUANT_SIZES else f"type {kind}"


@contextmanager
def _opened(path: Path) -> Iterator["_Reader"]:
    """A file mapped for reading. What its bytes make impossible is a ModelError."""
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"{path}: not a file, give a .gguf file")
        with path.open("rb") as file:
            if not file.read(1):
                raise ModelError(f"{path}: empty, not a GGUF file")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {getattr(error, 'strerror', error)}") from None
    with data:
        try:
            yield _Reader(path, data)
        except struct.error:
            raise ModelError(
                f"{path}: ends within its header, it is truncated or corrupt"
            ) from None


class _Reader:
    """Goes through a header from its start. Reading beyond the file's end is a struct.error."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0
        self.n_strings = 0
        self.n_text = 0

    def corrupt(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: {what}, the file is corrupt")

    def start(self) -> tuple[int, int]:
        """Counts of tensors and keys."""
        magic = self.data[:4]
        if magic != b"GGUF":
            raise ModelError(f"{self.path}: not a GGUF file, it starts with {magic!r}")
        self.position = 4
        version = self.number(_UINT)
        if version not in (2, 3):
            raise ModelError(
                f"{self.path}: GGUF of version {version}, only little-endian 2 and 3 can be read"
            )
        n_tensors, n_keys = self.number(_COUNT), self.number(_COUNT)
        if n_keys > _MAX_KEYS or n_tensors > _MAX_TENSORS:
            raise self.corrupt(f"{n_keys} keys and {n_tensors} tensors")
        return n_tensors, n_keys

    def number(self, form: struct.Struct) -> Any:
        (value,) = form.unpack_from(self.data, self.position)
        self.position += form.size
        return value

    def take(self, n: int) -> bytes:
        data = self.data[self.position : self.position + n]
        if len(data) < n:
            raise struct.error
        self.position += n
        return data

    def text(self, max_bytes: int) -> str:
        n_bytes = self.number(_COUNT)
        self.n_text += n_bytes
        if n_bytes > max_bytes or self.n_text > _MAX_TEXT:
            raise self.corrupt(f"a text of {n_bytes} bytes in its header")
        return self.take(n_bytes).decode(errors="backslashreplace")

    def metadata(self, n_keys: int) -> Iterator[tuple[str, GGUFValueType, Any]]:
        for _ in range(n_keys):
            key = self.text(2**16 - 1)
            if not key:
                raise self.corrupt("an empty key")
            kind = self.number(_TYPE)
            if kind == GGUFValueType.STRING:
                yield key, GGUFValueType.STRING, self.text(_MAX_TEXT)
            elif kind == GGUFValueType.ARRAY:
                yield key, GGUFValueType.ARRAY, self.array(key)
            elif kind in _SCALARS:
                yield key, GGUFValueType(kind), self.number(_SCALARS[GGUFValueType(kind)])
            else:
                raise self.corrupt(f"key {key!r} has unknown type {kind}")

    def array(self, key: str) -> Array:
        kind = self.number(_TYPE)
        length = self.number(_COUNT)
        if kind == GGUFValueType.STRING:
            self.skip_strings(key, length)
            return Array(GGUFValueType.STRING, length, None)
        if kind not in _SCALARS:
            raise self.corrupt(f"array {key!r} has unknown type {kind}")
        form = _SCALARS[GGUFValueType(kind)]
        if length > len(self.data) // form.size:
            raise struct.error
        data = self.take(length * form.size)
        values = tuple(v for (v,) in form.iter_unpack(data)) if length <= _MAX_VALUES else None
        return Array(GGUFValueType(kind), length, values)

    def skip_strings(self, key: str, length: int) -> None:
        self.n_strings += length
        if length > len(self.data) // _COUNT.size or self.n_strings > _MAX_STRINGS:
            raise self.corrupt(f"array {key!r} of {length} strings")
        is_vocabulary = key == "tokenizer.ggml.tokens"
        seen: set[bytes] = set()
        data, position, unpack = self.data, self.position, _COUNT.unpack_from
        for _ in range(length):
            start = position + _COUNT.size
            position = start + unpack(data, position)[0]
            if position > len(data):
                raise struct.error
            # llama.cpp aborts on a vocabulary with a token twice. It reads them up to a NUL
            if is_vocabulary and (token := data[start:position].partition(b"\0")[0]):
                if token in seen:
                    raise self.corrupt("a token stands twice in its vocabulary")
                seen.add(token)
        self.position = position

    def tensors(self, n_tensors: int, alignment: int) -> dict[str, TensorInfo]:
        infos: dict[str, TensorInfo] = {}
        end = 0  # of the data so far
        for _ in range(n_tensors):
            info = self.tensor()
            if info.name in infos:
                raise self.corrupt(f"tensor {info.name!r} comes twice")
            if info.offset != _pad(end, alignment):
                raise self.corrupt(f"tensor {info.name!r} is not where it should be")
            end = info.offset + info.n_bytes
            infos[info.name] = info
        start = _pad(self.position, alignment)
        if infos and start + end > len(self.data):
            raise ModelError(
                f"{self.path}: truncated, it has {len(self.data)} bytes of {start + end}: "
                "get it again"
            )
        return {name: t._replace(offset=start + t.offset) for name, t in infos.items()}

    def tensor(self) -> TensorInfo:
        """Its offset counts from the first tensor's data."""
        name = self.text(63)
        n_dims = self.number(_UINT)
        if not 1 <= n_dims <= 4:
            raise self.corrupt(f"tensor {name!r} has {n_dims} dimensions")
        shape = tuple(self.number(_COUNT) for _ in range(n_dims))
        kind = self.number(_TYPE)
        if kind not in BLOCKS:
            raise self.corrupt(f"tensor {name!r} has unknown type {kind}")
        block, n_bytes = BLOCKS[kind]
        n_bytes = math.prod(shape) // block * n_bytes
        if min(shape) < 1 or n_bytes >= 2**62 or shape[0] % block:
            raise self.corrupt(f"tensor {name!r} has the shape {list(shape)}, as {type_name(kind)}")
        return TensorInfo(name, shape, kind, self.number(_COUNT), n_bytes)


def _pad(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment
