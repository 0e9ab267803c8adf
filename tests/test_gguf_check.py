import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from csp_edge.errors import CspEdgeError, ModelError, ProjectorError
from csp_edge.gguf_check import check_model, check_pair, check_projector
from csp_edge.gguf_file import Array, Header, read_header
from small_gguf import MMPROJ, MODEL


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


def test_demo_pair_is_sound(model: Header, mmproj: Header) -> None:
    assert model.architecture == "llama"
    assert mmproj.architecture == "clip"
    assert model.metadata["tokenizer.ggml.tokens"] == Array(gguf.GGUFValueType.STRING, 768, None)
    check_model(model)
    check_projector(mmproj)
    check_pair(model, mmproj)


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
        ({"clip__vision__block_count": 99}, r"'v\.blk\.6\.ln1\.weight' is missing"),
        (
            {"clip__vision__image_size": 108},
            r"'v\.position_embd\.weight' has the shape \[192, 64\]",
        ),
        ({"clip__vision__image_size": 9999}, "image_size is 9999"),
        ({"clip__vision__image_size": 4}, "12-pixel patches of 4"),
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


def test_projector_with_dimensions_of_1(mmproj: Header) -> None:
    """InternVL's positions are [n_embd, n_patches, 1]."""
    positions = mmproj.tensors["v.position_embd.weight"]

    def with_shape(*shape: int) -> Header:
        tensors = mmproj.tensors | {positions.name: positions._replace(shape=shape)}
        return Header(mmproj.path, mmproj.metadata, mmproj.types, tensors)

    check_projector(with_shape(*positions.shape, 1))
    with pytest.raises(ProjectorError, match=r"\[192, 64, 2\], not \[192, 64\]"):
        check_projector(with_shape(*positions.shape, 2))


def test_projector_for_another_model(model: Header, mmproj: Header) -> None:
    other = changed(model, llama__embedding_length=512)
    with pytest.raises(ProjectorError, match="made for another model, its embeddings have 256 val"):
        check_pair(other, mmproj)
    check_pair(other, changed(mmproj, clip__projector_type="of its own"))


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
