import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from csp_edge.errors import CspEdgeError, ModelError, OptionError, ProjectorError
from csp_edge.gguf_file import (
    Array,
    Header,
    check_model,
    check_pair,
    check_projector,
    describe,
    find_model,
    read_header,
)

MODELS = Path(__file__).parents[1] / "csp_edge/models"
MODEL = MODELS / "csp-tiny-q8_0.gguf"
MMPROJ = MODELS / "mmproj-csp-tiny-f16.gguf"
TOKENS = "tokenizer.ggml.tokens"


@pytest.fixture(scope="module")
def model() -> Header:
    return read_header(MODEL)


@pytest.fixture(scope="module")
def mmproj() -> Header:
    return read_header(MMPROJ)


def changed(header: Header, **values: Any) -> Header:
    """With other metadata; __ stands for a dot, None removes."""
    metadata = header.metadata | {key.replace("__", "."): v for key, v in values.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return Header(header.path, metadata, header.types, header.tensors)


def write(path: Path, architecture: str = "llama", n_embd: int = 32, **keys: Any) -> Path:
    """A small GGUF with one tensor, sound as far as headers go."""
    writer = gguf.GGUFWriter(path, architecture)
    if architecture == "clip":
        writer.add_bool("clip.has_vision_encoder", True)
        writer.add_string("clip.projector_type", "pixtral")
        writer.add_tensor("mm.2.weight", np.zeros((n_embd, 8), np.float32))
    else:
        for name, value in {
            "block_count": 1,
            "embedding_length": n_embd,
            "context_length": 8,
            "attention.head_count": 2,
        }.items():
            writer.add_uint32(f"{architecture}.{name}", value)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(keys.pop("tokens", ["a", "b", "", ""]))
        writer.add_tensor("token_embd.weight", np.zeros((4, n_embd), np.float32))
    for key, value in keys.items():
        writer.add_uint32(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_header_agrees_with_the_gguf_package(model: Header, mmproj: Header) -> None:
    for header in (model, mmproj):
        reader = gguf.GGUFReader(header.path)
        assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
        for tensor in reader.tensors:
            info = header.tensors[tensor.name]
            assert info.shape == tuple(tensor.shape.tolist())
            assert info.type == tensor.tensor_type
            assert info.offset == tensor.data_offset
            assert info.n_bytes == tensor.n_bytes
        for key, value in header.metadata.items():
            expected = reader.fields[key].contents()
            if not isinstance(value, Array):
                assert value == expected
            elif value.values is None:
                assert value.length == len(expected)
            else:
                assert list(value.values) == expected


def test_demo_pair_is_sound(model: Header, mmproj: Header) -> None:
    assert model.architecture == "llama"
    assert mmproj.architecture == "clip"
    assert model.metadata[TOKENS] == Array(gguf.GGUFValueType.STRING, 448, None)
    check_model(model)
    check_projector(mmproj)
    check_pair(model, mmproj)


def test_describe() -> None:
    info = describe(MODEL, MMPROJ)
    assert (info.name, info.architecture, info.license) == ("csp-tiny", "llama", None)
    assert (info.n_layer, info.n_head, info.n_head_kv) == (6, 4, 2)
    assert (info.head_dim_k, info.head_dim_v, info.n_embd) == (64, 64, 256)
    assert (info.n_ctx, info.n_vocab, info.quantization) == (4096, 448, "Q8_0")
    assert info.n_params == 4951296
    assert info.weight_bytes == sum(info.bytes_by_type.values())
    assert list(info.bytes_by_type) == ["Q8_0", "F32"]
    assert info.kv_bytes_per_token == 6 * 2 * (64 + 64) * 2
    assert info.projector is not None
    assert (info.projector.type, info.projector.image_size) == ("mlp", 48)
    assert info.projector.patch_size == 8
    assert info.projector.tokens_per_picture == 36
    assert info.kv_bytes_per_picture == 36 * info.kv_bytes_per_token
    assert describe(MODEL).projector is None


def test_describe_kv_types() -> None:
    sizes = {t: describe(MODEL, kv_type=t).kv_bytes_per_token for t in ("f32", "q8_0", "q4_0")}
    assert sizes == {"f32": 6144, "q8_0": 1536 * 34 / 32, "q4_0": 1536 * 18 / 32}
    with pytest.raises(OptionError, match="unknown kv_type 'q3': choose one of f32, f16"):
        describe(MODEL, kv_type="q3")


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


def test_unreadable_files(tmp_path: Path) -> None:
    for path, match in (
        (tmp_path / "none.gguf", "no such file"),
        (tmp_path, "not a file"),
        (Path("/dev/zero"), "not a file"),
    ):
        with pytest.raises(ModelError, match=match):
            read_header(path)


GARBAGE = {
    "empty": b"",
    "text": b"not a GGUF at all",
    "zeros": bytes(1000),
    "magic": b"GGUF",
    "version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "many keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63),
    "many tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0),
    "no keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 60000),
    "long key": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**40),
    "negative type": b"GGUF" + struct.pack("<IQQQ1si", 3, 0, 1, 1, b"a", -1),
    "nested array": b"GGUF" + struct.pack("<IQQQ1siiQ", 3, 0, 1, 1, b"a", 9, 9, 1),
    "long array": b"GGUF" + struct.pack("<IQQQ1siiQ", 3, 0, 1, 1, b"a", 9, 4, 2**62),
    "long strings": b"GGUF" + struct.pack("<IQQQ1siiQ", 3, 0, 1, 1, b"a", 9, 8, 2**62),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(GARBAGE[name])
    with pytest.raises(ModelError) as error:
        read_header(path)
    assert "\n" not in str(error.value)


def probe(path: Path, data: bytes, check: Callable[[Header], None]) -> bool:
    """Whether a file passes. It must not raise anything but our errors, nor take long."""
    path.write_bytes(data)
    start = time.perf_counter()
    try:
        check(read_header(path))
    except CspEdgeError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 600
        return False
    finally:
        assert time.perf_counter() - start < 5
    return True


@pytest.mark.parametrize(("file", "check"), [(MODEL, check_model), (MMPROJ, check_projector)])
def test_truncated(tmp_path: Path, file: Path, check: Callable[[Header], None]) -> None:
    data = file.read_bytes()
    n_header = min(tensor.offset for tensor in read_header(file).tensors.values())
    rng = np.random.default_rng(0)
    ends = [*range(64), *rng.integers(64, n_header, 150), n_header, len(data) // 2, len(data) - 1]
    for end in ends:
        assert not probe(tmp_path / "x.gguf", data[:end], check)
    with pytest.raises(ModelError, match=f"truncated, it has {len(data) - 1} bytes of {len(data)}"):
        read_header(tmp_path / "x.gguf")


@pytest.mark.parametrize(("file", "check"), [(MODEL, check_model), (MMPROJ, check_projector)])
def test_flipped_bytes(tmp_path: Path, file: Path, check: Callable[[Header], None]) -> None:
    data = file.read_bytes()
    n_header = min(tensor.offset for tensor in read_header(file).tensors.values())
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    rng = np.random.default_rng(0)
    n_refused = 0
    with path.open("r+b") as out:
        for _ in range(400):
            position = int(rng.integers(n_header))
            out.seek(position)
            out.write(bytes([int(rng.integers(256))]))
            out.flush()
            try:
                check(read_header(path))
            except CspEdgeError as error:
                assert "\n" not in str(error)
                n_refused += 1
            out.seek(position)
            out.write(data[position : position + 1])
    assert n_refused > 100


def test_token_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", tokens=["a", "b", "b\0c"])
    with pytest.raises(ModelError, match="a token stands twice"):
        read_header(path)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"general__architecture": None}, "names no architecture"),
        ({"general__architecture": "clip"}, "a projector"),
        ({"general__architecture": "gpt2"}, "gpt2.block_count is missing"),
        ({"llama__block_count": 0}, "llama.block_count is 0, not a number from 1 to 512"),
        ({"llama__block_count": 513}, "block_count is 513"),
        ({"llama__block_count": "6"}, "block_count is 6"),
        ({"llama__embedding_length": 0}, "embedding_length is 0"),
        ({"llama__embedding_length": True}, "embedding_length is True"),
        ({"llama__context_length": 0}, "context_length is 0"),
        ({"llama__attention__head_count": -1}, "head_count is -1"),
        ({"llama__attention__head_count_kv": 3}, "dividing head_count"),
        ({"llama__attention__key_length": None, "llama__attention__head_count": 6}, "dividing 256"),
        ({"llama__attention__key_length": 0}, "key_length is 0"),
        ({"llama__rope__dimension_count": 63}, r"dimension_count is \(63, 63\), not even"),
        ({"llama__rope__dimension_count": 66}, "dimension_count is 66"),
        ({"llama__rope__scaling__type": "?"}, "not none, linear, yarn or longrope"),
        ({"llama__expert_used_count": 2}, "expert_used_count is 2"),
        ({"llama__expert_count": 4}, "expert_used_count is 0, not from 1 to 4"),
        ({"llama__expert_count": 9999}, "expert_count is 9999"),
        ({"llama__nextn_predict_layers": 6}, "nextn_predict_layers is 6"),
        ({"llama__attention__layer_norm_rms_epsilon": -1.0}, "epsilon is -1.0"),
        ({"llama__attention__layer_norm_rms_epsilon": float("nan")}, "epsilon is nan"),
        ({"tokenizer__ggml__model": None}, "tokenizer.ggml.model is missing"),
        ({"tokenizer__ggml__tokens": None}, "holds no vocabulary"),
    ],
)
def test_senseless_models(model: Header, values: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        check_model(changed(model, **values))


def test_heads_per_layer(model: Header) -> None:
    def with_heads(*heads: int) -> Header:
        array = Array(gguf.GGUFValueType.UINT32, len(heads), heads)
        return changed(model, llama__attention__head_count_kv=array)

    check_model(with_heads(2, 2, 4, 0, 1, 2))
    with pytest.raises(ModelError, match="not 6 numbers of at least 0"):
        check_model(with_heads(2, 2, 2))
    with pytest.raises(ModelError, match="dividing head_count"):
        check_model(with_heads(2, 2, 2, 3, 2, 2))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"general__architecture": "llama"}, "not a projector, but a llama model"),
        ({"clip__has_vision_encoder": False}, "neither a vision nor an audio encoder"),
        ({"clip__vision__embedding_length": 0}, "embedding_length is 0"),
        ({"clip__vision__embedding_length": 96}, "'v.patch_embd.weight' has the shape"),
        ({"clip__vision__attention__head_count": 0}, "head_count is 0"),
        ({"clip__vision__attention__head_count": 5}, "5 heads"),
        ({"clip__vision__block_count": 0}, "an encoder of 0 layers"),
        ({"clip__vision__block_count": 99}, r"'v\.blk\.5\.ln1\.weight' is missing"),
        ({"clip__vision__image_size": 56}, r"'v\.position_embd\.weight' has the shape \[192, 36\]"),
        ({"clip__vision__image_size": 9999}, "image_size is 9999"),
        ({"clip__vision__image_size": 4}, "8-pixel patches of 4"),
        ({"clip__vision__patch_size": 0}, "patch_size is 0"),
        ({"clip__vision__patch_size": 16}, "has the shape"),
        ({"clip__vision__projection_dim": 2**31}, "projection_dim is 2147483648"),
        ({"clip__vision__attention__layer_norm_epsilon": float("inf")}, "epsilon is inf"),
    ],
)
def test_senseless_projectors(mmproj: Header, values: dict[str, Any], match: str) -> None:
    with pytest.raises(ProjectorError, match=match):
        check_projector(changed(mmproj, **values))


def test_projector_of_wrong_types(mmproj: Header) -> None:
    key = "clip.vision.image_size"
    types = mmproj.types | {key: gguf.GGUFValueType.FLOAT32}
    with pytest.raises(ProjectorError, match=f"{key} is of type FLOAT32"):
        check_projector(Header(mmproj.path, mmproj.metadata, types, mmproj.tensors))


def test_projector_without_a_tensor(mmproj: Header) -> None:
    for name in ("mm.2.weight", "mm.0.bias", "v.patch_embd.weight", "v.blk.3.attn_k.weight"):
        tensors = {k: v for k, v in mmproj.tensors.items() if k != name}
        with pytest.raises(ProjectorError, match=f"{name}' is missing"):
            check_projector(Header(mmproj.path, mmproj.metadata, mmproj.types, tensors))


def test_projector_for_another_model(model: Header, mmproj: Header) -> None:
    other = changed(model, llama__embedding_length=512)
    with pytest.raises(ProjectorError, match="made for another model, its embeddings have 256 val"):
        check_pair(other, mmproj)
    check_pair(other, changed(mmproj, clip__projector_type="of its own"))
