"""The hook's graphs are made of ops that the backends have, by llama.cpp's own tables."""

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "build" / "patched" / "source" / "docs" / "ops"

# ggml function in native/ -> op, and what of it is needed (a pattern for the table's parameters)
KV_TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0"]
NEEDED = {
    # rows of a head, which are a view, and of what was evicted, which is an input
    "get_rows": ("GET_ROWS", [rf"type={t},.*v={v}" for t in KV_TYPES for v in (0, 1)]),
    "set_rows": ("SET_ROWS", [rf"type(_src=f32,type_dst)?={t},type_idx=i64" for t in KV_TYPES]),
    "mul_mat": ("MUL_MAT", [r"type_a=f32,type_b=f32"]),
    "soft_max_ext": ("SOFT_MAX", [r"type=f32,.*mask=1,sinks=1,m_prec=f32,.*max_bias=0\.0"]),
    "cont": ("CONT", [r"type=f32"]),
    "cont_2d": ("CONT", [r"type=f32"]),
    "scale": ("SCALE", [r"type=f32,.*bias=0\.0"]),
    "tanh": ("TANH", [r"type=f32,.*v=0"]),
    "softplus": ("SOFTPLUS", [r"type=f32,.*v=0"]),
    "sub": ("SUB", [r"type=f32,.*nr=\[1,1,1,1\]"]),
    # by the queries' modality, for all cells and heads
    "mul": ("MUL", [r"type=f32,ne=\[1,1,1,1\],nr=\[32,1,1,1\]", r"type=f32,.*nr=\[2,2,2,2\]"]),
    # the mask of the padding, for all tokens and query heads of a KV head
    "add": ("ADD", [r"type=f32,.*nr=\[1,1,1,1\]", r"type=f32,.*nr=\[1,2,1,1\]"]),
    "repeat_4d": ("REPEAT", [r"type=f32,.*nr=\[1,1,1,2\]"]),
    "cast": ("CPY", [r"type_src=f16,type_dst=f32", r"type_src=f32,type_dst=f16"]),
    # every KV head as a sequence of its own
    "flash_attn_ext": (
        "FLASH_ATTN_EXT",
        [rf"nr23=\[4,[2-9]\],.*mask=1,.*type_(KV|K)={t}" for t in ("f16", "q8_0", "q4_0")],
    ),
}
VIEWS = {"view_2d", "view_3d", "view_4d", "reshape_2d", "reshape_3d", "permute"}
VIEWS |= {"new_tensor_1d", "new_tensor_3d"}


def test_the_table_of_needed_ops_is_that_of_the_code():
    sources = "".join(path.read_text() for path in (ROOT / "native").glob("*.cpp"))
    used = set(re.findall(r"\bggml_(\w+)\s*\((?:graph\.)?ctx0\b", sources)) - VIEWS
    assert used == NEEDED.keys()


@pytest.mark.parametrize("backend", ["CPU", "CUDA", "Metal", "Vulkan", "SYCL"])
def test_ops_run_on(backend):
    with (TABLES / f"{backend}.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["test_mode"] == "support"]
    for op, patterns in NEEDED.values():
        for pattern in patterns:
            supported = [
                row["supported"] == "1"
                for row in rows
                if row["op_name"] == op and re.search(pattern, row["op_params"])
            ]
            assert any(supported), (op, pattern)
