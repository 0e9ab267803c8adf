"""Shapes of real models and their projectors, by their configurations' published numbers."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Text:
    """A decoder of llama's kind. rope_sections: M-RoPE's. bias: of queries, keys and values."""

    architecture: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    n_ctx: int
    rope_base: float = 10000.0
    rope_sections: tuple[int, ...] = ()
    bias: bool = False
    tied: bool = False  # the output's weights are the embeddings'


@dataclass(frozen=True)
class Vision:
    """A ViT and its projector, of the kind that mtmd calls `projector`."""

    projector: str
    n_layer: int
    n_embd: int
    n_head: int
    n_ff: int
    image_size: int
    patch_size: int
    merge: int = 1  # patches that become one token, by side
    longest_edge: int = 0  # of a picture before it is cut into tiles
    window_pattern: int = 0  # every so many layers one has full attention


@dataclass(frozen=True)
class Shape:
    text: Text
    vision: Vision

    def cut(self, n_layer: int) -> "Shape":
        """With `n_layer` layers at most in either part."""
        return Shape(
            replace(self.text, n_layer=min(self.text.n_layer, n_layer)),
            replace(self.vision, n_layer=min(self.vision.n_layer, n_layer)),
        )


SHAPES = {
    "llava-1.5-7b": Shape(
        Text("llama", 32, 4096, 32, 32, 11008, 32000, 4096),
        Vision("mlp", 24, 1024, 16, 4096, 336, 14),
    ),
    "qwen2.5-vl-3b": Shape(
        Text(
            "qwen2vl",
            36,
            2048,
            16,
            2,
            11008,
            151936,
            128000,
            rope_base=1e6,
            rope_sections=(16, 24, 24, 0),
            bias=True,
            tied=True,
        ),
        Vision("qwen2.5vl_merger", 32, 1280, 16, 3420, 560, 14, merge=2, window_pattern=8),
    ),
    "smolvlm-256m": Shape(
        Text("llama", 30, 576, 9, 3, 1536, 49280, 8192, rope_base=1e5),
        Vision("idefics3", 12, 768, 12, 3072, 512, 16, merge=4, longest_edge=2048),
    ),
}
