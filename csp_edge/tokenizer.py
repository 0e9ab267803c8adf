"""Text and pictures to tokens, and tokens to text."""

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from csp_edge import native
from csp_edge.errors import ImageError, ProjectorError, PromptError
from csp_edge.images import Picture
from csp_edge.native import llama, mtmd

# of these mtmd pads or numbers a picture by what stands before it in the prompt
_POSITIONAL = {"deepseek4v", "hunyuanvl"}


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


def count_tokens(items: Sequence[Item]) -> int:
    """Tokens of text, and those that stand for pictures."""
    return sum(1 if isinstance(item, int) else item.n_tokens for item in items)


class _Tile:
    """Where mtmd's chunk of some patches comes from, and that chunk without its pixels.

    Args:
        parts: what was tokenized together.
        picture: which of the pictures in it this is a tile of.
        index: which of the chunks that came out.
        chunk: that chunk.
    """

    def __init__(
        self, parts: Sequence[str | Picture], picture: int, index: int, chunk: int
    ) -> None:
        self.parts = parts
        self.picture = picture
        self.index = index
        self.placeholder: int = mtmd.mtmd_input_chunk_get_placeholder(chunk)
        weakref.finalize(self, mtmd.mtmd_input_chunk_free, self.placeholder)


class Prompt:
    """Tokens and pictures ready for prefill(). A context manager: leaving it frees the pictures.

    No more than one picture is held as mtmd makes it for the encoder: the last one asked for.
    """

    def __init__(
        self, items: list[Item], tiles: Sequence[_Tile] = (), tokenizer: "Tokenizer | None" = None
    ) -> None:
        self.items = items
        self.n_tokens = count_tokens(items)
        self.n_pos = sum(1 if isinstance(item, int) else item.n_pos for item in items)
        self.has_pictures = any(isinstance(item, Patches) for item in items)
        places = (i for i, item in enumerate(items) if isinstance(item, Patches))
        self._tiles = dict(zip(places, tiles, strict=True))
        self._tokenizer = tokenizer
        self._loaded: tuple[int, int] | None = None  # a picture, and the chunks that it is in

    def placeholder(self, i: int) -> int:
        """mtmd's chunk of item `i`, good for decoding an embedding of it."""
        return self._tiles[i].placeholder

    def with_pixels(self, i: int) -> int:
        """mtmd's chunk of item `i`, good for encoding, until another picture's is asked for.

        Raises:
            ImageError: the picture can't be read any more, or is another one now.
        """
        item, tile = self.items[i], self._tiles[i]
        assert isinstance(item, Patches) and self._tokenizer
        if not self._loaded or self._loaded[0] != item.picture:
            self._unload()
            chunks = self._tokenizer._chunks(tile.parts, with_pixels=tile.picture)
            self._loaded = item.picture, chunks
        chunk: int = mtmd.mtmd_input_chunks_get(self._loaded[1], tile.index)
        if not chunk or mtmd.mtmd_input_chunk_get_n_tokens(chunk) != item.n_tokens:
            raise ImageError(
                f"picture {item.picture + 1}: with pixels it has other tiles, scale it"
            )
        return chunk

    def _unload(self) -> None:
        if self._loaded:
            mtmd.mtmd_input_chunks_free(self._loaded[1])
        self._loaded = None

    def __enter__(self) -> "Prompt":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._unload()
        self._tiles.clear()


class Tokenizer:
    """A model's vocabulary, and its projector's way to lay out pictures.

    Args:
        path: the model's file, for messages.
        model, projector: llama.cpp's; the projector may be None.
        projector_type: as in its file.
    """

    def __init__(self, path: Path, model: Any, projector: Any, projector_type: str) -> None:
        self._path = path
        self._vocab = llama.llama_model_get_vocab(model)
        self._projector = projector
        self._is_positional = projector_type in _POSITIONAL
        self.n_vocab: int = llama.llama_vocab_n_tokens(self._vocab)

    def tokenize(self, parts: Sequence[str | Picture]) -> Prompt:
        """A prompt of texts, each tokenized alone, and pictures.

        Raises:
            PromptError: no tokens come out, or a text is not valid Unicode.
            ProjectorError: there are pictures and no projector, or one that marks them with tokens
                that the model lacks.
            ImageError: the projector refuses a picture.
        """
        items: list[Item] = []
        tiles: list[_Tile] = []
        n_pictures = 0
        has_pictures = any(isinstance(part, Picture) for part in parts)
        for group in [parts] if has_pictures and self._is_positional else [[p] for p in parts]:
            match group:
                case [str() as text]:
                    items += self._tokenize_text(text)
                case _:
                    n_pictures += self._lay_out(group, n_pictures, items, tiles)
        # a template may have written it already
        bos = llama.llama_vocab_bos(self._vocab)
        if llama.llama_vocab_get_add_bos(self._vocab) and items[:1] != [bos]:
            items = [bos, *items]
        if not items:
            raise PromptError("the prompt is empty: write something")
        return Prompt(items, tiles, self)

    def _tokenize_text(self, text: str) -> list[int]:
        data = _utf8(text)
        n = -len(data) - 8
        for _ in range(2):  # told that they are more, it says how many
            tokens = (llama.llama_token * -n)()
            n = llama.llama_tokenize(self._vocab, data, len(data), tokens, len(tokens), False, True)
            if n >= 0:
                break
        if n < 0:
            raise PromptError(f"the prompt of {len(data)} bytes can't be tokenized: shorten it")
        return list(tokens[:n])

    def _lay_out(
        self,
        parts: Sequence[str | Picture],
        n_before: int,
        items: list[Item],
        tiles: list[_Tile],
    ) -> int:
        """Append what comes of some parts, by the sizes of their pictures alone.

        Returns:
            How many pictures that were. There are `n_before` in the prompt before them.
        """
        pictures = [part for part in parts if isinstance(part, Picture)]
        n_tiles = [0] * len(pictures)
        chunks = self._chunks(parts)
        try:
            for i in range(mtmd.mtmd_input_chunks_size(chunks)):
                chunk = mtmd.mtmd_input_chunks_get(chunks, i)
                if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                    n = ctypes.c_size_t()
                    tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, n)
                    items += self._marks(tokens[: n.value])
                    continue
                picture = int(mtmd.mtmd_input_chunk_get_id(chunk))
                key, tile = pictures[picture].key, n_tiles[picture]
                items.append(self._patches(chunk, key, n_before + picture, tile))
                tiles.append(_Tile(parts, picture, i, chunk))
                n_tiles[picture] += 1
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
        return len(pictures)

    def _marks(self, tokens: list[int]) -> list[int]:
        if min(tokens, default=0) < 0:
            raise ProjectorError(
                f"{self._path}: has no token for a mark that the projector sets around pictures: "
                "give the model that the projector was made for"
            )
        return tokens

    def _patches(self, chunk: int, key: bytes, picture: int, tile: int) -> Patches:
        n_tokens = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        grid = mtmd.mtmd_input_chunk_get_tokens_image(chunk)
        n_cols, n_rows = _grid(
            n_tokens, mtmd.mtmd_image_tokens_get_nx(grid), mtmd.mtmd_image_tokens_get_ny(grid)
        )
        n_pos = mtmd.mtmd_input_chunk_get_n_pos(chunk)
        causal = not mtmd.mtmd_decode_use_non_causal(self._projector, chunk)
        return Patches(key, picture, tile, n_tokens, n_pos, n_cols, n_rows, causal)

    def _chunks(self, parts: Sequence[str | Picture], with_pixels: int | None = None) -> int:
        """mtmd's chunks, to be freed, with the pixels of one of the pictures, or of none."""
        if not self._projector:
            raise ProjectorError(
                f"{self._path}: pictures need a projector: put its mmproj file beside "
                "the model, or give mmproj="
            )
        bitmaps: list[int] = []
        chunks: int = mtmd.mtmd_input_chunks_init()
        try:
            inputs = []
            for part in parts:
                if isinstance(part, Picture):
                    bitmaps.append(_bitmap(part, len(bitmaps), with_pixels == len(bitmaps)))
                    inputs.append(mtmd.mtmd_input_part(None, bitmaps[-1]))
                else:
                    data = _utf8(part)
                    text = mtmd.mtmd_input_text(data, len(data), False, True)
                    inputs.append(mtmd.mtmd_input_part(ctypes.pointer(text), None))
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
        except BaseException:
            mtmd.mtmd_input_chunks_free(chunks)
            raise
        finally:
            for bitmap in bitmaps:
                mtmd.mtmd_bitmap_free(bitmap)
        return chunks

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


def _bitmap(picture: Picture, index: int, with_pixels: bool) -> int:
    width, height, data = picture.width, picture.height, None
    if with_pixels:
        pixels = picture.pixels()
        height, width, _ = pixels.shape
        data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
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
