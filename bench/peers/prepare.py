"""Write what all sides are asked: python bench/peers/prepare.py FOLDER N_THREADS

text   windows of Python's language reference, each a prompt and its true continuation, for
       SmolLM2-135M. The first is timed, the others are compared.
demo   for the demo model. The package's twelve pictures, with two questions, are timed. Compared
       are conversations of the built-in suite about as many, along the right answers.

Tokens, and the embeddings of pictures, are ours, so that every side reads the same.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from worker import N_WARM, Window

from csp_edge import EdgeVLM, Full
from csp_edge.demo import PICTURES
from csp_edge.eval.fidelity import default_text, windows
from csp_edge.eval.suite import suite
from csp_edge.model_files import find_model
from csp_edge.template import ChatTemplate, normalize_messages
from csp_edge.tokenizer import Patches, Prompt
from csp_edge.vlm import DEMO_MODEL

sys.path.append(str(Path(__file__).parents[1]))
from overhead import smollm2  # noqa: E402

N_PROMPT, N_PROMPT_COMPARED = 2048, 1024
N_DECODE = 32
N_SECOND = 64  # tokens of the second question about a text
N_COMPARED = 3  # windows of text
N_SAMPLES = 2  # of each of the suite's skills
N_SCREENED = {"text": 1, "demo": 4}  # of the compared ones, by which a press is chosen

QUESTIONS = "What is in image 3?", "Which image shows the cat?"
ANSWER = "green cross, orange square, purple ring"
MARKER = "<__media__>"

Messages = list[dict[str, Any]]


def conversations() -> list[list[Messages]]:
    """About twelve pictures: what there is at each of four questions."""
    samples = suite(n_samples=N_SAMPLES, n_images=(len(PICTURES),), n_turns=4)
    return [
        [sample.messages([turn.answer for turn in sample.turns[:i]]) for i in range(4)]
        for sample in samples
    ]


def timed_conversation() -> list[Messages]:
    pictures = [{"type": "image", "image": str(path)} for path in PICTURES]
    first = {"role": "user", "content": [*pictures, {"type": "text", "text": QUESTIONS[0]}]}
    answer = {"role": "assistant", "content": ANSWER}
    return [[first], [first, answer, {"role": "user", "content": QUESTIONS[1]}]]


def of_text(vlm: EdgeVLM) -> tuple[list[Window], dict[str, Any]]:
    n_answer = N_WARM + N_DECODE
    found = []
    for n, n_prompt, n_after in (
        (1, N_PROMPT, n_answer + N_SECOND),
        (N_COMPARED, N_PROMPT_COMPARED, N_DECODE),
    ):
        found += windows(
            vlm.engine, "", default_text(), n_windows=n, n_prompt=n_prompt, n_continuation=n_after
        )
    nothing = np.zeros((0, vlm.engine.encoder.n_embd), np.float32)
    texts = [
        Window(np.array(w.prompt), nothing, np.array(w.continuation), np.ones(len(w.continuation)))
        for w in found
    ]
    return texts, {"n_answer": n_answer, "pictures": []}


def of_pictures(vlm: EdgeVLM) -> tuple[list[Window], dict[str, Any]]:
    timed = timed_conversation()
    template = ChatTemplate(
        vlm.engine.chat_template,
        bos_token=vlm.engine.tokenizer.bos_text,
        eos_token=vlm.engine.tokenizer.eos_text,
        marker=MARKER,
    )
    found = [of_conversation(vlm, turns) for turns in (timed, *conversations())]
    ends = [vlm.engine.tokenizer.ends(token) for token in found[0].continuation.tolist()]
    settings = {
        "n_answer": ends.index(True),
        "pictures": [str(path) for path in PICTURES],
        "prompt": template.render(normalize_messages(timed[0])),
        "messages": timed,
    }
    return found, settings


def of_conversation(vlm: EdgeVLM, turns: list[Messages]) -> Window:
    """Up to the first question, and then all that follows it. Answers count."""
    engine = vlm.engine
    prompts = [vlm.tokenize(normalize_messages(messages)) for messages in turns]
    prefixes = [len(prompt.items) for prompt in prompts]
    after = prompts[-1].items[prefixes[0] :]
    counts = np.zeros(len(after), bool)
    for n_before in prefixes[:-1]:
        i = n_before - prefixes[0]
        while True:
            # what comes right after the prompt is not up to the cache that it left
            counts[max(i - 1, 0)] |= i > 0
            if engine.tokenizer.ends(after[i]):
                break
            i += 1
    first = prompts[0]
    engine.clear()
    engine.prefill(first)
    pictures = [item for item in first.items if isinstance(item, Patches)]
    known = engine.encoder.embeddings
    embeddings = [known[item.key, item.tile, item.n_tokens] for item in pictures]
    return Window(_tokens(first), np.concatenate(embeddings), np.array(after), counts)


def _tokens(prompt: Prompt) -> np.ndarray:
    runs = [[item] if isinstance(item, int) else [-1] * item.n_tokens for item in prompt.items]
    return np.concatenate(runs)


def main() -> None:
    folder, n_threads = Path(sys.argv[1]), int(sys.argv[2])
    for name, path, make in (("text", smollm2(), of_text), ("demo", DEMO_MODEL, of_pictures)):
        files = find_model(path)
        with EdgeVLM(path, cache=Full(), n_threads=n_threads) as vlm:
            found, settings = make(vlm)
            info, bytes_per_cell = vlm.engine.info, vlm.engine.bytes_per_cell
        settings |= {"quantization": info.quantization, "bytes_per_cell": bytes_per_cell}
        settings |= {"model": str(files.model), "mmproj": str(files.mmproj or "")}
        settings |= {"n_threads": n_threads, "n_screened": N_SCREENED[name]}
        settings |= {"n_prompt": len(found[0].tokens), "n_compared": len(found) - 1}
        settings |= {"n_pictures": len(settings["pictures"])}
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "case.json").write_text(json.dumps(settings, default=str))
        arrays = {
            f"{field}_{i}": np.asarray(value, kind)
            for i, window in enumerate(found)
            for (field, value), kind in zip(
                window._asdict().items(), (np.int32, np.float32, np.int32, bool), strict=True
            )
        }
        np.savez(folder / name / "windows.npz", **arrays)


if __name__ == "__main__":
    main()
