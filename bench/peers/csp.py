"""Our side: csp.py CASE full|20%|20%:64 (a window of 64, all of it kept)

Text goes to the engine, pictures through EdgeVLM.chat.
"""

import time
from typing import Any

import numpy as np
from prepare import conversations
from worker import N_WARM, Case, Window, serve

from csp_edge import CSP, EdgeVLM, Full
from csp_edge.policies import parse_budget
from csp_edge.template import normalize_messages
from csp_edge.tokenizer import Prompt


class Ours:
    def __init__(self, case: Case, cache: str) -> None:
        self.case = case
        self.cache: CSP | Full = Full()
        if cache != "full":
            budget, _, window = cache.partition(":")
            n_window = int(window) if window else None
            self.cache = CSP(parse_budget(budget), window=n_window, recent=n_window)
        self.vlm = EdgeVLM(
            case.settings["model"], cache=self.cache, n_threads=case.settings["n_threads"]
        )
        self.engine = self.vlm.engine

    def turn(self) -> dict[str, Any]:
        self.engine.encoder.embeddings.clear()
        self.vlm.reset()
        return self._chat() if self.case.settings["pictures"] else self._read()

    def _chat(self) -> dict[str, Any]:
        first, second = self.case.settings["messages"]
        t0 = time.perf_counter()
        with self.vlm.chat(first, stream=True) as stream:
            answer = next(stream)
            t1 = time.perf_counter()
            answer += "".join(stream)
            t2 = time.perf_counter()
        result = stream.result
        assert result
        second[1]["content"] = answer
        t3 = time.perf_counter()
        with self.vlm.chat(second, stream=True) as stream:
            next(stream)
            t4 = time.perf_counter()
        return {
            "prefill_s": result.timings.prefill_s + result.timings.prune_s,
            "first_token_s": t1 - t0,
            "decode_s": t2 - t1,
            "n_decode": result.usage.completion_tokens,
            "second_s": t4 - t3,
            "kv_bytes": result.cache.bytes_after,
            "answer": answer,
        }

    def _read(self) -> dict[str, Any]:
        window, n_answer = self.case.windows[0], self.case.settings["n_answer"]
        prompt = window.tokens.tolist()
        answer = window.continuation[:n_answer].tolist()
        second = window.continuation[n_answer:].tolist()
        t0 = time.perf_counter()
        self._prefill(Prompt(prompt), len(answer))
        self._prune()
        t1 = time.perf_counter()
        kv_bytes = self.engine.n_cells * self.engine.bytes_per_cell
        for i, token in enumerate(answer):
            if i == N_WARM:
                t2 = time.perf_counter()
            self._decode(token)
        t3 = time.perf_counter()
        self._prefill(Prompt(prompt + answer + second), 0)
        self._prune()
        t4 = time.perf_counter()
        return {
            "prefill_s": t1 - t0,
            "first_token_s": t1 - t0,
            "decode_s": t3 - t2,
            "n_decode": len(answer) - N_WARM,
            "second_s": t4 - t3,
            "kv_bytes": kv_bytes,
        }

    def _prefill(self, prompt: Prompt, room: int) -> None:
        window = 0
        if isinstance(self.cache, CSP):
            amounts = self.cache.resolve(prompt.n_tokens, has_pictures=prompt.has_pictures)
            window = amounts.window
        self.engine.prefill(prompt, room=room, window=window)
        _ = self.engine.logits

    def _prune(self) -> None:
        if isinstance(self.cache, CSP):
            self.engine.prune(self.cache)

    def _decode(self, token: int) -> np.ndarray:
        self.engine.decode(token)
        return self.engine.logits

    def logits(self, window: Window) -> np.ndarray:
        self.engine.clear()
        with self._prompt(window) as prompt:
            self._prefill(prompt, len(window.continuation))
        self._prune()
        steps = zip(window.continuation.tolist(), window.counts, strict=True)
        found = [(self._decode(token).copy(), counts) for token, counts in steps]
        return np.stack([logits for logits, counts in found if counts])

    def _prompt(self, window: Window) -> Prompt:
        if not self.case.settings["pictures"]:
            return Prompt(window.tokens.tolist())
        i = next(i for i, each in enumerate(self.case.windows) if each is window)
        prompt = self.vlm.tokenize(normalize_messages(conversations()[i - 1][0]))
        assert prompt.n_tokens == len(window.tokens)
        return prompt


if __name__ == "__main__":
    serve(Ours)
