"""A log of JSON lines that outlives an interruption: what the run is, then what it found."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from csp_edge.errors import OptionError

Entry = dict[str, Any]

_START = b'{"log": '


class Log:
    """A log that is written to, entry by entry, and goes on where it ended. A context manager.

    Its first line is the header. A last line that was cut off by an interruption is dropped.

    Args:
        path: the file, made if there is none.
        header: what identifies the run: logs of another are refused.

    Raises:
        OptionError: the file can't be read or written, is no such log, or is another run's.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.entries: list[Entry] = []  # those that were there
        header = dict(json.loads(json.dumps(header)))
        try:
            _check_file(path)
            self._file = path.open("ab")
            if _is_unbegun(path):
                self._file.truncate(0)
                self.append(header)
            else:
                found, self.entries, n_bytes = _read(path)
                _check_header(path, found, header)
                self._file.truncate(n_bytes)
        except OSError as error:
            raise _refused(path, error) from None

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write an entry, through to the operating system.

        Raises:
            OptionError: it can't be written.
        """
        try:
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise _refused(self.path, error) from None

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._file.close()


def read_log(path: Path) -> tuple[Entry, list[Entry]]:
    """The header of a log, and its entries.

    Raises:
        OptionError: the file can't be read, or is no such log.
    """
    try:
        _check_file(path)
        header, entries, _ = _read(path)
    except OSError as error:
        raise _refused(path, error) from None
    return header, entries


def _check_file(path: Path) -> None:
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OptionError(f"{path}: not a regular file, give a log")


def _is_unbegun(path: Path) -> bool:
    """Empty, or cut off within the header."""
    data = path.read_bytes()
    return b"\n" not in data and _START.startswith(data[: len(_START)])


def _read(path: Path) -> tuple[Entry, list[Entry], int]:
    """The header, the entries, and the bytes of the lines that are whole."""
    data = path.read_bytes()
    data = data[: data.rfind(b"\n") + 1]
    entries = []
    for i, line in enumerate(data.splitlines()):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or (i == 0 and "log" not in entry):
            raise OptionError(f"{path}: line {i + 1} is not of a log: give another file")
        entries.append(entry)
    if not entries:
        raise OptionError(f"{path}: not a log: give another file")
    return entries[0], entries[1:], len(data)


def _check_header(path: Path, found: Entry, header: Mapping[str, Any]) -> None:
    for key in found | dict(header):
        if found.get(key) != header.get(key):
            raise OptionError(
                f"{path}: of another run, whose {key} is {found.get(key)!r} and not "
                f"{header.get(key)!r}: give another log"
            )


def _refused(path: Path, error: OSError) -> OptionError:
    return OptionError(f"{path}: {error.strerror}")
