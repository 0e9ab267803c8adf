"""Models of real shapes with random weights."""

import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize

from csp_edge import EdgeVLM
from csp_edge.model_info import describe

sys.path.append(str(Path(__file__).parents[1] / "tools/random_model"))
from shapes import SHAPES  # noqa: E402
from write import pool, write  # noqa: E402


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K"])
def test_weights_are_finite_and_of_the_right_size(kind: str) -> None:
    quantization = GGMLQuantizationType[kind]
    n_in = 4096
    weights = pool(quantization, n_in)
    if kind == "F16":
        values = weights.view(np.float16).astype(np.float32)
    else:
        values = dequantize(weights, quantization)
    assert np.isfinite(values).all()
    assert values.std() == pytest.approx(n_in**-0.5, rel=0.25)
    assert abs(values.mean()) < 0.1 * values.std()


@pytest.mark.parametrize("name", SHAPES)
def test_shape_is_written(name: str, tmp_path: Path) -> None:
    model, mmproj = write(name, tmp_path, type_name="q8_0", n_layer=1)
    info, shape = describe(model, mmproj), SHAPES[name]
    assert (info.architecture, info.n_embd) == (shape.text.architecture, shape.text.n_embd)
    assert (info.n_head, info.n_head_kv) == (shape.text.n_head, shape.text.n_head_kv)
    assert (info.n_layer, info.n_vocab) == (1, shape.text.n_vocab)
    assert info.quantization == "Q8_0"
    assert info.projector and info.projector.type == shape.vision.projector
    model.unlink()


def test_model_chats(tmp_path: Path) -> None:
    model, mmproj = write("smolvlm-256m", tmp_path, n_layer=1)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with EdgeVLM(model, n_threads=1) as vlm:
        result = vlm.chat("What is this?", [noise], max_tokens=2)
        assert np.isfinite(vlm.engine.logits).all()
    # a grid of 4 x 4 tiles and the whole, each of 64 tokens
    assert result.usage.image_tokens == 17 * 64
    assert mmproj.name == "mmproj-smolvlm-256m-1-layers-f16.gguf"
