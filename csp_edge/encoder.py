"""A projector at work: pictures in, embeddings out."""

import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from csp_edge import native
from csp_edge.errors import ImageError, ProjectorError
from csp_edge.native import llama, mtmd
from csp_edge.tokenizer import Patches, Prompt

EMBEDDING_CACHE_BYTES = 64 * 2**20


class Encoder:
    """Encodes pictures, and keeps what it encoded last.

    Args:
        path: the projector's file. None: there are no pictures.
        model: llama.cpp's, which the embeddings are for.
        on_gpu: whether it runs there.
        max_image_tokens: of a picture or tile, where the projector takes any size. None: its own.

    Raises:
        ProjectorError: the file can't be read, or takes no pictures.
    """

    def __init__(
        self,
        path: Path | None,
        model: Any,
        *,
        on_gpu: bool,
        n_threads: int,
        max_image_tokens: int | None,
    ) -> None:
        self.n_embd: int = llama.llama_model_n_embd_inp(model)
        # by picture, tile and tokens: float32 [n_tokens, n_embd]
        self.embeddings: OrderedDict[tuple[bytes, int, int], npt.NDArray[np.float32]] = (
            OrderedDict()
        )
        self.n_encoded = 0
        self.encode_s = 0.0
        self.handle: Any = None
        if path is None:
            return
        params = mtmd.mtmd_context_params_default()
        params.image_max_tokens = max_image_tokens or params.image_max_tokens
        params.use_gpu = on_gpu
        params.print_timings = False
        params.n_threads = n_threads
        params.warmup = False
        self.handle, why = native.explained(
            mtmd.mtmd_init_from_file, os.fsencode(path), model, params
        )
        if not self.handle:
            raise ProjectorError(f"{path}: llama.cpp can't load it: {why or 'unknown reason'}")
        if not mtmd.mtmd_support_vision(self.handle):
            self.close()
            raise ProjectorError(
                f"{path}: this projector takes no pictures: use a vision projector"
            )

    def close(self) -> None:
        if self.handle:
            mtmd.mtmd_free(self.handle)
        self.handle = None
        self.embeddings.clear()

    def embed(
        self, prompt: Prompt, i: int, n_tokens_most: int | None = None
    ) -> npt.NDArray[np.float32]:
        """float32 [n_tokens, n_embd] of the picture that is item `i` of `prompt`.

        Args:
            n_tokens_most: to keep the embeddings of. None: as many as take 64 MiB.

        Raises:
            ImageError: it can't be encoded.
        """
        item = prompt.items[i]
        assert isinstance(item, Patches)
        key = (item.key, item.tile, item.n_tokens)
        if key not in self.embeddings:
            self.embeddings[key] = self._encode(prompt, i, item)
        embedding = self.embeddings[key]
        self.embeddings.move_to_end(key)
        n_most = EMBEDDING_CACHE_BYTES
        if n_tokens_most is not None:
            n_most = min(n_most, n_tokens_most * self.n_embd * 4)
        while sum(e.nbytes for e in self.embeddings.values()) > n_most:
            self.embeddings.popitem(last=False)
        return embedding

    def _encode(self, prompt: Prompt, i: int, item: Patches) -> npt.NDArray[np.float32]:
        t0 = time.perf_counter()
        chunk = prompt.with_pixels(i)
        code, why = native.explained(mtmd.mtmd_encode_chunk, self.handle, chunk)
        if code != 0:
            raise ImageError(f"picture {item.picture + 1} can't be encoded: {why}")
        pointer = mtmd.mtmd_get_output_embd(self.handle)
        embedding = native.array(pointer, item.n_tokens, self.n_embd).copy()
        self.n_encoded += 1
        self.encode_s += time.perf_counter() - t0
        return embedding
