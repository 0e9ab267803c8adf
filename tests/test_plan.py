"""How a chat fits into the memory there is."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import csp_edge.footprint
from csp_edge import CSP, EdgeVLM, Full
from csp_edge.cli import main
from csp_edge.errors import MemoryLimitError, OptionError, ProjectorError
from csp_edge.footprint import Footprint, Layout
from csp_edge.plan import kv_loss, parse_memory, plan

MIB = 2**20

# what a fresh process says beforehand, and what the system counts of one that chats
PREDICT = """
import json, sys
from pathlib import Path
from csp_edge import CSP
from csp_edge.footprint import Layout
model, mmproj, n_cells = sys.argv[1:]
with Layout(Path(model), Path(mmproj) if mmproj else None, n_gpu_layers=0, policy=CSP(0.2),
            n_pixels=None, n_images=1) as layout:
    found = layout.footprint(n_cells=int(n_cells), n_ubatch=512, kv_type="f16")
print(json.dumps([found.load, found.peak]))
"""
CHAT = """
import json, sys
from pathlib import Path
from csp_edge import CSP, EdgeVLM
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
model, mmproj, picture = sys.argv[1:]
with EdgeVLM(model, n_threads=1, cache=CSP(0.2)) as vlm:
    loaded = peak()
    result = vlm.chat("what is this? " * 40, [picture] if mmproj else [], max_tokens=4)
print(json.dumps([loaded, peak(), result.usage.prompt_tokens]))
"""


@pytest.fixture(autouse=True)
def program(monkeypatch):
    """As large as a fresh process, though this one has run other tests."""
    monkeypatch.setattr(csp_edge.footprint, "resident_memory", lambda: 80 * 2**20)


def layout(model: Path, mmproj: Path | None = None, **options) -> Layout:
    settings = {"n_gpu_layers": 0, "policy": CSP(0.2), "n_pixels": None, "n_images": 1}
    return Layout(model, mmproj, **{**settings, **options})


def in_process(code: str, *arguments: object) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("4GiB", 2**32),
        ("4g", 2**32),
        ("512 MB", 512 * 10**6),
        ("1.5 KiB", 1536),
        (" 2 tib ", 2**41),
        ("3 kB", 3000),
        ("10B", 10),
    ],
)
def test_memory_is_parsed(text: str | int, n_bytes: int) -> None:
    assert parse_memory(text) == n_bytes


@pytest.mark.parametrize(
    "text",
    ["", "x", "-1", "4 GiBs", "4ib", "nan", "inf", "1e9", 0, -5, True, 2**61, "9" * 21, None, 1.5],
)
def test_bad_memory_is_refused(text: object) -> None:
    with pytest.raises(OptionError, match="memory="):
        parse_memory(text)


def test_sizes_are_those_of_the_real_thing(demo_paths) -> None:
    """K and V and the weights to the byte."""
    with layout(*demo_paths) as laid_out:
        found = laid_out.footprint(n_cells=1024, n_ubatch=512, kv_type="f16")
        info = laid_out.info
        assert laid_out.tokens_per_picture == info.projector.tokens_per_picture == 64
    assert found.cache == 1024 * info.kv_bytes_per_token
    assert found.weights == info.weight_bytes
    assert found.projector == info.projector.weight_bytes
    assert found.device == found.repacked == 0


def test_bits_and_batches_count(smollm2_path) -> None:
    with layout(smollm2_path) as laid_out:

        def footprint(**options) -> Footprint:
            settings = {"n_cells": 4096, "n_ubatch": 512, "kv_type": "f16"}
            return laid_out.footprint(**{**settings, **options})

        found = footprint()
        assert footprint(kv_type="q8_0").cache == found.cache * 34 // 64
        assert footprint(n_ubatch=128).compute < 0.5 * found.compute
        assert footprint(n_cells=8192).cache == 2 * found.cache
        assert footprint(mmap=False).load >= found.load
    with layout(smollm2_path, policy=Full()) as laid_out:
        assert laid_out.footprint(n_cells=4096, n_ubatch=512, kv_type="f16").scoring == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts peaks")
@pytest.mark.parametrize("name", ["embedded", "SmolLM2"])
def test_prediction_holds(name: str, demo_paths, smollm2_path, scenes) -> None:
    model, mmproj = demo_paths if name == "embedded" else (smollm2_path, "")
    loaded, peak, n_tokens = in_process(CHAT, model, mmproj, scenes[0])
    n_cells = -(-(n_tokens + 256) // 256) * 256
    told_loaded, told_peak = in_process(PREDICT, model, mmproj, n_cells)
    assert told_loaded == pytest.approx(loaded, rel=0.1)
    assert told_peak == pytest.approx(peak, rel=0.1)


def test_pictures_beyond_the_context(demo_paths, smollm2_path) -> None:
    found = plan(*demo_paths, "1GiB", n_images=1000)
    assert found.n_tokens == found.n_cells == 4096
    assert found.n_images_most == (4096 - 1024) // 64
    assert found.rows()["pictures of a conversation"] == "48 at most, by its context"
    fitting = plan(*demo_paths, "1GiB", n_images=47)
    assert fitting.n_images_most is None
    assert "pictures of a conversation" not in fitting.rows()
    assert plan(smollm2_path, None, "1GiB", n_images=1000).n_images_most is None


def test_plan_takes_all_where_there_is_room(demo_paths) -> None:
    found = plan(*demo_paths, "1GiB", n_images=12)
    assert found.n_cells == found.n_tokens == 12 * 64 + 1024
    assert (found.kv_type, found.n_ubatch, found.mmap) == ("f16", 512, True)
    assert found.footprint.peak <= 2**30


def test_plan_stays_within_and_refuses_with_what_would_do(smollm2_path) -> None:
    with pytest.raises(MemoryLimitError, match="the least is") as refused:
        plan(smollm2_path, None, "100MiB")
    least = int(str(refused.value).split('memory="')[1].split("MiB")[0])
    # this process may have grown a little since
    found = plan(smollm2_path, None, (least + 8) * MIB)
    assert found.n_cells < found.n_tokens
    assert found.footprint.peak <= found.memory
    more = plan(smollm2_path, None, (least + 60) * MIB)
    assert more.n_cells > found.n_cells
    assert more.footprint.peak <= more.memory


def test_type_can_be_fixed(smollm2_path) -> None:
    memory = plan(smollm2_path, None, "2GiB", kv_type="q4_0").footprint.peak
    found = plan(smollm2_path, None, memory + 8 * MIB, kv_type="q4_0")
    assert found.kv_type == "q4_0"
    assert found.n_cells == plan(smollm2_path, None, "2GiB").n_cells


def test_loss_is_less_with_more_cells_and_bits() -> None:
    for kind in ("f16", "q8_0", "q4_0"):
        losses = [kv_loss(kind, share) for share in (0.01, 0.05, 0.1, 0.3, 1.0)]
        assert losses == sorted(losses, reverse=True)
    assert kv_loss("f16", 1.0) < kv_loss("q4_0", 1.0)


def test_layers_go_where_there_is_a_device(smollm2_path, monkeypatch) -> None:
    """Without one, all layers cost it nothing."""
    assert plan(smollm2_path, None, "1GiB", n_gpu_layers=None).n_gpu_layers == 0
    monkeypatch.setattr("csp_edge.native.csp_free_device_memory", lambda: 2**30)
    assert plan(smollm2_path, None, "1GiB", n_gpu_layers=None).n_gpu_layers == 31


def test_bad_options_are_refused(demo_paths, smollm2_path) -> None:
    with pytest.raises(OptionError, match="unknown kv_type 'q3'"):
        plan(*demo_paths, "1GiB", kv_type="q3")
    for name in ("n_images", "n_pixels", "n_gpu_layers"):
        with pytest.raises(OptionError, match=name):
            plan(*demo_paths, "1GiB", **{name: -2})
    with pytest.raises(ProjectorError):
        plan(smollm2_path, demo_paths[1], "1GiB")


def test_command_prints_a_table(demo_paths, capsys) -> None:
    argv = ["plan", "-m", str(demo_paths[0]), "--memory", "1GiB", "--images", "3"]
    assert main(argv) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert rows["type of the cache"].strip() == "f16"
    assert "at most" in rows and "weights" in rows
    assert main([*argv, "--pixels", "96x96"]) == 0
    assert main(["plan", "-m", str(demo_paths[0]), "--memory", "1KiB"]) == 1
    assert "the least is" in capsys.readouterr().err


def test_every_figure_is_shown(demo_paths) -> None:
    found = plan(*demo_paths, "1GiB")
    shown = " ".join(found.rows())
    assert len(found.rows()) >= len(fields(Footprint)) and "while pruning" in shown


def test_a_context_of_ones_own_is_not_exceeded():
    with EdgeVLM.demo(memory="16GiB", n_ctx=300, cache=Full(), n_threads=1) as vlm:
        assert vlm.engine.n_ctx_max == 300
    with pytest.raises(OptionError, match="n_ctx='many'"):
        EdgeVLM.demo(memory="16GiB", n_ctx="many", cache=Full())
