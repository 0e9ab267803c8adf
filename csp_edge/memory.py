"""How much memory there still is, and how much this process has."""

import os
import tempfile
from pathlib import Path


def available_memory() -> int | None:
    """Bytes that can be allocated now without swapping, by the operating system's count.

    None where it isn't told.
    """
    amounts = [_from_meminfo(), _from_cgroup()]
    known = [amount for amount in amounts if amount is not None]
    return min(known) if known else _physical()


def resident_memory() -> int | None:
    """Bytes of this process that are in memory now, mapped files included. None: it isn't told."""
    return _amount("/proc/self/status", "VmRSS")


def peak_memory() -> int | None:
    """The most bytes that resident_memory() has told so far. None: it isn't told."""
    return _amount("/proc/self/status", "VmHWM")


def disk_folder() -> str:
    """Where a large temporary file takes no memory, which in /tmp it often does."""
    chosen = os.environ.get("TMPDIR")
    return chosen or ("/var/tmp" if os.path.isdir("/var/tmp") else tempfile.gettempdir())


def _from_meminfo() -> int | None:
    return _amount("/proc/meminfo", "MemAvailable")


def _amount(path: str, name: str) -> int | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    kib = [int(line.split()[1]) for line in lines if line.startswith(f"{name}:")]
    return kib[0] * 1024 if kib else None


def _from_cgroup() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        cached = next(
            int(line.split()[1])
            for line in (folder / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
    except (OSError, StopIteration, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + cached


def _physical() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
