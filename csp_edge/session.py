"""A conversation in a file: its cache, its pictures, and what was said.

Numbers are little-endian:

    8 bytes    "CSPEDGE\\n"
    uint32     version
    uint64     bytes of the head
    head       JSON: model, settings, messages, what the cache holds, and how long the rest is
    ...        embeddings of pictures, float32
    ...        files of pictures
    ...        the cache, see llama_csp_write_snapshot
    32 bytes   SHA-256 of all that is before it
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from csp_edge.engine import Engine, Snapshot
from csp_edge.errors import CspEdgeError, ImageError, MemoryLimitError, PromptError, SessionError
from csp_edge.gguf_file import read_header, read_parts
from csp_edge.images import Picture, remembered
from csp_edge.model_files import find_model
from csp_edge.policies import POLICIES, Full, Policy, policy
from csp_edge.template import Message, Text, normalize_messages
from csp_edge.tokenizer import Item, Patches, count_tokens

MAGIC = b"CSPEDGE\n"
VERSION = 3

# what EdgeVLM is made with again
_SETTINGS = {
    "memory": (int, str, type(None)),
    "n_ctx": (int, type(None)),
    "max_cells": (int, type(None)),
    "recall": (bool, str),
    "kv_type": (str,),
}

_START = struct.Struct("<8sIQ")
_BLOCK = 2**20
# what unexpected JSON raises
_MALFORMED = (
    ArithmeticError,
    AttributeError,
    ImageError,
    LookupError,
    PromptError,
    RecursionError,
    TypeError,
    ValueError,
)


def save_session(
    path: str | PathLike[str],
    engine: Engine,
    messages: Sequence[Message],
    cache: Policy | Full,
    settings: Mapping[str, Any],
) -> None:
    """Write a conversation to a file, which is the old one until the new one is complete.

    Of pictures whose files can't be read any more, the embeddings alone are saved.

    Args:
        messages: their pictures are csp_edge.images.Picture.
        settings: of EdgeVLM: memory, n_ctx, max_cells, recall and kv_type.

    Raises:
        SessionError: it can't be written.
        ModelError: the model's cache can't be saved.
        MemoryLimitError: a copy of the cache doesn't fit.
    """
    snapshot = engine.snapshot()
    pictures = {
        p.key: p for message in messages for p in message.pictures if isinstance(p, Picture)
    }
    files = {key: _file(picture) for key, picture in pictures.items()}
    held = pictures.keys() | {item.key for item in snapshot.items if isinstance(item, Patches)}
    embeddings = {name: data for name, data in engine.encoder.embeddings.items() if name[0] in held}
    projector = engine.info.projector
    name = next((name for name, kind in POLICIES.items() if type(cache) is kind), None)
    head = {
        "model": _identity(engine.info.path),
        "mmproj": projector and _identity(projector.path),
        "settings": {
            name: int(value) if isinstance(value, np.integer) else value
            for name, value in settings.items()
        },
        "policy": name,
        "policy_settings": asdict(cache) if name else {},
        "messages": [_message(message) for message in messages],
        "items": [item if isinstance(item, int) else _patches(item) for item in snapshot.items],
        "n_pruned": snapshot.n_pruned,
        "n_evicted": snapshot.n_evicted,
        "n_recent": snapshot.n_recent,
        "n_uneven": snapshot.n_uneven,
        "has_policy": snapshot.policy is not None,
        "window": snapshot.window,
        "recent": snapshot.recent,
        "lookahead": snapshot.lookahead,
        "is_probed": snapshot.is_probed,
        "n_prompt": snapshot.n_prompt,
        "n_unrecalled": snapshot.n_unrecalled,
        "embeddings": [[key.hex(), tile, n_tokens] for key, tile, n_tokens in embeddings],
        "pictures": [
            [p.key.hex(), p.width, p.height, len(files[p.key])] for p in pictures.values()
        ],
    }
    data = json.dumps(head, separators=(",", ":")).encode()
    try:
        with _replacing(Path(os.path.realpath(path))) as file:
            checksum = hashlib.sha256()

            def write(part: bytes | memoryview) -> None:
                checksum.update(part)
                file.write(part)

            write(_START.pack(MAGIC, VERSION, len(data)))
            write(data)
            for embedding in embeddings.values():
                write(embedding.tobytes())
            for content in files.values():
                write(content)
            snapshot.cache.write(write)
            file.write(checksum.digest())
    except (OSError, ValueError) as error:
        raise SessionError(
            f"{path}: can't be written: {getattr(error, 'strerror', error)}"
        ) from None


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `target` at the end, or, after an error, is no more."""
    if target.exists() and not target.is_file() and not target.is_dir():
        raise OSError(errno.EINVAL, "not a regular file")
    number, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(number, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _file(picture: Picture) -> bytes:
    try:
        return picture.file()
    except ImageError:
        return b""


def _message(message: Message) -> list[Any]:
    parts = [p.text if isinstance(p, Text) else [_key(p.source)] for p in message.parts]
    return [message.role, parts]


def _key(source: object) -> str:
    assert isinstance(source, Picture)
    return source.key.hex()


def _patches(item: Patches) -> list[Any]:
    key, *numbers = astuple(item)
    return [key.hex(), *numbers]


def _identity(path: Path) -> dict[str, str]:
    return {"path": os.path.abspath(path), "sha256": model_sha256(path)}


def model_sha256(path: Path) -> str:
    """Of a model's file, or of all its parts."""
    parts = [header.path for header in read_parts(read_header(path))]
    return _sha256_of(*((part, *_state(part)) for part in parts))


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=8)
def _sha256_of(*files: tuple[Path, int, int]) -> str:
    digest = hashlib.sha256()
    for path, *_ in files:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


class Session:
    """A file that save_session() wrote. A context manager.

    Its checksum tells accidents. Whatever else is in it, it is refused or does no harm.

    Raises:
        SessionError: the file can't be read, is of another version, or is damaged.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self._path = path
        try:
            if not Path(path).is_file():
                kind = "not a regular file" if Path(path).exists() else "no such file"
                raise SessionError(f"{path}: {kind}, give a saved session")
            self._file = Path(path).open("rb")  # noqa: SIM115
        except (OSError, ValueError) as error:
            raise SessionError(f"{path}: {getattr(error, 'strerror', error)}") from None
        try:
            with self._told():
                self._read_head()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._file.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of a file whose checksum is right, and its content is not."""
        try:
            yield
        except OSError as error:
            raise SessionError(f"{self._path}: can't be read: {error.strerror}") from None
        except _MALFORMED:
            raise self._damaged("its content makes no sense") from None

    def _damaged(self, why: str) -> SessionError:
        return SessionError(f"{self._path}: damaged: {why}: begin a new session")

    def _read_head(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        start = self._file.read(_START.size)
        if not start.startswith(MAGIC[: len(start)]) or not start:
            raise SessionError(f"{self._path}: not a saved session")
        if len(start) < _START.size:
            raise self._damaged("it is cut off")
        _, version, n_bytes = _START.unpack(start)
        if version != VERSION:
            raise SessionError(
                f"{self._path}: a session of version {version}, this csp-edge reads {VERSION}: "
                "begin a new session"
            )
        self._check(start, size)
        self._file.seek(len(start))
        self._n_left = size - len(start) - hashlib.sha256().digest_size
        self._head = json.loads(self._take(n_bytes))

    def _check(self, start: bytes, size: int) -> None:
        checksum = hashlib.sha256(start)
        n_left = size - len(start) - checksum.digest_size
        while n_left > 0 and (block := self._file.read(min(n_left, _BLOCK))):
            checksum.update(block)
            n_left -= len(block)
        if n_left or self._file.read() != checksum.digest():
            raise self._damaged("its checksum is wrong")

    def _take(self, n_bytes: int) -> bytes:
        if not 0 <= n_bytes <= self._n_left:
            raise ValueError("it is cut off")
        self._n_left -= n_bytes
        return self._file.read(n_bytes)

    def options(
        self, model: str | PathLike[str] | None, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What EdgeVLM is to be made with: `given`, and else what was saved.

        Raises:
            SessionError: the model, the projector or kv_type is another one.
            ModelError: there is no model at `model`.
        """
        with self._told():
            head = self._head
            settings = {name: head["settings"][name] for name in _SETTINGS}
            for name, value in settings.items():
                if type(value) not in _SETTINGS[name]:
                    raise TypeError(f"{name}={value!r}")
            if isinstance(given.get("cache"), Full):
                settings["max_cells"] = None
            # a bound of another kind takes the place of the saved one
            if given.get("memory") is not None:
                settings |= {"max_cells": None, "n_ctx": None}
            elif given.get("max_cells") is not None or given.get("rpc"):
                settings["memory"] = None
            options = {**settings, **given}
            options["kv_type"] = options["kv_type"] or settings["kv_type"]
            if options["kv_type"] != settings["kv_type"]:
                raise SessionError(
                    f"{self._path}: saved with kv_type={settings['kv_type']!r}, not "
                    f"{options['kv_type']!r}: leave it out, or begin a new session"
                )
            if "cache" not in given:
                options["cache"] = self._policy(head["policy"], dict(head["policy_settings"]))
            if model is not None:
                files = find_model(model)
                path, mmproj = files.model, options.get("mmproj") or files.mmproj
            else:
                path = Path(head["model"]["path"])
                mmproj = options.get("mmproj") or (head["mmproj"] and head["mmproj"]["path"])
            self._check_model("model", path, head["model"])
            self._check_model("mmproj", mmproj and Path(mmproj), head["mmproj"])
            return {**options, "path": path, "mmproj": mmproj}

    def _policy(self, name: str | None, settings: dict[str, Any]) -> Policy | Full:
        if name is None:
            raise SessionError(f"{self._path}: saved with a policy of your own: give cache=")
        return policy(name, **settings)

    def _check_model(self, what: str, path: Path | None, saved: Mapping[str, str] | None) -> None:
        if saved is None:
            return
        if path is None or not path.is_file():
            place = path or Path(saved["path"])
            raise SessionError(
                f"{self._path}: saved with {what} {place.name}, and there is no file {place}: "
                f"give {what}="
            )
        if model_sha256(path) != saved["sha256"]:
            raise SessionError(
                f"{self._path}: saved with another {what} than {path}: give {what}={saved['path']}"
            )

    def restore(self, engine: Engine, cache: Policy | Full) -> list[Message]:
        """Bring the conversation back, into an engine that holds none. The messages so far.

        Args:
            cache: what prunes within max_cells.

        Raises:
            SessionError: the file is damaged, or the engine is of another kind.
            MemoryLimitError: the cache doesn't fit.
        """
        with self._told():
            for key, tile, n_tokens in self._head["embeddings"]:
                name = bytes.fromhex(key), _integer(tile), _integer(n_tokens)
                data = np.frombuffer(self._take(4 * n_tokens * engine.encoder.n_embd), np.float32)
                engine.encoder.embeddings[name] = data.reshape(n_tokens, engine.encoder.n_embd)
            messages = self._messages()
            try:
                engine.restore(self._snapshot(engine, cache))
            except (SessionError, MemoryLimitError):
                raise
            except CspEdgeError as error:
                recall = self._head["settings"]["recall"]
                saved = f"saved with recall={recall!r}, which can't be changed: "
                why = saved if "evicted" in str(error) else ""
                raise SessionError(f"{self._path}: {why}{error}") from None
        return messages

    def _messages(self) -> list[Message]:
        pictures = {
            key: remembered(bytes.fromhex(key), width, height, self._take(_integer(n_bytes)))
            for key, width, height, n_bytes in self._head["pictures"]
        }
        messages = [
            {
                "role": role,
                "content": [
                    {"type": "text", "text": part}
                    if isinstance(part, str)
                    else {"type": "image", "image": pictures[part[0]]}
                    for part in parts
                ],
            }
            for role, parts in self._head["messages"]
        ]
        return normalize_messages(messages) if messages else []

    def _snapshot(self, engine: Engine, cache: Policy | Full) -> Snapshot:
        head = self._head
        items = [_item(item, engine.tokenizer.n_vocab) for item in head["items"]]
        n_tokens = count_tokens(items)
        n_past = sum(1 if isinstance(item, int) else item.n_pos for item in items)
        n_cells = n_tokens - _integer(head["n_evicted"], n_tokens)
        if n_cells > engine.n_ctx_max:
            raise SessionError(
                f"{self._path}: has {n_cells} cells, more than n_ctx={engine.n_ctx_max}: raise it"
            )
        return Snapshot(
            engine.read_snapshot(self._fill, self._n_left, n_cells),
            tuple(items),
            _integer(n_tokens),
            _integer(n_past),
            _integer(head["n_pruned"], len(items)),
            _integer(head["n_evicted"], n_tokens),
            _integer(head["n_recent"], n_tokens),
            _integer(head["n_uneven"], n_tokens),
            cache if head["has_policy"] and isinstance(cache, Policy) else None,
            _integer(head["window"]),
            _integer(head["recent"]),
            _integer(head["lookahead"]),
            bool(head["is_probed"]),
            _integer(head["n_prompt"], n_tokens),
            _integer(head["n_unrecalled"]),
        )

    def _fill(self, memory: memoryview) -> None:
        if self._file.readinto(memory) != len(memory):
            raise ValueError("it is cut off")


def _item(item: Any, n_vocab: int) -> Item:
    if isinstance(item, int):
        return _integer(item, n_vocab - 1)
    key, picture, tile, n_tokens, n_pos, n_cols, n_rows, causal = item
    return Patches(
        bytes.fromhex(key),
        _integer(picture),
        _integer(tile),
        _integer(n_tokens),
        _integer(n_pos),
        _integer(n_cols),
        _integer(n_rows),
        causal is True,
    )


def _integer(value: Any, high: int = 2**31 - 1) -> int:
    if type(value) is not int or not 0 <= value <= high:
        raise ValueError(f"{value!r} where an integer from 0 to {high} should be")
    return value
