"""Families of real models: small checkpoints by transformers, converted by llama.cpp's converter.

`make families` makes them.
"""

import os
from pathlib import Path

import numpy as np
import pytest

import csp_statement
from csp_edge import CSP, EdgeVLM, Full
from csp_edge.errors import ModelError, ProjectorError
from csp_edge.images import Source
from csp_edge.template import normalize_messages
from csp_edge.tokenizer import Patches
from unpatched import ROOT

MADE = ROOT / "build" / "families"
PRUNED = """
    LLaVA-1.5, LLaVA-1.6, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Idefics3, SmolVLM, InternVL, Gemma 3,
    Pixtral, Mistral Small 3.1, Llama 4, GLM-4V, Janus-Pro, MiniCPM-V 2.6
""".split(",")
PRUNED = [name.strip() for name in PRUNED]
REFUSED = ["LFM2-VL"]
COMPARED = """
    LLaVA-1.5, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, InternVL, Gemma 3, GLM-4V, Janus-Pro
""".split(",")
COMPARED = [name.strip() for name in COMPARED]
WORDS = "root ::= [a-z ]+"  # what random weights would write otherwise may be no text


@pytest.fixture(scope="module", autouse=True)
def made() -> None:
    if not (MADE / "made").exists() and "CI" not in os.environ:
        pytest.skip("make families makes them, and installs PyTorch and transformers for that")


def load(name: str, **options) -> EdgeVLM:
    return EdgeVLM(MADE / name / "model.gguf", n_threads=1, **options)


def ask(text: str, *pictures: Source) -> dict:
    images = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def tokenize(vlm: EdgeVLM, *messages: dict):
    return vlm.tokenize(normalize_messages(list(messages)))


def test_all_are_here() -> None:
    assert sorted(p.name for p in MADE.iterdir() if p.is_dir()) == sorted(PRUNED + REFUSED)


@pytest.mark.parametrize("name", PRUNED + REFUSED)
def test_full_cache(name: str, scenes) -> None:
    first = ask("What is in image 1?", *scenes[:2])
    turns = [first, {"role": "assistant", "content": "a boat"}, ask("And here?", scenes[2])]
    with load(name, cache=Full(), kv_type="f32") as vlm:
        answer = vlm.chat([first], max_tokens=6, grammar=WORDS)
        assert len({p.picture for p in answer.cache.pictures}) == 2
        assert answer.text and answer.usage.completion_tokens
        assert vlm.engine.logits.std() > 0.5

        # a second turn, on what is there already, is as if all were read at once
        with tokenize(vlm, *turns) as prompt:
            n_reused = vlm.engine.prefill(prompt).n_reused
            # a recurrent state doesn't go back to before the answer, which is another one here
            assert name in REFUSED or n_reused > answer.usage.prompt_tokens - 8
            went_on = vlm.engine.logits.copy()
            vlm.reset()
            assert vlm.engine.prefill(prompt).n_reused == 0
        np.testing.assert_allclose(went_on, vlm.engine.logits, atol=0.02)


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_cache(name: str, scenes) -> None:
    with load(name, cache=CSP(0.3)) as vlm:
        first = vlm.chat([ask("What is in image 1?", *scenes[:2])], max_tokens=6, grammar=WORDS)
        n = first.usage.prompt_tokens
        assert first.cache.cells_after == int(0.3 * n)
        assert all(len(kept) == int(0.3 * n) for layer in first.cache.kept for kept in layer)
        assert any(0 < patches.mean() < 1 for patches in first.cache.patches())
        second = vlm.chat([*vlm.messages, ask("And here?", scenes[2])], max_tokens=6, grammar=WORDS)
        assert second.usage.cached_tokens >= n
        assert second.cache.cells_after < second.cache.cells_before < second.usage.prompt_tokens
        assert second.text


def last_seen(items: list, n_tokens: int) -> np.ndarray:
    """The last token that each token's query sees: itself, or the last one of its picture."""
    seen = np.arange(n_tokens)
    start = 0
    for item in items:
        n = item.n_tokens if isinstance(item, Patches) else 1
        if isinstance(item, Patches) and not item.causal:
            seen[start : start + n] = start + n - 1
        start += n
    return seen


@pytest.mark.parametrize("name", PRUNED)
def test_kept_equals_the_statement(name: str, scenes) -> None:
    policy = CSP(40, window=0.6, recent=8, distance=0)
    with load(name, cache=policy, kv_type="f32") as vlm:
        with tokenize(vlm, ask("What is in image 1?", *scenes[:2])) as prompt:
            n = prompt.n_tokens
            window = policy.resolve(n).window
            vlm.engine.prefill(prompt, window=window, policy=policy)
        pruning = vlm.engine.prune(policy, inspect=True)
    assert {0, 1} == set(pruning.window_modality)  # the window begins within a picture
    reach = last_seen(prompt.items, n)[-window:]
    seen = np.arange(n)[None] <= reach[:, None]
    for layer in pruning.layers:
        token, k = np.stack(layer.token), np.stack(layer.k, axis=1)
        x = csp_statement.logits(layer.q.astype(float), k.astype(float), layer.kq_scale)
        modality = pruning.modality[token]
        self, cross = csp_statement.scores(x, seen, pruning.window_modality, modality, 1.0)
        np.testing.assert_allclose(np.stack(layer.self_), self, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(np.stack(layer.cross), cross, rtol=1e-3, atol=1e-5)
        for head, kept in enumerate(layer.kept):
            assert kept.tolist() == csp_statement.select(self[head], cross[head], 40, 8, None)


@pytest.mark.parametrize("name", COMPARED)
def test_logits_are_those_of_transformers(name: str) -> None:
    """Of the same pixels, by the same weights, which are f16. transformers computes in f32, and so
    does ggml, but it rounds what it multiplies them with to f16."""
    reference = np.load(MADE / name / "reference.npz")
    with load(name, cache=Full(), kv_type="f32") as vlm:
        with tokenize(vlm, ask("What is in the picture?", reference["pixels"])) as prompt:
            text = [item for item in prompt.items if isinstance(item, int)]
            assert text == reference["text"].tolist()
            vlm.engine.prefill(prompt)
        rows = []
        for token in reference["answer"]:
            rows.append(vlm.engine.logits.copy())
            vlm.engine.decode(int(token))
    error = np.abs(np.stack(rows) - reference["logits"])
    assert reference["logits"].std() > 1
    assert error.max() < 0.025


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_pruned_is_refused(name: str, scenes) -> None:
    with pytest.raises(ModelError, match="recurrent, hybrid .* use cache=Full"):
        load(name)


def test_a_projector_whose_marks_the_model_lacks(scenes) -> None:
    with (
        load("Qwen2-VL", mmproj=MADE / "Idefics3" / "mmproj.gguf") as vlm,
        pytest.raises(ProjectorError, match="no token for a mark that the projector sets"),
    ):
        vlm.chat("What is in image 1?", images=scenes[:1])


def test_table_in_the_readme(scenes) -> None:
    readme = (ROOT / "README.md").read_text()
    table = readme.partition("<!-- table: families -->\n")[2].partition("\n\n")[0]
    rows = ["| family | a picture is | pruned layers |", "|---|---|---|"]
    rows += [row(name, scenes[0]) for name in PRUNED + REFUSED]
    assert table.splitlines() == rows, "\n".join(["the table is now", *rows])


def row(name: str, picture: Path) -> str:
    with load(name, cache=Full()) as vlm:
        with tokenize(vlm, ask("What is this?", picture)) as prompt:
            tiles = [item for item in prompt.items if isinstance(item, Patches)]
        n_layer = vlm.engine.info.n_layer
    becomes = "tiles" if len(tiles) > 1 else "one piece"
    if tiles[0].n_pos < tiles[0].n_tokens:
        becomes += ", with positions by row and column"
    if not tiles[0].causal:
        becomes += ", seen both ways"
    try:
        with load(name, cache=CSP(20)) as vlm:
            kept = vlm.chat("What is this?", images=[picture], max_tokens=1).cache.kept
    except ModelError:
        return f"| {name} | {becomes} | none, only `Full()` runs it |"
    pruned = "all" if len(kept) == n_layer else "those without a sliding window or chunks"
    return f"| {name} | {becomes} | {pruned} |"
