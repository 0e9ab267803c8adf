"""The unpatched libraries: the same source and options, without patches/ and native/."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# the cache entries that choose what is compiled, and how
_OPTION = re.compile(
    r"^((?:GGML|LLAMA|CMAKE_BUILD_TYPE|CMAKE_(?:C|CXX|CUDA|HIP)_)\w*:(?:BOOL|STRING|PATH|FILEPATH)=.*)$",
    re.MULTILINE,
)


def tools() -> dict[str, str]:
    """The environment in which cmake and ninja are those beside this Python."""
    return os.environ | {"PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"}


def build() -> Path:
    """Build the unpatched libraries, or what changed since the last time, in build/unpatched.

    Returns:
        The folder that holds libllama, libmtmd and libggml*. They bear the patched ones' names:
        load them in a process of their own, with `LLAMA_CPP_LIB_PATH` and `MTMD_CPP_LIB` set to
        the folder.
    """
    directory = ROOT / "build" / "unpatched"
    patched = ROOT / "build" / "patched" / "CMakeCache.txt"
    options = _OPTION.findall(patched.read_text()) if patched.exists() else []
    configure = ["cmake", "-S", ROOT, "-B", directory, "-G", "Ninja", "-DCSP_EDGE_UNPATCHED=ON"]
    configure += ["-Wno-author", "--log-level=ERROR"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"] + [f"-D{option}" for option in options]
    for command in (configure, ["cmake", "--build", directory, "--", "--quiet"]):
        subprocess.run(command, env=tools(), check=True)
    return directory / "bin"


@pytest.fixture(scope="session")
def unpatched_lib() -> Path:
    """The folder of the unpatched libraries, see `build`."""
    return build()
