"""The package binds llama_cpp to its own libraries. Each case in a process of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import csp_edge
from csp_edge import native

LIBRARIES = Path(os.environ["LLAMA_CPP_LIB_PATH"])


def run(code, *options, **environment):
    """What `code` prints, in a new Python."""
    env = {k: v for k, v in os.environ.items() if k not in ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")}
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=Path(__file__).parent,
        env=env | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


def test_import_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, time; t = time.perf_counter(); import csp_edge; t = time.perf_counter() - t;"
        "print(t, *{'numpy', 'llama_cpp', 'PIL', 'jinja2', 'gguf'} & set(sys.modules))"
    )
    times = [run(code).split() for _ in range(3)]
    assert {len(each) for each in times} == {1}, times
    assert min(float(each[0]) for each in times) < 0.3


def test_llama_cpp_gets_our_libraries_whoever_imports_it():
    assert (
        Path(run("import csp_edge, llama_cpp; print(llama_cpp.llama_cpp._base_path)")) == LIBRARIES
    )
    code = "import csp_edge, os; print(os.environ['LLAMA_CPP_LIB_PATH'])"
    assert Path(run(code, LLAMA_CPP_LIB_PATH="/elsewhere")) == LIBRARIES


def test_llama_cpp_with_other_libraries_is_refused(tmp_path):
    shutil.copytree(LIBRARIES, tmp_path / "other", symlinks=True)
    code = (
        "import llama_cpp\n"
        "try: import csp_edge\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    said = run(code, LLAMA_CPP_LIB_PATH=str(tmp_path / "other"))
    assert said.startswith("LibraryError llama_cpp was imported before csp_edge")
    assert str(tmp_path / "other") in said


@pytest.fixture
def bare_package(tmp_path):
    """The package without its libraries."""
    package = Path(csp_edge.__file__).parent
    for file in package.rglob("*.py"):
        copy = tmp_path / "csp_edge" / file.relative_to(package)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    return tmp_path


def test_without_libraries_the_package_imports_and_says_what_is_missing(bare_package):
    code = (
        "import csp_edge\n"
        "try: csp_edge.EdgeVLM\n"
        "except csp_edge.LibraryError as error: print(csp_edge.__file__, error)"
    )
    path = os.pathsep.join([str(bare_package), sysconfig.get_path("purelib")])
    said = run(code, "-S", PYTHONPATH=path)
    assert said.startswith(str(bare_package))
    assert "libraries are not in the package" in said


def test_nothing_is_printed_while_a_model_works():
    said = run(
        "from csp_edge import EdgeVLM\n"
        "with EdgeVLM.demo() as vlm: print(vlm.chat('What is in image 1?').finish_reason)"
    )
    assert said == "stop"


def test_what_llama_cpp_says_goes_to_logging(caplog, demo_paths):
    caplog.set_level("DEBUG", "csp_edge")
    model, why = native.explained(
        native.llama.llama_model_load_from_file,
        b"/nowhere.gguf",
        native.llama.llama_model_default_params(),
    )
    assert not model
    assert "nowhere.gguf" in why
    assert "nowhere.gguf" in caplog.text


def test_the_declarations_are_those_of_the_header():
    params = native.csp_default_params()
    assert not params.policy
    assert params.n_score == 1
    assert params.sink == native.SINK_NONE
    assert not params.inspect
