import runpy
from pathlib import Path

import gguf
import pytest

from csp_edge.errors import ModelError
from csp_edge.gguf_check import check_model
from csp_edge.gguf_file import read_header
from csp_edge.model_files import find_model
from csp_edge.model_info import describe
from csp_edge.template import normalize_messages
from small_gguf import MMPROJ, MODEL, MODELS, write

# the demo model's vocabulary as its training had it
RECIPE = runpy.run_path(str(Path(__file__).parents[1] / "tools/demo_vlm/tokens.py"))
BOS, EOS, USER, ASSISTANT = (
    RECIPE["IDS"][RECIPE[name]] for name in ("BOS", "EOS", "USER", "ASSISTANT")
)


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


@pytest.mark.parametrize(
    "text",
    [
        " image 16:",
        " What color is the star in image 2?",
        " What is left of the umbrella in image 5?",
        " How many buses are in image 10?",
        " Where is the red cross from image 7 to image 9?",
        " top left, bottom right, center",
        " 42A MILK written umbrellas catalog Whatever? x7-(;",
    ],
)
def test_demo_model_reads_words_as_it_learnt_them(demo, text: str) -> None:
    assert demo.engine.tokenizer.tokenize([text]).items == [BOS, *RECIPE["encode"](text)]


def test_demo_model_is_asked_as_it_was_trained(demo, scenes: list[Path]) -> None:
    encode = RECIPE["encode"]
    messages = normalize_messages("Which image shows the cat?", scenes[:2])
    messages += normalize_messages([{"role": "assistant", "content": "1"}])
    messages += normalize_messages("How many fish are in image 3?", scenes[5:6])
    with demo.tokenize(messages) as prompt:
        items = [item if isinstance(item, int) else "picture" for item in prompt.items]
    assert items == [
        *[BOS, *encode(" image 1:"), "picture", *encode(" image 2:"), "picture"],
        *[USER, *encode(" Which image shows the cat?"), ASSISTANT, *encode(" 1"), EOS],
        *[*encode(" image 3:"), "picture"],
        *[USER, *encode(" How many fish are in image 3?"), ASSISTANT],
    ]


def test_demo_model_can_say_any_text(demo) -> None:
    tokenizer = demo.engine.tokenizer
    for text in ("Füße 🦊", "\t\x7f\u00a0日本語\n", "".join(map(chr, range(1, 256)))):
        pieces = [tokenizer.piece(token) for token in tokenizer.tokenize([text]).items]
        assert b"".join(pieces).decode() == text


def test_demo_pair_is_small_and_quantized() -> None:
    assert MODEL.stat().st_size + MMPROJ.stat().st_size <= 16 * 2**20
    tensors = read_header(MODEL).tensors
    matrices = {name: tensor for name, tensor in tensors.items() if len(tensor.shape) > 1}
    assert len(matrices) == 2 + 7 * 6
    assert {tensor.type for tensor in matrices.values()} == {gguf.GGMLQuantizationType.Q8_0}
