"""Where our llama.cpp libraries are, and that llama_cpp loads these and no others."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from csp_edge.errors import LibraryError

_NAME = {"darwin": "libllama.dylib", "win32": "llama.dll"}.get(sys.platform, "libllama.so")


def bind(package_path: Iterable[str]) -> None:
    """Point llama_cpp at the libraries in `lib/` of the package. Without them, do nothing yet.

    Raises:
        LibraryError: llama_cpp was imported before, with other libraries.
    """
    directory = next((d for p in package_path if ((d := Path(p, "lib")) / _NAME).exists()), None)
    if directory is None:
        return
    for module, path in (
        ("llama_cpp.llama_cpp", "_base_path"),
        ("llama_cpp.mtmd_cpp", "_libmtmd_base_path"),
    ):
        loaded = getattr(sys.modules.get(module), path, None)
        if loaded is not None and Path(loaded).resolve() != directory.resolve():
            raise LibraryError(
                f"llama_cpp was imported before csp_edge, with the libraries in {loaded}: "
                "import csp_edge first"
            )
    os.environ["LLAMA_CPP_LIB_PATH"] = os.environ["MTMD_CPP_LIB"] = str(directory)
