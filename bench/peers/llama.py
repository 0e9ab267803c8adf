"""llama.cpp as it comes with llama-cpp-python, through its C interface: llama.py CASE KV_TYPE"""

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as llama
from llama_cpp import mtmd_cpp as mtmd
from worker import N_WARM, Case, Window, serve

sys.path.append(str(Path(__file__).parents[2] / "tests"))
import plain_llama  # noqa: E402

SHARE_OF_F16 = {"f16": 1.0, "q8_0": 34 / 64, "q4_0": 18 / 64}
no_callback = mtmd.mtmd_helper_post_decode_callback()


class Llama:
    def __init__(self, case: Case, kv_type: str) -> None:
        self.case = case
        timed, compared = case.windows[0], case.windows[1:]
        n_ctx = max(len(w.tokens) + len(w.continuation) for w in (timed, *compared))
        plain_llama.N_CTX = -(-n_ctx // 256) * 256
        plain_llama.N_THREADS = case.settings["n_threads"]
        self.bytes_per_cell = case.settings["bytes_per_cell"] * SHARE_OF_F16[kv_type]
        self.plain = plain_llama.Plain(case.settings["model"], case.settings["mmproj"], kv_type)

    def turn(self) -> dict[str, Any]:
        window, n_answer = self.case.windows[0], self.case.settings["n_answer"]
        answer = window.continuation[:n_answer].tolist()
        n_warm = 0 if self.case.settings["pictures"] else N_WARM
        self._clear()
        t0 = time.perf_counter()
        self._see() if self.case.settings["pictures"] else self._read(window)
        assert self.n_past == len(window.tokens)
        logits = self.plain.logits()
        t1 = time.perf_counter()
        prefill_s = self.decode_s
        said = [logits.argmax()]
        for i, token in enumerate(answer):
            if i == n_warm:
                t2 = time.perf_counter()
            said.append(self._decode([token]).argmax())
        t3 = time.perf_counter()
        self._decode(window.continuation[n_answer:].tolist())
        t4 = time.perf_counter()
        return {
            "prefill_s": prefill_s,
            "first_token_s": t1 - t0,
            "decode_s": t3 - t2,
            "n_decode": n_answer - n_warm,
            "second_s": t4 - t3,
            "kv_bytes": len(window.tokens) * self.bytes_per_cell,
            "as_given": float(np.mean(np.array(said[:-1]) == answer)),
        }

    def logits(self, window: Window) -> np.ndarray:
        self._clear()
        self._read(window)
        steps = zip(window.continuation.tolist(), window.counts, strict=True)
        found = [(self._decode([token]), counts) for token, counts in steps]
        return np.stack([logits for logits, counts in found if counts])

    def _clear(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self.plain.ctx), False)
        self.n_past = 0
        self.decode_s = 0.0

    def _decode(self, tokens: list[int]) -> np.ndarray:
        t0 = time.perf_counter()
        logits = self.plain.decode(tokens, self.n_past)
        self.decode_s += time.perf_counter() - t0
        self.n_past += len(tokens)
        return logits

    def _read(self, window: Window) -> None:
        """Text, and embeddings as they are: nothing is encoded."""
        for part in window.parts():
            for i in range(0, len(part), plain_llama.N_UBATCH):
                piece = part[i : i + plain_llama.N_UBATCH]
                if isinstance(piece, list):
                    self._decode(piece)
                else:
                    self._embed(piece)

    def _embed(self, embeddings: np.ndarray) -> None:
        n, n_embd = embeddings.shape
        batch = llama.llama_batch_init(n, n_embd, 1)
        batch.n_tokens = n
        ctypes.memmove(batch.embd, np.ascontiguousarray(embeddings).ctypes.data, embeddings.nbytes)
        for i in range(n):
            batch.pos[i] = self.n_past + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = False
        assert not llama.llama_decode(self.plain.ctx, batch)
        llama.llama_batch_free(batch)
        self.n_past += n

    def _see(self) -> None:
        """The prompt with its pictures, from their files."""
        paths = self.case.settings["pictures"]
        data = [Path(path).read_bytes() for path in paths]
        bitmaps = [
            mtmd.mtmd_helper_bitmap_init_from_buf(
                self.plain.projector, (ctypes.c_uint8 * len(d)).from_buffer_copy(d), len(d), False
            )
            for d in data
        ]
        chunks = mtmd.mtmd_input_chunks_init()
        prompt = self.case.settings["prompt"].encode()
        # the template has written what comes before every text
        text = mtmd.mtmd_input_text(prompt, len(prompt), False, True)
        array = (mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        assert not mtmd.mtmd_tokenize(
            self.plain.projector, chunks, ctypes.byref(text), array, len(bitmaps)
        )
        for i in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, i)
            n_past = llama.llama_pos(self.n_past)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                n = ctypes.c_size_t()
                tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(n))
                self._decode(tokens[: n.value])
                continue
            assert not mtmd.mtmd_encode_chunk(self.plain.projector, chunk)
            t0 = time.perf_counter()
            assert not mtmd.mtmd_helper_decode_image_chunk(
                self.plain.projector,
                self.plain.ctx,
                chunk,
                mtmd.mtmd_get_output_embd(self.plain.projector),
                n_past,
                0,
                plain_llama.N_UBATCH,
                ctypes.byref(n_past),
                no_callback,
                None,
            )
            self.decode_s += time.perf_counter() - t0
            self.n_past = n_past.value
        mtmd.mtmd_input_chunks_free(chunks)
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)


if __name__ == "__main__":
    serve(Llama)
