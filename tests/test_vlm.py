"""EdgeVLM on the embedded model and on SmolLM2."""

import base64
import gc
import io
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

import csp_edge.encoder
import tiny_models
from csp_edge import CSP, EdgeVLM, Full, vlm
from csp_edge.engine import Engine
from csp_edge.errors import (
    CspEdgeError,
    MemoryLimitError,
    ModelError,
    OptionError,
    PromptError,
)
from csp_edge.eval.suite import COLOR_HELD_OUT
from csp_edge.images import Pictures
from csp_edge.policies import POLICIES, AdaKV, Policy, Pyramid, policy
from small_gguf import MMPROJ, MODEL, copy

FRANCE = "What is the capital of France? Answer in one sentence."
STAR = "What color is the star in image 2?"
SQUARE = "What color is the square in image 3?"
CROSS = "What color is the cross in image 3?"


def small(**options):
    """The embedded model on one thread."""
    return EdgeVLM.demo(n_threads=1, **options)


def user(text, images=()):
    pictures = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def pruned():
    """The embedded model over a cache pruned to a fifth."""
    with small(cache=CSP(0.2)) as vlm:
        yield vlm


@pytest.fixture(autouse=True)
def forgotten(request):
    """Each test begins a new conversation."""
    yield
    for name in {"demo", "pruned", "smollm2"} & set(request.fixturenames):
        request.getfixturevalue(name).reset()


# answers


def test_answers_about_pictures(demo, scenes, contents):
    colours = {}
    for i, scene in enumerate(scenes[:5], 1):
        for thing in contents[scene.name]:
            colour, _, shape = thing.rpartition(" ")
            # but for the pairs that training never shows
            if colour and COLOR_HELD_OUT[shape] != colour:
                colours[f"What color is the {shape} in image {i}?"] = colour
    assert len(colours) == 5
    answers = {question: demo.chat(question, scenes[:5]).text for question in colours}
    assert answers == colours


def test_a_result_says_what_it_took(demo, scenes):
    result = demo.chat(STAR, scenes[:2])
    assert result.text == "blue"
    assert result.finish_reason == "stop"
    usage = result.usage
    assert usage.image_tokens == 2 * 64
    assert usage.prompt_tokens > usage.image_tokens
    assert (usage.cached_tokens, usage.completion_tokens) == (0, 1)
    assert result.timings.first_token_s > result.timings.prefill_s > 0
    cells = usage.prompt_tokens
    assert result.cache.cells_before == result.cache.cells_after == cells
    # 6 layers, 2 KV heads of 64, K and V, two bytes each
    assert result.cache.bytes_before == cells * 6 * 2 * 64 * 2 * 2
    assert result.cache.kept == []
    assert [p.shape for p in result.cache.patches()] == [(8, 8)] * 2


def test_text_alone_works_with_and_without_a_projector(demo, smollm2):
    assert demo.chat("How many images?", max_tokens=4).usage.image_tokens == 0
    answer = smollm2.chat(FRANCE, max_tokens=20)
    assert "Paris" in answer.text


def test_messages_in_openais_shape(demo, scenes):
    pixels = np.asarray(Image.open(scenes[1]).convert("RGB"))
    png = scenes[1].read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(png).decode()
    demo.chat(STAR, scenes[:2])
    n_encoded = demo.engine.encoder.n_encoded
    for source in (str(scenes[1]), png, uri, Image.open(io.BytesIO(png)), pixels):
        assert demo.chat(STAR, [scenes[0], source]).text == "blue"
    parts = [{"type": "image_url", "image_url": {"url": uri}}] * 2
    content = [*parts, {"type": "text", "text": STAR}]
    assert demo.chat([{"role": "user", "content": content}]).text == "blue"
    # the same pictures all along, by content
    assert demo.engine.encoder.n_encoded == n_encoded


def test_exactly_one_bos(demo, smollm2):
    for each in (demo, smollm2):
        bos = each.engine.tokenizer.tokenize([each.engine.tokenizer.bos_text]).items
        assert len(bos) == 1
        items = each.tokenize(vlm.normalize_messages("hello")).items
        assert items[0] == bos[0]
        assert items[1] != bos[0]


# streaming


def test_a_stream_is_the_answer_in_pieces(demo, scenes):
    whole = demo.chat("What is in image 3?", scenes[:4])
    stream = demo.chat("What is in image 3?", scenes[:4], stream=True)
    assert stream.result is None
    pieces = list(stream)
    assert len(pieces) == whole.usage.completion_tokens > 2
    assert "".join(pieces) == stream.result.text == whole.text
    assert stream.result.finish_reason == "stop"
    assert list(stream) == []


def cancel_by_closing(stream):
    stream.close()
    stream.close()


def cancel_by_leaving(stream):
    with stream:
        pass


def cancel_by_letting_go(stream):
    del stream
    gc.collect()


@pytest.mark.parametrize("cancel", [cancel_by_closing, cancel_by_leaving, cancel_by_letting_go])
@pytest.mark.parametrize("n_taken", [0, 2])
def test_a_stream_can_be_cancelled(smollm2, cancel, n_taken):
    question = [user("Tell me about Paris.")]
    full = smollm2.chat(question, max_tokens=8)
    stream = smollm2.chat(question, max_tokens=8, stream=True)
    said = [next(stream) for _ in range(n_taken)]
    cells = smollm2.engine.n_cells
    cancel(stream)
    del stream
    assert smollm2.engine.n_cells == cells
    # the conversation goes on from what was said
    after = [*question, assistant("".join(said) or "Well."), user("And Rome?")]
    assert smollm2.chat(after, max_tokens=1).usage.cached_tokens >= full.usage.prompt_tokens
    assert smollm2.chat(question, max_tokens=8).text == full.text


def test_a_cancelled_stream_says_so(smollm2):
    with smollm2.chat("Tell me about Paris.", stream=True) as stream:
        said = next(stream) + next(stream)
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.text == said
    with pytest.raises(StopIteration):
        next(stream)


def test_breaking_out_of_a_stream_and_asking_again(demo, scenes):
    for _ in demo.chat("What is in image 3?", scenes[:4], stream=True):
        break
    assert demo.chat(STAR, scenes[:2]).text == "blue"


def test_a_later_chat_on_the_same_thread_closes_an_open_stream(demo, scenes):
    stream = demo.chat("What is in image 3?", scenes[:4], stream=True)
    next(stream)
    assert demo.chat(STAR, scenes[:2]).text == "blue"
    with pytest.raises(CspEdgeError, match="closed by a later chat"):
        next(stream)


def test_letting_go_of_a_stream_lets_others_on(demo, scenes):
    answers = []
    other = threading.Thread(
        target=lambda: answers.append(demo.chat(STAR, scenes[:2]).text), daemon=True
    )
    gc.disable()
    try:
        for _ in demo.chat("What is in image 3?", scenes[:4], stream=True):
            break
        other.start()
        other.join(20)
    finally:
        gc.enable()
    assert answers == ["blue"]


def test_a_stream_outlives_the_thread_that_asked(demo, scenes):
    whole = demo.chat("What is in image 3?", images=scenes).text
    streams, answers = [], []

    def ask():
        streams.append(demo.chat("What is in image 3?", images=scenes, stream=True))

    def wait():
        answers.append(demo.chat("What is in image 1?", images=scenes[:1]).text)

    for target in ask, wait:
        # of a thread that has ended, the next one mostly gets the ident
        thread = threading.Thread(target=target, daemon=True)
        thread.start()
        thread.join(0.5 if target is wait else None)
    assert not answers
    assert "".join(streams.pop()) == whole
    thread.join()
    assert answers


def test_a_stream_can_be_cancelled_by_another_thread(smollm2):
    pieces = []
    stream = smollm2.chat("Tell me about Paris.", stream=True)
    reader = threading.Thread(target=lambda: pieces.extend(stream))
    reader.start()
    while not pieces:
        reader.join(0.01)
    stream.close()
    reader.join()
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.text == "".join(pieces)


def test_finish_reasons(smollm2):
    question = "Count from one to twenty."
    long = smollm2.chat(question, max_tokens=12)
    assert (long.finish_reason, long.usage.completion_tokens) == ("length", 12)
    word = long.text.split()[3]
    stopped = smollm2.chat(question, max_tokens=12, stop=[word, "unseen"])
    assert stopped.finish_reason == "stop"
    assert stopped.text == long.text[: long.text.index(word)]


def test_sampling(smollm2):
    def draw(seed, **options):
        return smollm2.chat("Invent a name.", max_tokens=8, seed=seed, **options).text

    assert draw(1, temperature=1.5) == draw(1, temperature=1.5)
    assert len({draw(seed, temperature=1.5) for seed in range(4)}) > 1
    assert len({draw(seed) for seed in range(3)}) == 1


def test_tokens_that_the_model_suppresses_are_not_drawn(demo, tmp_path, scenes):
    assert demo.chat(STAR, scenes[:2]).text == "blue"
    blue = demo.engine.items[-1]
    path = copy(MODEL, tmp_path / "m.gguf", tokenizer__ggml__suppress_tokens=[blue])
    with EdgeVLM(path, mmproj=MMPROJ, cache=Full(), n_threads=1) as vlm:
        assert vlm.chat(STAR, scenes[:2]).text != "blue"
        assert "blue" not in vlm.chat(STAR, scenes[:2], temperature=0.5, seed=1).text


def test_a_json_schema_and_a_grammar(smollm2):
    schema = {"type": "object", "properties": {"n": {"enum": [3, 7]}}, "required": ["n"]}
    for seed in range(3):
        answer = smollm2.chat("Say it.", json_schema=schema, temperature=2.0, seed=seed)
        assert "".join(answer.text.split()) in ('{"n":3}', '{"n":7}')
        assert answer.finish_reason == "stop"
    assert smollm2.chat("Well?", grammar='root ::= "ü" "€"').text == "ü€"


# conversations


def test_a_conversation_prefills_only_what_is_new(demo, scenes):
    messages = [user(STAR, scenes[:4])]
    first = demo.chat(messages)
    messages += [assistant(first.text), user(SQUARE)]
    second = demo.chat(messages)
    assert second.text == "orange"
    # the prompt and the answer were there; the end of the answer is not in the cache
    assert second.usage.cached_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
    messages += [assistant(second.text), user(CROSS)]
    third = demo.chat(messages)
    assert third.text == "green"
    assert third.usage.cached_tokens == second.usage.prompt_tokens + 1

    reused = demo.engine.logits.copy()
    demo.reset()
    assert demo.chat(messages).usage.cached_tokens == 0
    np.testing.assert_allclose(demo.engine.logits, reused, atol=0.1)


def test_a_conversation_of_text(smollm2):
    messages = [user(FRANCE)]
    first = smollm2.chat(messages, max_tokens=20)
    messages += [assistant(first.text), user("And of Italy?")]
    second = smollm2.chat(messages, max_tokens=20)
    assert second.usage.cached_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
    assert "Rome" in second.text


def test_another_question_about_the_same_pictures_keeps_them(demo, scenes):
    first = demo.chat(STAR, scenes[:4])
    n_encoded = demo.engine.encoder.n_encoded
    second = demo.chat(CROSS, scenes[:4])
    assert second.text == "green"
    assert 4 * 64 < second.usage.cached_tokens < first.usage.prompt_tokens
    assert demo.engine.encoder.n_encoded == n_encoded


def test_the_same_question_again_gives_the_same_answer(demo, pruned, scenes):
    for each in (demo, pruned):
        answers = {each.chat("What is in image 3?", scenes[:4]).text for _ in range(3)}
        assert len(answers) == 1


def test_a_picture_is_encoded_once(scenes):
    with small(cache=Full()) as vlm:
        vlm.chat(STAR, scenes[:2])
        vlm.reset()
        vlm.chat(STAR, [scenes[1], scenes[1], scenes[0]])
        assert vlm.engine.encoder.n_encoded == 2
        vlm.chat("What is in image 1?", scenes[2:3])
        assert vlm.engine.encoder.n_encoded == 3


def test_the_embedding_cache_is_bounded_and_drops_the_oldest(scenes, monkeypatch):
    one = 64 * 256 * 4
    monkeypatch.setattr(csp_edge.encoder, "EMBEDDING_CACHE_BYTES", 2 * one)
    with small(cache=Full()) as vlm:
        for picture, n_encoded in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
            vlm.chat("What is in image 1?", [scenes[picture]], max_tokens=1)
            assert vlm.engine.encoder.n_encoded == n_encoded
        assert sum(e.nbytes for e in vlm.engine.encoder.embeddings.values()) == 2 * one
        # more than fits still gives right answers
        assert vlm.chat(STAR, scenes[:4]).text == "blue"


# pruning


def test_pruning_to_a_budget(pruned, scenes):
    result = pruned.chat(STAR, scenes[:4])
    assert result.text == "blue"
    cache = result.cache
    assert cache.cells_before == result.usage.prompt_tokens == 280
    assert cache.cells_after == 56
    assert cache.bytes_after * 5 == cache.bytes_before
    assert np.shape(cache.kept) == (6, 2, 56)
    for kept in map(np.stack, cache.kept):
        assert (np.diff(kept.astype(int), axis=1) > 0).all()
        assert (kept[:, -14:] == np.arange(266, 280)).all()  # the recent ones
    assert result.timings.prune_s > 0

    shares = cache.patches()
    assert [share.shape for share in shares] == [(8, 8)] * 4
    first = cache.pictures[0]
    heads = np.stack(cache.kept).reshape(12, -1)
    for i in range(64):
        assert shares[0].flat[i] == pytest.approx((heads == first.start + i).any(axis=1).mean())
    assert (cache.pruning.modality[first.start : first.start + 64] == 1).all()
    assert (cache.pruning.modality == 1).sum() == 4 * 64
    # the answer that was looked at is in the cache beside them
    assert cache.n_tokens == 280 and cache.pruning.n_tokens == 281
    assert pruned.engine.n_cells == 57


def test_a_budget_in_cells_and_one_that_evicts_nothing(scenes):
    with small(cache=CSP(50, window=8, recent=4)) as vlm:
        cache = vlm.chat(STAR, scenes[:4]).cache
        assert (cache.cells_before, cache.cells_after) == (280, 50)
        assert cache.pruning.n_window == 8 + 1
        cache = vlm.chat("How many images?").cache
        assert cache.cells_before == cache.cells_after < 50
        assert cache.pruning is None


def test_a_second_turn_over_a_pruned_cache(pruned, scenes):
    messages = [user(STAR, scenes[:4])]
    first = pruned.chat(messages)
    messages += [assistant(first.text), user(SQUARE)]
    second = pruned.chat(messages)
    n_new = second.usage.prompt_tokens - second.usage.cached_tokens
    assert second.usage.cached_tokens == first.usage.prompt_tokens + 1
    # what the first turn kept, its answer, and the new turn
    assert second.cache.cells_before == first.cache.cells_after + 1 + n_new
    assert second.cache.cells_after == second.usage.prompt_tokens // 5
    pruning = second.cache.pruning
    assert pruning.n_tokens == second.usage.prompt_tokens + 1
    assert (pruning.pos == np.arange(pruning.n_tokens)).all()
    assert (pruning.modality == 1).sum() == 4 * 64
    for before, after in zip(first.cache.kept, second.cache.kept, strict=True):
        for old, new in zip(before, after, strict=True):
            assert set(new[new < first.usage.prompt_tokens]) <= set(old)
    assert pruned.engine.n_past == second.usage.prompt_tokens + second.usage.completion_tokens


@pytest.mark.parametrize("name", POLICIES)
def test_two_turns_over_every_policy(name, scenes):
    with small(cache=policy(name, budget=40) if name != "full" else Full()) as vlm:
        messages = [user(STAR, scenes[:4])]
        for question in (SQUARE, CROSS):
            first = vlm.chat(messages)
            messages += [assistant(first.text), user(question)]
        second = vlm.chat(messages, max_tokens=4)
        assert second.usage.cached_tokens > 64 * 4
        if name == "full":
            assert second.cache.cells_after == second.usage.prompt_tokens
            return
        kept = [len(head) for layer in second.cache.kept for head in layer]
        assert second.cache.cells_after == max(kept) < 80
        assert (len(set(kept)) > 1) == (name in ("pyramid", "adakv"))
        # a head's share of what it keeps, whatever its budget
        shares = np.concatenate([share.ravel() for share in second.cache.patches()])
        pictures = second.cache.pruning.modality == 1
        heads = [head for layer in second.cache.kept for head in layer]
        assert shares.sum() == pytest.approx(sum(pictures[head].sum() for head in heads) / 12)


def test_a_policy_of_ones_own(scenes):
    class Last(Policy):
        def select(self, layer):
            n_heads, n_cells = layer.token.shape
            return [np.arange(n_cells - layer.budget + 3 * h, n_cells) for h in range(n_heads)]

    with small(cache=Last(40)) as vlm:
        messages = [user(STAR, scenes[:4])]
        # the second time it is asked for each head by itself, as they hold differently many cells
        for second in (37, 40):
            answer = vlm.chat(messages, max_tokens=4)
            n = answer.usage.prompt_tokens
            for layer in answer.cache.kept:
                assert [head.tolist() for head in layer] == [
                    [*range(n - 40, n)],
                    [*range(n - second, n)],
                ]
            messages += [assistant(answer.text), user(SQUARE)]


def test_new_pictures_in_a_second_turn(pruned, scenes):
    messages = [user("What is in image 1?", scenes[:1])]
    first = pruned.chat(messages)
    messages += [assistant(first.text), user("What color is the star in image 1?", scenes[1:2])]
    second = pruned.chat(messages)
    assert second.usage.cached_tokens > 64
    assert [p.picture for p in second.cache.pictures] == [0, 1]
    assert (second.cache.pruning.modality == 1).sum() == 128
    assert len(second.cache.patches()) == 2


def test_a_prompt_that_leaves_the_pruned_one_starts_anew(pruned, scenes):
    alone = pruned.chat(CROSS, scenes[:4])
    pruned.chat(STAR, scenes[:4])
    again = pruned.chat(CROSS, scenes[:4])
    assert again.usage.cached_tokens == 0
    assert again.text == alone.text
    assert again.cache.cells_before == 280
    for a, b in zip(alone.cache.kept, again.cache.kept, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_cache_types(kv_type, scenes):
    bits = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q4_0": 4.5}[kv_type]
    with small(kv_type=kv_type, cache=CSP(0.5)) as vlm:
        result = vlm.chat(STAR, scenes[:2])
        assert result.text == "blue"
        assert result.cache.bytes_before == result.cache.cells_before * 6 * 2 * 64 * 2 * bits / 8


@pytest.mark.parametrize("sink", [None, 2.0, "mass"])
@pytest.mark.parametrize("cross_ratio", [None, 0.0, 1.0])
def test_settings_of_the_policy_reach_the_hook(sink, cross_ratio, scenes):
    with small(cache=CSP(0.3, sink=sink, cross_ratio=cross_ratio)) as vlm:
        result = vlm.chat("What is in image 3?", scenes[:4])
        for layer in result.cache.pruning.layers:
            assert (layer.sink is None) == (sink is None)
            if sink == 2.0:
                np.testing.assert_allclose(layer.sink, np.log(2.0), rtol=1e-6)


# the context


def test_the_context_grows_with_the_prompt(demo, scenes):
    demo.reset()
    n_cells = demo.engine.n_cells_max
    long = demo.chat(" red" * 1500, max_tokens=4)
    assert long.usage.prompt_tokens > n_cells
    assert demo.engine.n_cells_max >= long.usage.prompt_tokens + 4
    assert demo.chat(STAR, scenes[:2]).text == "blue"


def test_a_conversation_survives_growth(scenes):
    with small(cache=CSP(0.2)) as vlm:
        messages = [user(STAR, scenes[:4])]
        messages += [assistant(vlm.chat(messages, max_tokens=8).text), user(SQUARE + " red" * 1500)]
        n_encoded = vlm.engine.encoder.n_encoded
        result = vlm.chat(messages, max_tokens=8)
        assert result.usage.cached_tokens > 4 * 64
        assert 1500 < result.cache.cells_before < result.usage.prompt_tokens
        assert vlm.engine.encoder.n_encoded == n_encoded


def test_a_pruned_conversation_is_longer_than_its_cache(scenes):
    with small(cache=CSP(30), n_ctx=384) as vlm:
        messages = [user(STAR, scenes[:4])]
        for _ in range(12):
            answer = vlm.chat(messages, max_tokens=4)
            messages += [assistant(answer.text), user(SQUARE)]
        assert answer.usage.prompt_tokens > vlm.engine.n_ctx
        assert answer.cache.cells_after == 30


def test_an_answer_ends_where_the_context_does(smollm2_path):
    with EdgeVLM(smollm2_path, cache=Full(), n_ctx=256, n_threads=1) as vlm:
        result = vlm.chat("Sing.", grammar='root ::= "la " root', max_tokens=None)
        assert result.finish_reason == "length"
        assert result.usage.prompt_tokens + result.usage.completion_tokens == 256 + 1


def test_logits_do_not_depend_on_how_the_prompt_came(smollm2):
    # in one go, and token after token
    engine = smollm2.engine
    with engine.tokenizer.tokenize(["The quick brown fox jumps over the lazy dog and"]) as prompt:
        engine.prefill(prompt)
        whole = engine.logits.copy()
        engine.clear()
        for token in prompt.items:
            engine.decode(token)
    np.testing.assert_allclose(engine.logits, whole, atol=0.15)
    assert engine.logits.argmax() == whole.argmax()


def test_the_engine_prunes_inspects_and_steps_back(demo_paths, scenes):
    engine = Engine(*demo_paths, prune=True, n_threads=1)
    first, second = Pictures().open(scenes[:2])
    parts = [" image 1:", first, " image 2:", second, f"<|user|> {STAR}<|assistant|>"]
    with engine.tokenizer.tokenize(parts) as prompt:
        done = engine.prefill(prompt, window=16)
    assert (done.n_reused, done.n_decoded, done.n_encoded) == (0, prompt.n_tokens, 2)
    full = engine.logits.copy()
    pruning = engine.prune(CSP(30, recent=8), inspect=True)
    layer = pruning.layers[0]
    n = prompt.n_tokens
    assert layer.q.shape == (8, 4, 64)
    assert np.shape(layer.k) == (2, n, 64)
    assert np.shape(layer.self_) == np.shape(layer.cross) == np.shape(layer.token) == (2, n)
    assert (engine.n_tokens, engine.n_cells, engine.n_past) == (n, 30, n)
    # the last token once more, over the pruned cache
    assert engine.cut(len(engine.items) - 1)
    engine.decode(prompt.items[-1])
    assert engine.n_past == n
    assert engine.logits.argmax() == full.argmax()
    assert not np.array_equal(engine.logits, full)
    # more cells than 32 bits count
    engine.observe(1)
    engine.decode(prompt.items[-1])
    engine.prune(CSP(2**32 + 9, recent=2**32 + 5))
    assert engine.n_cells == 31
    with pytest.raises(PromptError, match="ends with a picture"):
        engine.prefill(engine.tokenizer.tokenize(parts[:2]))
    with pytest.raises(OptionError, match="token=768"):
        engine.decode(768)
    engine.close()


def test_pictures_of_more_tokens_than_a_batch(scenes, monkeypatch):
    with small(cache=Full()) as vlm:
        vlm.chat(STAR, scenes[:2])
        expected = vlm.engine.logits.copy()
    monkeypatch.setattr(csp_edge.engine, "_N_UBATCH", 32)
    with small(cache=Full()) as vlm:
        assert vlm.chat(STAR, scenes[:2]).text == "blue"
        np.testing.assert_allclose(vlm.engine.logits, expected, atol=0.1)
        # where they see each other both ways, they must come in one
        non_causal = "mtmd_decode_use_non_causal"
        monkeypatch.setattr(csp_edge.tokenizer.mtmd, non_causal, lambda *_: True)
        assert vlm.chat(STAR, scenes[:2]).usage.cached_tokens == 0
        assert vlm.engine._n_ubatch == 64


# other architectures


@pytest.fixture(scope="module")
def sliding(tmp_path_factory, demo_paths):
    path = tmp_path_factory.mktemp("sliding") / "gemma2.gguf"
    tiny_models.gemma2(path, demo_paths[0])
    return path


@pytest.mark.parametrize(("n_words", "is_reused"), [(300, True), (900, False)])
def test_a_sliding_window_is_not_cut_short(sliding, n_words, is_reused):
    """What a window of 32 has lost can't come back when the conversation steps back."""
    with EdgeVLM(sliding, cache=Full(), n_threads=1) as vlm:
        vlm.chat(" red" * 200 + " blue" * n_words, max_tokens=1)
        result = vlm.chat(" red" * 200 + " green" * 9, max_tokens=1)
        assert (result.usage.cached_tokens > 200) == is_reused
        logits = vlm.engine.logits.copy()
        vlm.reset()
        vlm.chat(" red" * 200 + " green" * 9, max_tokens=1)
        np.testing.assert_allclose(vlm.engine.logits, logits, atol=0.05)


def test_the_layers_with_full_attention_are_pruned(sliding):
    with EdgeVLM(sliding, cache=CSP(0.25), n_threads=1) as vlm:
        cache = vlm.chat(" red" * 200, max_tokens=1).cache
        assert [layer.il for layer in cache.pruning.layers] == [1]
        assert cache.cells_after == cache.cells_before // 4
        assert cache.bytes_after == pytest.approx(cache.bytes_before * (1 + 0.25) / 2, rel=0.01)


def test_a_recurrent_model_chats_and_is_not_pruned(tmp_path, demo_paths):
    path = tmp_path / "mamba.gguf"
    tiny_models.mamba(path, demo_paths[0])
    with pytest.raises(ModelError, match="can't be pruned.*use cache=Full"):
        EdgeVLM(path)
    with EdgeVLM(path, cache=Full(), n_threads=1) as vlm:
        first = vlm.chat("red", max_tokens=3)
        # its state can't step back: it is computed anew
        assert vlm.chat("red", max_tokens=3).text == first.text


# sharing


def test_threads_share_one(demo, scenes):
    questions = [(STAR, "blue"), (SQUARE, "orange"), (CROSS, "green")] * 2
    answers = {}

    def ask(i, question):
        if i % 2:
            answers[i] = demo.chat(question, scenes[:4]).text
        else:
            answers[i] = "".join(demo.chat(question, scenes[:4], stream=True))

    threads = [threading.Thread(target=ask, args=(i, q)) for i, (q, _) in enumerate(questions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: answer for i, (_, answer) in enumerate(questions)}


def test_a_stream_keeps_others_waiting_until_it_is_closed(demo, scenes):
    stream = demo.chat("What is in image 3?", scenes[:4], stream=True)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(demo.chat(STAR, scenes[:2]).text))
    thread.start()
    thread.join(0.2)
    assert not answers
    stream.close()
    thread.join()
    assert answers == ["blue"]


def test_several_in_one_process(demo, pruned, smollm2, scenes):
    stream = demo.chat("What is in image 3?", scenes[:4], stream=True)
    other = pruned.chat(STAR, scenes[:2], stream=True)
    assert next(stream)
    assert next(other) == "blue"
    assert "Paris" in smollm2.chat(FRANCE, max_tokens=10).text
    assert stream.result is None


def test_closing():
    vlm = small()
    stream = vlm.chat("What is this?", stream=True)
    vlm.close()
    vlm.close()
    assert vlm.engine.model is None
    for use in (lambda: vlm.chat("hello"), vlm.reset, lambda: next(stream)):
        with pytest.raises(CspEdgeError, match="closed"):
            use()


def test_ending_while_a_daemon_thread_answers():
    code = """
import threading, time
from csp_edge import EdgeVLM, Full
vlm = EdgeVLM.demo(n_threads=1, cache=Full())
said = []
def work():
    while True:
        said.extend(vlm.chat("What is in image 1? " * 100, max_tokens=200, stream=True))
threading.Thread(target=work, daemon=True).start()
while not said:
    time.sleep(0.01)
"""
    for _ in range(3):
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_is_told(tmp_path):
    code = """
import os
from csp_edge import CspEdgeError, EdgeVLM
vlm = EdgeVLM.demo(n_threads=2)
vlm.chat("Hello", max_tokens=2)
child = os.fork()
if not child:
    try:
        vlm.chat("Hello", max_tokens=2)
    except CspEdgeError as error:
        vlm.close()
        os._exit(0 if "fork" in str(error) else 2)
    os._exit(3)
assert os.waitpid(child, 0)[1] == 0
assert vlm.chat("Hello", max_tokens=2).usage.prompt_tokens
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("policy", [Pyramid(), Pyramid(0.8), AdaKV(0.5)])
def test_heads_that_kept_differently_many_are_forgotten(policy, scenes):
    with EdgeVLM.demo(cache=policy, n_threads=1) as vlm:
        images = [*scenes, *scenes]
        first = vlm.chat("What is in image 1?", images=images).text
        vlm.reset()
        assert vlm.chat("What is in image 1?", images=images).text == first


def test_a_chat_within_a_chat_is_refused(scenes):
    def meddle(stage, *_):
        if stage == "prefill" and not refusals:
            with pytest.raises(CspEdgeError, match="at work on this thread") as error:
                vlm.chat("hello")
            refusals.append(error)

    refusals = []
    with small(cache=Full(), progress=meddle) as vlm:
        assert vlm.chat(STAR, scenes[:2]).text == "blue"
    assert refusals


# errors, after each of which a good question is answered


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("max_tokens=0", {"max_tokens": 0}),
        ("max_tokens='many'", {"max_tokens": "many"}),
        ("temperature=-1", {"temperature": -1}),
        ("stop=''", {"stop": ""}),
        ("stop=5", {"stop": 5}),
        ("grammar: ", {"grammar": "root ::="[:4]}),
        ("json_schema", {"json_schema": "{"}),
        ("give one of them", {"grammar": 'root ::= "a"', "json_schema": {}}),
    ],
)
def test_bad_options(demo, message, options):
    with pytest.raises(OptionError, match=message):
        demo.chat(STAR, **options)
    assert demo.chat(STAR, max_tokens=1).text


def test_a_misspelt_option_is_told(demo):
    with pytest.raises(TypeError, match="temprature"):
        demo.chat(STAR, temprature=1)


@pytest.mark.parametrize(
    "option",
    [
        {"n_ctx": 0},
        {"n_ctx": 1.5},
        {"n_ctx": 2**31},
        {"n_threads": 0},
        {"n_threads": -1},
        {"n_threads": 513},
        {"n_gpu_layers": -2},
        {"kv_type": "f8"},
    ],
)
def test_settings_out_of_range(option):
    with pytest.raises(OptionError, match=next(iter(option))):
        EdgeVLM.demo(**option)


@pytest.mark.parametrize("cache", [Full(), CSP(0.2)])
@pytest.mark.parametrize("failing", range(4))
def test_a_failing_decode_leaves_the_conversation_right(cache, failing, scenes, monkeypatch):
    """Ctrl-C while llama.cpp works, or its refusal, before or after it stored the cells."""
    llama = csp_edge.engine.llama
    decode = llama.llama_decode
    with small(cache=cache) as vlm:
        messages = [user("What is in image 3?", scenes[:4])]
        expected = vlm.chat(messages)
        vlm.reset()

        n_calls = 0

        def fail(ctx, batch):
            nonlocal n_calls
            n_calls += 1
            if n_calls <= 2 * (failing // 2) + 1:
                return decode(ctx, batch)
            if failing % 2:
                return 1
            decode(ctx, batch)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(llama, "llama_decode", fail)
            with pytest.raises((KeyboardInterrupt, CspEdgeError)):
                vlm.chat(messages)
        again = vlm.chat(messages)
        assert again.text == expected.text
        assert vlm.engine.n_tokens == expected.usage.prompt_tokens + again.usage.completion_tokens


def test_a_cache_that_has_no_memory_to_grow(scenes, monkeypatch):
    with small(cache=CSP(0.2)) as vlm:
        with monkeypatch.context() as patch:
            patch.setattr(csp_edge.engine, "available_memory", lambda: 2**20)
            with pytest.raises(MemoryLimitError, match="MiB are needed and 1 MiB are free"):
                vlm.chat(" red" * 1500)
        assert vlm.chat(STAR, scenes[:4]).cache.cells_after == 56


def test_pictures_beyond_the_context_that_must_come_in_one(scenes, monkeypatch):
    monkeypatch.setattr(csp_edge.engine, "_N_UBATCH", 32)
    monkeypatch.setattr(csp_edge.tokenizer.mtmd, "mtmd_decode_use_non_causal", lambda *_: True)
    with small(cache=Full(), n_ctx=256) as vlm:
        with pytest.raises(PromptError, match="beyond the context of 256"):
            vlm.chat(STAR, scenes * 2)
        assert vlm.chat(STAR, scenes[:2]).text == "blue"


def test_progress(scenes):
    stages = []
    with small(progress=lambda *stage: stages.append(stage)) as vlm:
        vlm.chat(STAR, scenes[:2])
    for stage, total in (("load", 100), ("encode", 2), ("prefill", 146)):
        done = [d for s, d, t in stages if s == stage and t == total]
        assert done == sorted(done)
        assert done[-1] == total


def test_progress_can_stop_the_loading():
    def stop(stage, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(progress=stop)


def test_a_program_that_ends_in_an_answer(scenes):
    """It says nothing of what it leaves behind."""
    code = (
        "from csp_edge import CSP, EdgeVLM\n"
        "vlm = EdgeVLM.demo(cache=CSP(0.2), n_threads=1)\n"
        f"stream = vlm.chat('What is in image 2?', {[str(s) for s in scenes[:4]]}, stream=True)\n"
        "print(next(stream))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_answer_is_looked_at_before_the_prompt_is_pruned(scenes):
    with small(cache=CSP(0.2, lookahead=3)) as vlm:
        engine, cells = vlm.engine, []
        stream = vlm.chat("What is in image 3?", scenes[:4], stream=True)
        for _ in stream:
            cells.append(engine.n_cells)
        cache, n_answer = stream.result.cache, stream.result.usage.completion_tokens
        # the third token is decoded before the fourth is there
        n, kept = cache.cells_before, cache.cells_after
        assert cells[:3] == [n, n + 1, n + 2] and cells[3] == kept + 3
        assert n_answer > 4 and kept == n // 5
        assert cache.pruning.n_window == 8 + 3
        # one that is ended before is pruned by what there is
        vlm.reset()
        stream = vlm.chat("What is in image 3?", scenes[:4], stream=True)
        next(stream)
        next(stream)
        stream.close()
        assert stream.result.cache.cells_after == kept
        assert stream.result.cache.pruning.n_window == 8 + 1
        assert engine.n_cells == kept + 1


def test_an_answer_that_is_read_otherwise_next_time(scenes):
    """It was looked at, and is pruned with the prompt: that does not drop the prompt."""
    with small(cache=CSP(0.2)) as vlm:
        first = vlm.chat("What is in image 3?", scenes[:4])
        answer = first.text.split(",")[0]
        assert answer != first.text
        messages = [*vlm.messages[:-1], assistant(answer), user(SQUARE)]
        second = vlm.chat(messages)
        assert first.usage.prompt_tokens <= second.usage.cached_tokens
        assert second.usage.cached_tokens < first.usage.prompt_tokens + 5
        # while another question finds nothing of it
        other = vlm.chat([user(SQUARE, scenes[:4])])
        assert other.usage.cached_tokens == 0


def test_a_pruning_that_fails_in_an_answer(scenes, monkeypatch):
    with small(cache=CSP(0.2)) as vlm:

        def fail(*_, **__):
            raise CspEdgeError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(vlm.engine._hook, "prune", fail)
            with pytest.raises(CspEdgeError, match="no memory"):
                vlm.chat(STAR, scenes[:4])
        assert vlm.engine.n_cells == 0
        assert vlm.chat(STAR, scenes[:4]).text == "blue"
