"""llama.cpp through llama-cpp-python alone, with the libraries that LLAMA_CPP_LIB_PATH names.

Nothing of csp_edge is imported: run with the unpatched libraries in a process of its own, this is
what the hook is held against.

    python plain_llama.py job.npz result.npz

job: model, mmproj ("": none), prompt (with a marker for every picture), picture_0, picture_1, ...
(uint8 [height, width, 3]), kv_type, and for one of two jobs
  - tokens: decode these after the prompt, over the full cache;
  - kept_0, kept_1, ... (uint32 [n_head_kv, n_kept], one a layer) and n_decode: gather K and V of
    every head, with n_zero cells of zeros, decode greedily over them in a fresh context.
result: logits (float32 [1 + n, n_vocab], first those of the prompt), tokens (int32 [n]).
"""

import ctypes
import struct
import sys

import numpy as np
from gguf import GGMLQuantizationType
from llama_cpp import llama_cpp as llama
from llama_cpp import mtmd_cpp as mtmd

N_CTX, N_UBATCH, N_THREADS = 2048, 512, 1


class Plain:
    """A model with contexts of one sequence."""

    def __init__(self, model: str, mmproj: str, kv_type: str) -> None:
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(model.encode(), params)
        self.vocab = llama.llama_model_get_vocab(self.model)
        self.n_vocab = llama.llama_vocab_n_tokens(self.vocab)
        self.kv_type = GGMLQuantizationType[kv_type.upper()]
        self.projector = None
        if mmproj:
            params = mtmd.mtmd_context_params_default()
            params.use_gpu = params.print_timings = params.warmup = False
            params.n_threads = N_THREADS
            self.projector = mtmd.mtmd_init_from_file(mmproj.encode(), self.model, params)
        self.new_context()

    def new_context(self) -> None:
        params = llama.llama_context_default_params()
        params.n_ctx = N_CTX
        params.n_batch = params.n_ubatch = N_UBATCH
        params.n_threads = params.n_threads_batch = N_THREADS
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k = params.type_v = self.kv_type
        self.ctx = llama.llama_init_from_model(self.model, params)

    def prefill(self, prompt: str, pictures: list[np.ndarray]) -> np.ndarray:
        if self.projector is None:
            tokens = (llama.llama_token * N_CTX)()
            text = prompt.encode()
            n = llama.llama_tokenize(self.vocab, text, len(text), tokens, N_CTX, True, True)
            for i in range(0, n, N_UBATCH):
                part = list(tokens[i : min(i + N_UBATCH, n)])
                logits = self.decode(part, i)
            self.n_past = n
            return logits
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * len(pictures))()
        for i, picture in enumerate(pictures):
            height, width, _ = picture.shape
            data = (ctypes.c_uint8 * picture.size).from_buffer_copy(picture.tobytes())
            bitmaps[i] = mtmd.mtmd_bitmap_init(width, height, data)
        chunks = mtmd.mtmd_input_chunks_init()
        data = prompt.encode()
        text = mtmd.mtmd_input_text(data, len(data), True, True)
        assert not mtmd.mtmd_tokenize(
            self.projector, chunks, ctypes.byref(text), bitmaps, len(pictures)
        )
        n_past = llama.llama_pos(0)
        assert not mtmd.mtmd_helper_eval_chunks(
            self.projector, self.ctx, chunks, 0, 0, N_UBATCH, True, ctypes.byref(n_past)
        )
        self.n_past = n_past.value
        return self.logits()

    def decode(self, tokens: list[int], pos: int) -> np.ndarray:
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, pos + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i == len(tokens) - 1
        assert not llama.llama_decode(self.ctx, batch)
        llama.llama_batch_free(batch)
        return self.logits()

    def logits(self) -> np.ndarray:
        return np.ctypeslib.as_array(
            llama.llama_get_logits_ith(self.ctx, -1), (self.n_vocab,)
        ).copy()

    def state(self) -> bytes:
        size = llama.llama_state_seq_get_size(self.ctx, 0)
        data = (ctypes.c_uint8 * size)()
        assert llama.llama_state_seq_get_data(self.ctx, data, size, 0) == size
        return bytes(data)

    def set_state(self, state: bytes) -> None:
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        assert llama.llama_state_seq_set_data(self.ctx, data, len(state), 0) == len(state)


def gather(state: bytes, kept: list[np.ndarray], n_zero: int = 0) -> bytes:
    """The state of a sequence whose every head holds only the kept cells, and `n_zero` cells whose
    K and V are zero (for types in which zero is all bits 0).

    The rows are moved as they are. Positions no longer matter, but for the last, which the next
    token follows: the keys have theirs in them.
    """
    magic, seq_id, n_stream, n_cells = struct.unpack_from("<IiII", state)
    assert n_stream == 1
    offset = 16 + n_cells * 12
    last = struct.unpack_from("<i", state, offset - 12)[0]
    v_trans, n_layer = struct.unpack_from("<II", state, offset)
    assert not v_trans and n_layer == len(kept)
    offset += 8

    n_kept = kept[0].shape[1] + n_zero
    out = [struct.pack("<IiII", magic, seq_id, n_stream, n_kept)]
    for i in range(n_kept):
        out.append(struct.pack("<iIi", last if i == n_kept - 1 else 0, 1, 0))
    out.append(struct.pack("<II", v_trans, n_layer))
    for cells in kept * 2:  # all K, then all V
        kind, row = struct.unpack_from("<iQ", state, offset)
        offset += 12
        rows = np.frombuffer(state, np.uint8, n_cells * row, offset)
        offset += n_cells * row
        heads = rows.reshape(n_cells, len(cells), -1)
        out.append(struct.pack("<iQ", kind, row))
        out.append(bytes(n_zero * row))
        out.append(np.stack([heads[c, h] for h, c in enumerate(cells)], axis=1).tobytes())
    assert offset == len(state)
    return b"".join(out)


def run(job: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    plain = Plain(str(job["model"]), str(job["mmproj"]), str(job["kv_type"]))
    pictures = [job[f"picture_{i}"] for i in range(sum(k.startswith("picture_") for k in job))]
    logits = [plain.prefill(str(job["prompt"]), pictures)]
    tokens: list[int] = []
    if "tokens" in job:
        for token in job["tokens"].tolist():
            tokens.append(token)
            logits.append(plain.decode([token], plain.n_past + len(tokens) - 1))
    else:
        kept = [job[f"kept_{i}"] for i in range(sum(k.startswith("kept_") for k in job))]
        state = gather(plain.state(), kept, int(job.get("n_zero", 0)))
        plain.new_context()
        plain.set_state(state)
        for _ in range(int(job["n_decode"])):
            tokens.append(int(logits[-1].argmax()))
            logits.append(plain.decode([tokens[-1]], plain.n_past + len(tokens) - 1))
    return {"logits": np.stack(logits), "tokens": np.array(tokens, dtype=np.int32)}


if __name__ == "__main__":
    np.savez(sys.argv[2], **run(dict(np.load(sys.argv[1]))))
