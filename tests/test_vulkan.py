"""Layers on a Vulkan device: the same cache is kept, and the same answer given, as on the CPU.

Where there is no other device it is lavapipe, a driver that computes on the CPU. The backend is
compiled as a plugin of the libraries that all tests use, and runs in a process of its own: when a
driver crashes, tests fail.
"""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import csp_statement
from csp_edge import CSP, EdgeVLM, native
from csp_edge.engine import Engine
from csp_edge.policies import AdaKV
from small_gguf import MMPROJ, MODEL, unquantize
from test_backends import BLUE, STAR, answer, conversation, recollection
from test_csp_engine import engine_on, greedy, prefill
from unpatched import ROOT, tools

PACKAGES = "glslc libvulkan-dev mesa-vulkan-drivers spirv-headers"  # as in .ci/run


def build():
    """Build the plugin, or what changed since the last time, in build/vulkan. Returns its path."""
    directory = ROOT / "build" / "vulkan"
    configure = ["cmake", "-S", ROOT, "-B", directory, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    configure += ["-DGGML_VULKAN=ON", "-DGGML_BACKEND_DL=ON", "-DGGML_NATIVE=OFF"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", "-Wno-author"]
    done = subprocess.run(configure, env=tools(), capture_output=True, text=True)
    is_lacking = "find Vulkan" in done.stderr or "SPIRV-Headers" in done.stderr
    drivers = [*Path("/etc/vulkan/icd.d").glob("*"), *Path("/usr/share/vulkan/icd.d").glob("*")]
    if is_lacking or not drivers:
        message = f"Vulkan's build tools or drivers are missing: apt install {PACKAGES}"
        (pytest.fail if "CI" in os.environ else pytest.skip)(message)
    assert done.returncode == 0, done.stderr
    command = ["cmake", "--build", directory, "--target", "ggml-vulkan", "--", "--quiet"]
    subprocess.run(command, env=tools(), check=True)
    return directory / "bin" / "libggml-vulkan.so"


def load(plugin):
    if native.llama._lib.ggml_backend_reg_by_name(b"Vulkan"):
        return  # built in
    assert native.llama._lib.ggml_backend_load(os.fsencode(plugin)), f"{plugin} does not load"


@pytest.fixture(scope="module")
def on_vulkan():
    """Calls a function in a process that has the plugin."""
    plugin = build()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GGML_VK_VISIBLE_DEVICES", "0")  # else ggml leaves a CPU out
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn, load, (plugin,)) as process:
            yield lambda *call, **options: process.submit(*call, **options).result()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """The demo model in F32: of what quantized weights are multiplied with, the CPU rounds more."""
    folder = tmp_path_factory.mktemp("f32")
    return unquantize(MODEL, folder / "model.gguf"), unquantize(MMPROJ, folder / "mmproj.gguf")


def check_close(ours, theirs, tolerance):
    """The same texts, nearly the same tokens kept, and logits by their normalized square error."""
    for result, other in zip(ours[0], theirs[0], strict=True):
        assert result.text == other.text
        heads = [head for layer in result.cache.kept for head in layer]
        expected = [head for layer in other.cache.kept for head in layer]
        shares = [
            len(np.intersect1d(kept, wanted)) / max(len(kept), len(wanted))
            for kept, wanted in zip(heads, expected, strict=True)
        ]
        # a choice that was a close one has others follow
        assert min(shares) > 0.75 and np.mean(shares) > 0.95
    for logits, expected in zip(ours[1], theirs[1], strict=True):
        assert np.square(logits - expected).sum() < tolerance * np.square(expected).sum()


@pytest.fixture(scope="module")
def on_cpu(scenes, paths):
    return conversation(scenes[:4], paths[0])


@pytest.mark.parametrize("n_gpu_layers", [-1, 4])
def test_a_conversation(on_vulkan, scenes, paths, on_cpu, n_gpu_layers):
    ours = on_vulkan(conversation, scenes[:4], paths[0], n_gpu_layers=n_gpu_layers)
    check_close(ours, on_cpu, 1e-3)


@pytest.mark.parametrize("n_gpu_layers", [-1, 20])
def test_text(on_vulkan, smollm2_path, n_gpu_layers):
    ours = on_vulkan(answer, smollm2_path, n_gpu_layers=n_gpu_layers)
    check_close(ours, answer(smollm2_path), 1e-2)


def test_recall(on_vulkan, scenes, paths):
    ours = on_vulkan(recollection, scenes, paths[0], n_gpu_layers=-1)
    check_close(ours, recollection(scenes, paths[0]), 1e-2)


def resumed(path, **options):
    with EdgeVLM.load(path, n_threads=1, **options) as vlm:
        return [vlm.chat([*vlm.messages, BLUE])], [vlm.engine.logits.copy()]


def test_a_conversation_saved_here_goes_on_there(on_vulkan, scenes, paths, tmp_path):
    with EdgeVLM(paths[0], cache=CSP(0.2), n_threads=1) as vlm:
        vlm.chat(STAR, scenes[:4])
        vlm.save(tmp_path / "talk.csp")
    ours = on_vulkan(resumed, tmp_path / "talk.csp", n_gpu_layers=-1)
    check_close(ours, resumed(tmp_path / "talk.csp"), 1e-3)


# which cells are kept, by what scores


def pruned(paths, budget, **options):
    """What pruning saw and did, the logits of a redecode, and the policy's settings."""
    engine = engine_on(paths, **options)
    prefill(engine, 4)
    pruning = engine.prune(CSP(budget, recent=12, distance=0.0), inspect=True)
    engine.redecode()
    logits = engine.logits.copy()
    engine.close()
    return pruning, logits


def test_kept_equals_the_statement_and_the_cpu(on_vulkan, paths):
    ours, logits = on_vulkan(pruned, paths, 60, n_gpu_layers=-1)
    theirs, expected = pruned(paths, 60)
    n_different = 0
    for layer, other in zip(ours.layers, theirs.layers, strict=True):
        for h, kept in enumerate(layer.kept):
            # of the very scores there is no doubt
            scores = layer.self_[h].astype(np.float64), layer.cross[h].astype(np.float64)
            stated = csp_statement.select(*scores, 60, 12, None)
            assert kept.tolist() == layer.token[h][stated].tolist()
            # the CPU's differ by what rounding makes of them: only cells that tie may change places
            cross = other.cross[h]
            np.testing.assert_allclose(layer.cross[h], cross, rtol=2e-2, atol=2e-3 * cross.max())
            different = np.setxor1d(kept, other.kept[h])
            assert not len(different) or np.ptp(cross[different]) < 2e-2 * cross[different].max()
            n_different += len(different)
    assert n_different <= 4
    np.testing.assert_allclose(logits, expected, atol=0.1)


# the cache's memory


def resized(paths, n_device, **options):
    """Logits of a cache that grows and is pruned, and its cells, which are where they should be."""
    engine = Engine(*paths, n_threads=1, prune=True, **options)
    logits, sizes = [], []

    def go_on():
        logits.append(greedy(engine, 3)[-1])
        memory = native.csp_get_memory(engine._ctx)
        n_bytes = engine.n_cells_max * engine.bytes_per_cell
        share = n_device / engine.info.n_layer
        assert (memory.device_cache, memory.cache) == (n_bytes * share, n_bytes * (1 - share))
        sizes.append(engine.n_cells_max)

    prefill(engine, 12)
    go_on()
    for policy in (CSP(100, sink="mass"), AdaKV(60)):
        engine.prune(policy)
        engine.observe(16)
        go_on()
    engine._hook.resize(768)
    go_on()
    engine.close()
    return logits, sizes


@pytest.mark.parametrize(
    ("n_gpu_layers", "n_device", "kv_type"), [(-1, 6, "f16"), (4, 3, "f16"), (-1, 6, "q8_0")]
)
def test_the_cache_is_on_the_device(on_vulkan, paths, n_gpu_layers, n_device, kv_type):
    ours, sizes = on_vulkan(resized, paths, n_device, kv_type=kv_type, n_gpu_layers=n_gpu_layers)
    theirs, _ = resized(paths, 0, kv_type=kv_type)
    assert sizes == [1024, 512, 512, 768]
    for logits, expected in zip(ours, theirs, strict=True):
        assert np.square(logits - expected).sum() < 1e-2 * np.square(expected).sum()
