"""Text and pictures to tokens, and tokens to text."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from csp_edge import native
from csp_edge.errors import ImageError, ProjectorError, PromptError
from csp_edge.images import image_key
from csp_edge.native import llama, mtmd

Pixels: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Patches:
    """Tokens that stand for a picture, or for one tile of it."""

    key: bytes
    picture: int
    tile: int
    n_tokens: int
    n_pos: int
    n_cols: int
    n_rows: int
    causal: bool


Item: TypeAlias = int | Patches  # a token of text, or what came from a picture


class Prompt:
    """Tokens and pictures ready for prefill(). A context manager: leaving it frees the pixels."""

    def __init__(self, items: list[Item], handles: dict[int, int], chunks: int | None) -> None:
        self.items = items
        self.n_tokens = sum(1 if isinstance(item, int) else item.n_tokens for item in items)
        self.n_pos = sum(1 if isinstance(item, int) else item.n_pos for item in items)
        self.handles = handles
        self._chunks = chunks

    def __enter__(self) -> "Prompt":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._chunks:
            mtmd.mtmd_input_chunks_free(self._chunks)
        self._chunks = None
        self.handles = {}


class Tokenizer:
    """A model's vocabulary, and its projector's way to lay out pictures.

    Args:
        path: the model's file, for messages.
        model, projector: llama.cpp's; the projector may be None.
    """

    def __init__(self, path: Path, model: Any, projector: Any) -> None:
        self._path = path
        self._vocab = llama.llama_model_get_vocab(model)
        self._projector = projector
        self.n_vocab: int = llama.llama_vocab_n_tokens(self._vocab)

    def tokenize(self, parts: Sequence[str | Pixels]) -> Prompt:
        """A prompt of texts and pictures (uint8 [height, width, 3]).

        Raises:
            PromptError: no tokens come out, or a text is not valid Unicode.
            ProjectorError: there are pictures and no projector.
            ImageError: the projector refuses a picture.
        """
        if any(not isinstance(part, str) for part in parts):
            items, handles, chunks = self._tokenize_pictures(parts)
        else:
            text = "".join(part for part in parts if isinstance(part, str))
            items, handles, chunks = list[Item](self._tokenize_text(text)), {}, None

        # a template may have written it already
        bos = llama.llama_vocab_bos(self._vocab)
        if llama.llama_vocab_get_add_bos(self._vocab) and items[:1] != [bos]:
            items = [bos, *items]
            handles = {i + 1: handle for i, handle in handles.items()}
        if not items:
            raise PromptError("the prompt is empty: write something")
        return Prompt(items, handles, chunks)

    def _tokenize_text(self, text: str) -> list[int]:
        data = _utf8(text)
        tokens = (llama.llama_token * (len(data) + 8))()
        n = llama.llama_tokenize(self._vocab, data, len(data), tokens, len(tokens), False, True)
        if n < 0:
            raise PromptError(f"the prompt of {len(data)} bytes can't be tokenized: shorten it")
        return list(tokens[:n])

    def _tokenize_pictures(
        self, parts: Sequence[str | Pixels]
    ) -> tuple[list[Item], dict[int, int], int]:
        if not self._projector:
            raise ProjectorError(
                f"{self._path}: pictures need a projector: put its mmproj file beside "
                "the model, or give mmproj="
            )
        keys = [image_key(part) for part in parts if not isinstance(part, str)]
        bitmaps: list[int] = []
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            inputs = []
            for part in parts:
                if isinstance(part, str):
                    data = _utf8(part)
                    text = mtmd.mtmd_input_text(data, len(data), False, True)
                    inputs.append(mtmd.mtmd_input_part(ctypes.pointer(text), None))
                else:
                    bitmaps.append(_bitmap(part, len(bitmaps)))
                    inputs.append(mtmd.mtmd_input_part(None, bitmaps[-1]))
            pointers = (ctypes.POINTER(mtmd.mtmd_input_part) * len(inputs))(
                *map(ctypes.pointer, inputs)
            )
            code, why = native.explained(
                mtmd.mtmd_tokenize_from_parts,
                self._projector,
                chunks,
                pointers,
                len(inputs),
                False,
            )
            if code != 0:
                raise ImageError(f"the projector can't take these pictures: {why}")
            items, handles = self._read_chunks(chunks, keys)
            return items, handles, chunks
        except BaseException:
            mtmd.mtmd_input_chunks_free(chunks)
            raise
        finally:
            for bitmap in bitmaps:
                mtmd.mtmd_bitmap_free(bitmap)

    def _read_chunks(self, chunks: int, keys: list[bytes]) -> tuple[list[Item], dict[int, int]]:
        items: list[Item] = []
        handles: dict[int, int] = {}
        n_tiles = [0] * len(keys)
        for i in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, i)
            n_tokens = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                n = ctypes.c_size_t()
                items += mtmd.mtmd_input_chunk_get_tokens_text(chunk, n)[:n_tokens]
                continue
            picture = int(mtmd.mtmd_input_chunk_get_id(chunk))
            grid = mtmd.mtmd_input_chunk_get_tokens_image(chunk)
            n_cols, n_rows = _grid(
                n_tokens, mtmd.mtmd_image_tokens_get_nx(grid), mtmd.mtmd_image_tokens_get_ny(grid)
            )
            handles[len(items)] = chunk
            items.append(
                Patches(
                    keys[picture],
                    picture,
                    n_tiles[picture],
                    n_tokens,
                    mtmd.mtmd_input_chunk_get_n_pos(chunk),
                    n_cols,
                    n_rows,
                    causal=not mtmd.mtmd_decode_use_non_causal(self._projector, chunk),
                )
            )
            n_tiles[picture] += 1
        return items, handles

    def piece(self, token: int) -> bytes:
        """The bytes of a token's text, none for a control token."""
        buffer = ctypes.create_string_buffer(256)
        n = llama.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = llama.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[:n]

    def _written(self, token: int) -> str:
        if not 0 <= token < self.n_vocab:
            return ""
        text: bytes = llama.llama_vocab_get_text(self._vocab, token)
        return text.decode(errors="replace")

    @property
    def bos_text(self) -> str:
        return self._written(llama.llama_vocab_bos(self._vocab))

    @property
    def eos_text(self) -> str:
        return self._written(llama.llama_vocab_eos(self._vocab))

    def ends(self, token: int) -> bool:
        """Whether the token ends an answer."""
        return bool(llama.llama_vocab_is_eog(self._vocab, token))


def _bitmap(pixels: Pixels, index: int) -> int:
    height, width, _ = pixels.shape
    data = np.ascontiguousarray(pixels).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmap: int = mtmd.mtmd_bitmap_init(width, height, data)
    mtmd.mtmd_bitmap_set_id(bitmap, b"%d" % index)
    return bitmap


def _grid(n_tokens: int, n_cols: int, n_rows: int) -> tuple[int, int]:
    # only M-RoPE projectors tell: others give one row, of what mostly was a square
    if n_cols * n_rows == n_tokens and n_rows > 1:
        return n_cols, n_rows
    side = round(n_tokens**0.5)
    return (side, side) if side * side == n_tokens else (n_tokens, 1)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt is not valid Unicode at character {error.start}: {text[error.start]!r}"
        ) from None
