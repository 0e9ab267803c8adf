"""The build: where the source's version stands, and what a person is told when something is off."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import csp_edge
from unpatched import ROOT, tools


def native_library(directory: Path) -> bytes:
    return next(directory.glob("*llama.*")).read_bytes()


def test_unpatched_library_has_no_hook(unpatched_lib: Path) -> None:
    (patched_lib,) = (lib for path in csp_edge.__path__ if (lib := Path(path, "lib")).is_dir())
    assert b"llama_csp_init" in native_library(patched_lib)
    assert b"llama_csp" not in native_library(unpatched_lib)


def locked() -> tuple[str, str]:
    """Version and SHA-256 of the llama-cpp-python in the lock file."""
    lock = (ROOT / "requirements.lock").read_text()
    found = re.search(r"^llama-cpp-python==(\S+) .*\n +--hash=sha256:(\w+)$", lock, re.MULTILINE)
    assert found
    return found[1], found[2]


def test_version_and_hash_stand_in_one_place() -> None:
    version, sha256 = locked()
    pinned = re.findall(r'"llama-cpp-python==(\S+)"', (ROOT / "pyproject.toml").read_text())
    assert pinned == [version]

    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = (ROOT / name for name in listed.stdout.splitlines())
    holders = [f.name for f in files if f.is_file() and sha256.encode() in f.read_bytes()]
    assert holders == ["requirements.lock"]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of all that CMake reads."""
    for name in ("CMakeLists.txt", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("cmake", "native", "patches"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def configure(sources: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["cmake", "-S", sources, "-B", sources / "build", "-G", "Ninja", *options],
        env=tools(),
        capture_output=True,
        text=True,
    )


def test_patch_that_does_not_fit(sources: Path) -> None:
    (sources / "patches" / "9999-misfit.patch").write_text(
        "--- a/src/llama.cpp\n+++ b/src/llama.cpp\n@@ -1 +1 @@\n-no such line\n+another\n"
    )
    done = configure(sources)
    assert done.returncode != 0
    version, _ = locked()
    told = f"patches/9999-misfit.patch does not fit the llama.cpp of llama-cpp-python {version}"
    assert told in " ".join(done.stderr.split())
    assert "src/llama.cpp:1" in done.stderr


def test_local_source_is_not_a_llama_cpp_tree(sources: Path) -> None:
    done = configure(sources, f"-DLLAMA_CPP_SOURCE_DIR={sources}")
    assert done.returncode != 0
    assert f"LLAMA_CPP_SOURCE_DIR: no llama.cpp tree in {sources}" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("variable", "package"), [("CXX=absent", "g++"), ("PYTHON=absent", "python3-venv")]
)
def test_what_is_missing_is_told_in_one_line(variable: str, package: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "--no-print-directory", "test", variable],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"apt install {package}" in line
