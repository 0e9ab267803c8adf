"""transformers with kvpress, on the same weights, dequantized.

    presses.py CASE convert              the GGUF's weights, for the others to load quickly
    presses.py CASE screen FILE          try every press, against the full cache's logits in FILE
    presses.py CASE full|full:bfloat16|SnapKVPress:20%
                                         a side

Pictures come as the embeddings of our projector: transformers has no model with such a one.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import torch
from kvpress import SnapKVPress
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar, set_verbosity_error
from worker import N_WARM, Case, Window, divergence, reference, serve

BUDGETS = "10%", "20%"

# of kvpress 0.5.5, those that need no weights, statistics or curves made for other models
PRESSES: dict[str, Callable[[float], Any]] = {
    name: getattr(kvpress, name)
    for name in (
        "SnapKVPress PyramidKVPress TOVAPress ExpectedAttentionPress KnormPress KeyDiffPress "
        "StreamingLLMPress LagKVPress CURPress CompactorPress LeverageScorePress "
        "NonCausalAttnPress CapPress ObservedAttentionPress RandomPress KVzipPress"
    ).split()
} | {
    f"{name}(SnapKVPress)": lambda share, name=name: getattr(kvpress, name)(SnapKVPress(share))
    for name in "ChunkKVPress CriticalKVPress MergingPress AdaKVPress".split()
}


class Presses:
    def __init__(self, case: Case, cache: str) -> None:
        self.case = case
        torch.manual_seed(0)  # some presses draw
        torch.set_num_threads(case.settings["n_threads"])
        dtype = torch.bfloat16 if cache == "full:bfloat16" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(
            _converted(), dtype=dtype, attn_implementation="sdpa"
        ).eval()
        self.choose(cache)

    def choose(self, cache: str) -> None:
        """Prune prompts so from now on."""
        self.press: Callable[[], AbstractContextManager[None]] = nullcontext
        name, _, budget = cache.partition(":")
        if name != "full":
            press = PRESSES[name](1 - float(budget.rstrip("%")) / 100)
            self.press = lambda: press(self.model)

    @torch.inference_mode()
    def turn(self) -> dict[str, Any]:
        window, n_answer = self.case.windows[0], self.case.settings["n_answer"]
        has_pictures = bool(self.case.settings["pictures"])
        n_warm = 0 if has_pictures else N_WARM
        inputs = self._inputs(window)
        t0 = time.perf_counter()
        self._prefill(inputs)
        t1 = time.perf_counter()
        for i, token in enumerate(window.continuation[:n_answer].tolist()):
            if i == n_warm:
                t2 = time.perf_counter()
            self._decode([token])
        t3 = time.perf_counter()
        self._decode(window.continuation[n_answer:].tolist())
        t4 = time.perf_counter()
        return {
            "prefill_s": t1 - t0,
            # nothing here sees pictures
            "first_token_s": None if has_pictures else t1 - t0,
            "decode_s": t3 - t2,
            "n_decode": n_answer - n_warm,
            "second_s": t4 - t3,
            "kv_bytes": self.kv_bytes,
        }

    @torch.inference_mode()
    def logits(self, window: Window) -> np.ndarray:
        self._prefill(self._inputs(window))
        steps = zip(window.continuation.tolist(), window.counts, strict=True)
        found = [(self._decode([token]), counts) for token, counts in steps]
        return np.stack([logits for logits, counts in found if counts])

    def _inputs(self, window: Window) -> dict[str, torch.Tensor]:
        if not len(window.embeddings):
            return {"input_ids": torch.tensor(window.tokens[None], dtype=torch.long)}
        embed = self.model.get_input_embeddings()
        parts = [
            embed(torch.tensor(part)) if isinstance(part, list) else torch.tensor(part)
            for part in window.parts()
        ]
        return {"inputs_embeds": torch.cat(parts)[None].to(self.model.dtype)}

    def _prefill(self, inputs: dict[str, torch.Tensor]) -> None:
        self.cache = DynamicCache()
        self.n_past = next(iter(inputs.values())).shape[1]
        with self.press():
            self.model(**inputs, past_key_values=self.cache, logits_to_keep=1)
        layers = self.cache.layers
        self.kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    def _decode(self, tokens: list[int]) -> np.ndarray:
        # the cache is shorter than the text: what comes next is where it would be without pruning
        positions = torch.arange(self.n_past, self.n_past + len(tokens))[None]
        self.n_past += len(tokens)
        out = self.model(
            input_ids=torch.tensor([tokens]),
            position_ids=positions,
            past_key_values=self.cache,
            logits_to_keep=1,
        )
        return out.logits[0, -1].float().numpy()

    def screen(self, path: Path) -> Iterator[dict[str, Any]]:
        """Every press at every budget, on the first of the compared windows."""
        n = self.case.settings["n_screened"]
        windows, full = self.case.windows[1 : 1 + n], reference(path)[:n]
        self.logits(windows[-1])
        n_bytes = self.kv_bytes
        for name in PRESSES:
            for budget in BUDGETS:
                found: dict[str, Any] = {"press": name, "budget": budget}
                try:
                    self.choose(f"{name}:{budget}")
                    found |= divergence(full, [self.logits(window) for window in windows])
                    found["kv_share"] = self.kv_bytes / n_bytes
                except Exception as error:  # whatever keeps it from running is told
                    found["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
                yield found


def _converted() -> Path:
    return Path(sys.argv[1]) / "transformers"


def convert() -> None:
    path = Path(Case.read(Path(sys.argv[1])).settings["model"])
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    model.save_pretrained(_converted())


if __name__ == "__main__":
    disable_progress_bar()
    set_verbosity_error()
    match sys.argv[2:]:
        case ["convert"]:
            convert()
        case ["screen", path]:
            side = Presses(Case.read(Path(sys.argv[1])), "full")
            for found in side.screen(Path(path)):
                print(json.dumps(found), flush=True)
        case _:
            serve(Presses)
