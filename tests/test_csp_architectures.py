"""The hook in other architectures, by random models of their kind."""

import numpy as np
import pytest

import csp_statement
import tiny_models
from csp_edge import native
from csp_edge.native import llama
from test_csp import Pruned, check_kept, view


@pytest.fixture
def tiny(request, tmp_path):
    path = tmp_path / "tiny.gguf"
    getattr(tiny_models, request.param)(path)
    return str(path)


def prefill(model, n, seed=0):
    tokens = np.random.default_rng(seed).integers(0, tiny_models.N_VOCAB, n).tolist()
    logits = model.decode(tokens, 0)
    model.n_past = n
    return logits


@pytest.mark.parametrize("tiny", ["gemma2", "gpt_oss"], indirect=True)
def test_only_full_attention_is_pruned_beside_sliding_windows(tiny):
    model = Pruned(tiny, "", "f16")
    model.observe(12)
    logits = prefill(model, 200)
    layers = model.prune(40, 10)
    assert [native.csp_get_layer(model.csp, i).il for i in range(len(layers))] == [1]
    model.observe(0)
    decoded, _ = model.greedy(logits, 60)  # past the sliding window
    assert np.isfinite(decoded).all()


@pytest.mark.parametrize("tiny", ["gpt_oss"], indirect=True)
def test_scores_beside_sinks_of_the_model(tiny):
    model = Pruned(tiny, "", "f16")
    model.observe(12)
    prefill(model, 200)
    check_kept(model, model.prune(40, 10), 40, 10, None)


@pytest.mark.parametrize("tiny", ["gemma2"], indirect=True)
def test_scores_of_capped_logits(tiny):
    model = Pruned(tiny, "", "f16")
    model.observe(12)
    prefill(model, 200)
    (layer,) = model.prune(40, 10)
    x = csp_statement.logits(layer.q, layer.k, layer.scale)
    assert np.abs(x).max() > 10  # where the cap of 20 matters
    stats = model.stats
    seen = csp_statement.visible(view(stats.window_pos, 12), view(stats.pos, 200))
    modality = view(stats.window_modality, 12)
    self, _ = csp_statement.scores(
        20 * np.tanh(x / 20), seen, modality, model.modality[layer.token], 1.0
    )
    np.testing.assert_allclose(layer.self, self, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("tiny", ["gpt_oss"], indirect=True)
def test_a_sink_joins_that_of_the_model(tiny):
    """exp(sink) of the model and n add up: a small n is nothing beside it, a large one is not."""
    results = []
    for n_decode in (None, 1e-6, 1e9):
        model = Pruned(tiny, "", "f16")
        model.observe(12)
        prefill(model, 200)
        model.prune(40, 10, n_decode=n_decode)
        results.append(model.decode([7], 200))
    np.testing.assert_allclose(results[0], results[1], atol=1e-4)
    assert np.abs(results[0] - results[2]).max() > 1e-2


def picture_batch(n_past, n_rows, n_cols, rng):
    """A picture's embeddings as M-RoPE has them: one position in time, rows, columns, nothing."""
    n = n_rows * n_cols
    batch = llama.llama_batch_init(n, tiny_models.N_EMBD, 1)
    batch.n_tokens = n
    embd = np.ctypeslib.as_array(batch.embd, (n, tiny_models.N_EMBD))
    embd[:] = rng.normal(0, 1, embd.shape)
    row, col = np.divmod(np.arange(n), n_cols)
    pos = np.concatenate([np.full(n, n_past), n_past + row, n_past + col, np.zeros(n)])
    pos = np.ascontiguousarray(pos, dtype=np.int32)
    for i in range(n):
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, False
    return batch, pos


@pytest.mark.parametrize("tiny", ["qwen2vl"], indirect=True)
def test_positions_that_repeat(tiny):
    model = Pruned(tiny, "", "f16")
    rng = np.random.default_rng(0)
    model.observe(40)  # more than the text at the end: the window begins within the picture
    model.decode([1, 2, 3], 0)
    batch, pos = picture_batch(3, 6, 8, rng)
    kept_pos, batch.pos = batch.pos, pos.ctypes.data_as(type(batch.pos))
    assert not llama.llama_decode(model.ctx, batch)
    batch.pos = kept_pos
    llama.llama_batch_free(batch)
    model.decode([4, 5, 6, 7, 8], 3 + 8)
    (_, layer) = model.prune(30, 4)

    stats = model.stats
    assert stats.n_tokens == stats.n_cells == 3 + 48 + 5
    assert model.modality.tolist() == [0] * 3 + [1] * 48 + [0] * 5
    # the order of the tokens decides what a query sees, not the position
    n, w = stats.n_cells, stats.n_window
    seen = np.arange(n)[None, :] <= np.arange(n - w, n)[:, None]
    x = csp_statement.logits(layer.q, layer.k, layer.scale)
    modality = view(stats.window_modality, w)
    self, cross = csp_statement.scores(x, seen, modality, model.modality[layer.token], 1.0)
    np.testing.assert_allclose(layer.self, self, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(layer.cross, cross, rtol=2e-3, atol=1e-5)

    # the last token decoded again is one query, not two
    model.observe(40)
    model.decode([9, 10], 3 + 8 + 5)
    assert llama.llama_memory_seq_rm(llama.llama_get_memory(model.ctx), 0, 3 + 8 + 6, -1)
    model.decode([10], 3 + 8 + 6)
    model.prune(20, 2)
    assert view(model.stats.window_pos, model.stats.n_window).tolist() == [16, 17]


@pytest.mark.parametrize(
    ("tiny", "message"),
    [
        ("mamba", "recurrent"),
        ("deepseek2", "MLA"),
        ("bloom", "bias by distance"),
    ],
    indirect=["tiny"],
)
def test_what_cannot_be_pruned_is_refused(tiny, message):
    with pytest.raises(AssertionError, match=message):
        Pruned(tiny, "", "f16")
