"""A cache that grows and shrinks: nothing but the memory it takes may tell."""

import json
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import tiny_models
from csp_edge import CSP
from csp_edge.engine import Engine
from csp_edge.errors import MemoryLimitError
from csp_edge.images import Pictures
from csp_edge.memory import resident_memory
from csp_edge.native import llama
from csp_edge.policies import AdaKV, Pyramid, SnapKV
from test_csp import TEXT
from test_csp_engine import greedy, tokenize

N_CTX = 1024
MIB = 2**20


class Fixed(Engine):
    """All cells from the start, and never another number of them."""

    def _init_context(self, n_ubatch, n_ctx, n_cells=None):
        super()._init_context(n_ubatch, n_ctx, n_ctx)

    def _resize(self, n_cells):
        pass


class Restless(Engine):
    """Another number of cells at every decode."""

    rng = np.random.default_rng(0)
    sizes = frozenset()

    def _shake(self, n_new):
        n_least = self.n_cells + n_new
        self._hook.resize(int(self.rng.integers(n_least, N_CTX + 1)))
        assert n_least <= self.n_cells_max <= N_CTX
        self.sizes |= {self.n_cells_max}

    def _decode_text(self, tokens, *, want_logits):
        self._shake(len(tokens))
        super()._decode_text(tokens, want_logits=want_logits)

    def _decode_picture(self, handle, item, embedding):
        self._shake(item.n_tokens)
        super()._decode_picture(handle, item, embedding)


@pytest.fixture
def model(request, demo_paths, smollm2_path, tmp_path):
    """Files, and what makes a prompt for an engine on them."""
    if request.param == "demo":
        return demo_paths, lambda engine: tokenize(engine, 6)
    if request.param == "smollm2":
        return (smollm2_path, None), lambda engine: engine.tokenizer.tokenize([TEXT[:250]])
    path, mmproj = tmp_path / "tiny.gguf", None
    getattr(tiny_models, request.param)(path, demo_paths[0])
    text = "What is in image 2? "
    parts = [text * 60]
    if request.param == "qwen2vl":
        mmproj = tmp_path / "mmproj.gguf"
        tiny_models.qwen2vl_projector(mmproj)
        rng = np.random.default_rng(0)
        sizes = [(64, 48), (128, 128), (48, 96)]
        pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
        parts = [text, *(x for p in Pictures().open(pictures) for x in (p, text * 5))]
    return (path, mmproj), lambda engine: engine.tokenizer.tokenize(parts)


def life(engine, prompt_of):
    """What a cache lives through, and all that comes out of it."""
    found = []

    def prune(policy):
        for layer in engine.prune(policy).layers:
            found.extend(layer.kept)
        engine.redecode()
        engine.observe(8)
        found.append(greedy(engine, 12))

    with prompt_of(engine) as prompt:
        engine.prefill(prompt, window=12)
    found.append(greedy(engine, 3))
    # twice, the second time with chosen cells; heads of one length and of several; sinks
    for policies in ((CSP(60, sink="mass"), AdaKV(40, window=8)), (Pyramid(50), CSP(30))):
        engine.observe(0)
        engine.cut(0)
        with prompt_of(engine) as prompt:
            engine.prefill(prompt, window=12)
        for policy in policies:
            prune(policy)
    return found


@pytest.mark.parametrize(
    ("model", "kv_type"),
    [
        ("demo", "f16"),
        ("demo", "q8_0"),
        ("demo", "q4_0"),
        ("demo", "f32"),
        ("smollm2", "f16"),
        ("gemma2", "f16"),
        ("gemma2", "q4_0"),
        ("qwen2vl", "f16"),
        ("qwen2vl", "q8_0"),
    ],
    indirect=["model"],
)
def test_logits_do_not_depend_on_the_size(model, kv_type):
    paths, prompt_of = model
    engines = [
        kind(*paths, n_ctx=N_CTX, n_ubatch=128, n_threads=1, kv_type=kv_type, prune=True)
        for kind in (Fixed, Restless)
    ]
    fixed, restless = [life(engine, prompt_of) for engine in engines]
    assert engines[0].n_cells_max == N_CTX
    assert engines[1].sizes == {*range(256, N_CTX + 1, 256)}
    assert len(fixed) == len(restless)
    for a, b in zip(fixed, restless, strict=True):
        np.testing.assert_array_equal(a, b)
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("model", ["demo", "gemma2"], indirect=True)
@pytest.mark.parametrize("policy", [None, CSP(40, sink="mass"), AdaKV(40)])
def test_a_snapshot_goes_into_a_cache_of_another_size(model, policy):
    paths, prompt_of = model
    engine = Engine(*paths, n_ctx=N_CTX, n_ubatch=128, n_threads=1, prune=True)
    with prompt_of(engine) as prompt:
        engine.prefill(prompt, window=16)
    if policy:
        engine.prune(policy)
        engine.redecode()
        engine.observe(8)
        greedy(engine, 9)
    token = engine.items[-1]
    snapshot = engine.snapshot()
    runs = []
    for size in (None, N_CTX, 0, None):
        if size is not None:
            engine.clear()
            engine._hook.resize(size)
        engine.restore(snapshot)
        engine.decode(token)
        runs.append(greedy(engine, 5))
        layers = engine.prune(CSP(30, lookahead=0)).layers
        engine.decode(token)
        runs.append(np.stack([kept for layer in layers for kept in layer.kept]))
        runs.append(greedy(engine, 3))
    for i, run in enumerate(runs[3:]):
        np.testing.assert_array_equal(run, runs[i % 3])
    engine.close()


@pytest.fixture
def engine(tmp_path, demo_paths):
    """A cache of 256 B a cell and layer, two layers."""
    tiny_models.qwen2vl(tmp_path / "tiny.gguf", demo_paths[0])
    engine = Engine(tmp_path / "tiny.gguf", n_ctx=2**20, n_ubatch=128, n_threads=1, prune=True)
    with engine.tokenizer.tokenize(["What is in image 2? " * 60]) as prompt:
        engine.prefill(prompt, window=16)
    yield engine
    engine.close()


def ahead(engine, n=4):
    """Logits that come next, the cache then as before."""
    snapshot = engine.snapshot()
    engine.decode(engine.items[-1])
    found = greedy(engine, n)
    engine.restore(snapshot)
    return found


@pytest.mark.parametrize("policy", [None, AdaKV(300)])
def test_sizes_that_cannot_be(engine, policy):
    if policy:
        engine.prune(policy)
        engine.decode(engine.items[-1])
    expected, size = ahead(engine), engine.n_cells_max
    n_used = engine.n_cells
    assert n_used > 256
    with pytest.raises(MemoryLimitError, match=f"n_cells = {n_used - 1}, but {n_used} are in use"):
        engine._hook.resize(n_used - 1)
    with pytest.raises(MemoryLimitError, match="n_cells = 1048577 is beyond n_ctx = 1048576"):
        engine._hook.resize(2**20 + 1)
    assert engine.n_cells_max == size
    np.testing.assert_array_equal(ahead(engine), expected)
    engine._hook.resize(n_used)
    assert n_used <= engine.n_cells_max < n_used + 256
    np.testing.assert_array_equal(ahead(engine), expected)


@contextmanager
def address_space(n_more):
    """This process may take no more than that many bytes beyond what it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    n_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = n_pages * resource.getpagesize() + n_more
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(sys.platform != "linux", reason="limits by Linux' own files")
@pytest.mark.parametrize("policy", [None, CSP(300), AdaKV(300)])
@pytest.mark.parametrize("n_layers", [0, 1])
def test_no_memory_to_grow(engine, policy, n_layers):
    """It fails at the first layer, or at the second: then the first one goes back."""
    if policy:
        engine.prune(policy)
        engine.decode(engine.items[-1])
    expected, size = ahead(engine), engine.n_cells_max
    layer = 2**19 * 256
    resident = resident_memory()
    refused = pytest.raises(MemoryLimitError, match="no memory for a cache of 524288 cells")
    with refused, address_space(n_layers * layer + layer // 2):
        engine._hook.resize(2**19)
    assert engine.n_cells_max == size
    assert resident_memory() < resident + layer // 8
    np.testing.assert_array_equal(ahead(engine), expected)
    # there and back again, now that there is memory
    engine._hook.resize(2**12)
    np.testing.assert_array_equal(ahead(engine), expected)
    engine._hook.resize(engine.n_cells)
    np.testing.assert_array_equal(ahead(engine), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="limits by Linux' own files")
def test_no_memory_to_shrink(engine):
    engine._hook.resize(2**18)
    expected = ahead(engine)
    with address_space(2**12):
        engine._hook.resize(2**17)
    assert engine.n_cells_max == 2**17
    np.testing.assert_array_equal(ahead(engine), expected)
    engine._hook.resize(2**18)
    np.testing.assert_array_equal(ahead(engine), expected)
    engine._hook.resize(0 + engine.n_cells)
    np.testing.assert_array_equal(ahead(engine), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="counted by Linux' own files")
def test_cells_take_memory_once_they_are_used(engine):
    expected, resident = ahead(engine), resident_memory()
    engine._hook.resize(2**18)
    # what llama.cpp notes of each cell is some 50 bytes
    assert resident_memory() - resident < 2**18 * engine.bytes_per_cell / 4
    np.testing.assert_array_equal(ahead(engine), expected)


CYCLES = """
import json, sys
from pathlib import Path
from csp_edge import CSP
from csp_edge.engine import Engine
from csp_edge.memory import resident_memory

options = dict(n_ctx=8192, n_ubatch=64, n_threads=1, kv_type="f32", prune=True)
engine = Engine(Path(sys.argv[1]), **options)
figures = []
for _ in range(2):
    with engine.tokenizer.tokenize(["What is in image 2? " * 700]) as prompt:
        engine.prefill(prompt, window=16)
    before, n_cells = resident_memory(), engine.n_cells
    engine.prune(CSP(0.1))
    after, n_evicted = resident_memory(), n_cells - engine.n_cells
    engine.clear()
    figures.append((n_cells, n_evicted * engine.bytes_per_cell, before, after, resident_memory()))
print(json.dumps(figures))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counted by Linux' own files")
def test_memory_is_given_back(tmp_path, demo_paths, monkeypatch):
    monkeypatch.setattr(tiny_models, "HEAD_DIM", 128)
    monkeypatch.setattr(tiny_models, "N_LAYER", 16)
    tiny_models.qwen2vl(tmp_path / "large.gguf", demo_paths[0])
    command = [sys.executable, "-c", CYCLES, str(tmp_path / "large.gguf")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(result.stdout)
    for n_cells, evicted, before, after, _ in figures:
        assert n_cells > 4096 and evicted > 56 * MIB
        # with them goes what their attention was computed in, and what the heap has free on top
        assert 0.95 < (before - after) / evicted < 1.15
    for column in list(zip(*figures, strict=True))[3:]:  # nothing piles up
        assert max(column) - min(column) < 2 * MIB


@pytest.mark.parametrize("model", ["qwen2vl", "gemma2"], indirect=True)
@pytest.mark.parametrize("policy", [CSP(100), CSP(0.2, sink="mass"), SnapKV(100, recent=0)])
def test_an_answer_without_end(model, policy, monkeypatch):
    engine = Engine(model[0][0], max_cells=256, n_threads=1)
    monkeypatch.setattr(engine, "_decode_text", watched(engine, engine._decode_text, 256))
    with engine.tokenizer.tokenize(["What is in image 2? " * 60]) as prompt:
        engine.prefill(prompt, window=8, policy=policy)
    n_past, n_tokens = prompt.n_pos, prompt.n_tokens
    for i in range(2000):
        engine.decode(int(engine.logits.argmax()))
        assert engine.n_past == n_past + i + 1 == last_position(engine) + 1
    assert engine.n_tokens == n_tokens + 2000
    assert engine.n_cells <= 256
    engine.close()


def watched(engine, decode, n_most):
    """`decode`, of which no call may see or leave a cache beyond its bound."""

    def call(tokens, **options):
        decode(tokens, **options)
        assert engine.n_cells <= n_most and engine.n_cells_max <= n_most
        assert not options["want_logits"] or np.isfinite(engine.logits).all()

    return call


def last_position(engine):
    return llama.llama_memory_seq_pos_max(llama.llama_get_memory(engine._ctx), 0)
