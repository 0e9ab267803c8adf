from pathlib import Path

import pytest

from csp_edge.errors import ModelError
from csp_edge.gguf_check import check_model
from csp_edge.gguf_file import read_header
from csp_edge.model_files import find_model
from csp_edge.model_info import describe
from small_gguf import MMPROJ, MODEL, MODELS, write


def test_find_model() -> None:
    assert find_model(MODELS) == find_model(str(MODEL)) == (MODEL, MMPROJ)
    with pytest.raises(ModelError, match="a projector, give the model it belongs to"):
        find_model(MMPROJ)


def test_find_model_refuses(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        find_model(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match=r"holds no model \(\*\.gguf\)"):
        find_model(tmp_path)
    write(tmp_path / "mmproj.gguf", "clip")
    with pytest.raises(ModelError, match="holds no model"):
        find_model(tmp_path)
    write(tmp_path / "a.gguf")
    write(tmp_path / "b.gguf")
    with pytest.raises(ModelError, match=r"holds 2 models \(a\.gguf, b\.gguf\), give one of them"):
        find_model(tmp_path)
    (tmp_path / "c.gguf").write_text("not a GGUF")
    assert find_model(tmp_path / "a.gguf") == (tmp_path / "a.gguf", tmp_path / "mmproj.gguf")
    with pytest.raises(ModelError, match="not a GGUF file"):
        find_model(tmp_path / "c.gguf")
    with pytest.raises(ModelError, match="no such file"):
        find_model("a\0b")


def test_find_model_among_several_projectors(tmp_path: Path) -> None:
    model = write(tmp_path / "small-vlm-q4.gguf")
    write(tmp_path / "a-wrong-mmproj.gguf", "clip", n_embd=64)
    assert find_model(model).mmproj is None
    write(tmp_path / "a-vision.gguf", "clip")
    assert find_model(model).mmproj == tmp_path / "a-vision.gguf"
    write(tmp_path / "mmproj-b.gguf", "clip")
    write(tmp_path / "mmproj-a.gguf", "clip")
    assert find_model(model).mmproj == tmp_path / "mmproj-a.gguf"
    write(tmp_path / "mmproj-small-vlm.gguf", "clip")
    assert find_model(model).mmproj == tmp_path / "mmproj-small-vlm.gguf"


def test_split_model(tmp_path: Path) -> None:
    first = write(tmp_path / "m-00001-of-00002.gguf", split__count=2)
    with pytest.raises(ModelError, match="m-00002-of-00002.gguf: no such file"):
        check_model(read_header(first))
    second = write(tmp_path / "m-00002-of-00002.gguf", split__count=2)
    assert find_model(tmp_path) == find_model(second) == (first, None)
    check_model(read_header(first))
    assert describe(first).n_params == 2 * 4 * 32
