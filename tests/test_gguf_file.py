import struct
from pathlib import Path

import gguf
import pytest

from csp_edge.errors import ModelError
from csp_edge.gguf_file import Array, read_header
from small_gguf import MMPROJ, MODEL, write


def test_header_agrees_with_the_gguf_package() -> None:
    for header in map(read_header, (MODEL, MMPROJ)):
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


def test_token_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", tokens=["a", "b", "b\0c"])
    with pytest.raises(ModelError, match="a token stands twice"):
        read_header(path)
