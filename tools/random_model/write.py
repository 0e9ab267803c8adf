"""Write a GGUF of a real model's shape, with random weights, and a projector that fits.

    python tools/random_model/write.py llava-1.5-7b models/ --type q4_k --layers 4

What they say means nothing, but they take the memory and the time of the real ones.
"""

import argparse
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType

sys.path.append(str(Path(__file__).parent))
from shapes import SHAPES, Text, Vision  # noqa: E402

TYPES = {
    "q4_k": (GGMLQuantizationType.Q4_K, LlamaFileType.MOSTLY_Q4_K_S),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
}
NORM_EPS = 1e-5
N_POOL = 16381  # blocks that are drawn, a prime: tensors repeat them, but no rows

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}: {{ message.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
CONTROL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
CONTROL += ["<fake_token_around_image>", "<global-img>"]
CONTROL += [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]

Bytes = npt.NDArray[np.uint8]


class Writer(GGUFWriter):
    """Collects tensors, and makes their weights only while they are written."""

    def __init__(self, path: Path, architecture: str) -> None:
        super().__init__(path, architecture)
        self.pending: list[Callable[[], npt.NDArray]] = []

    def matrix(self, name: str, n_in: int, n_out: int, kind: GGMLQuantizationType) -> None:
        """Random weights that leave the size of what they are multiplied with about as it is."""
        if n_in % GGML_QUANT_SIZES[kind][0]:
            kind = GGMLQuantizationType.Q8_0  # as llama.cpp's quantization does
        block, n_bytes = GGML_QUANT_SIZES[kind]
        shape = (n_out, n_in // block * n_bytes)
        self.add_tensor_info(name, shape, np.dtype(np.uint8), shape[0] * shape[1], kind)
        self.pending.append(lambda: np.resize(pool(kind, n_in), shape))

    def kernel(self, name: str, *shape: int) -> None:
        """Of a convolution, in f16: [n_out, n_channels, height, width]."""
        std = np.prod(shape[1:]) ** -0.5
        values = np.random.default_rng(1).normal(0, std, shape).astype(np.float16)
        self.add_tensor_info(name, shape, values.dtype, values.nbytes)
        self.pending.append(lambda: values)

    def vector(self, name: str, *shape: int, value: float = 0.0) -> None:
        values = np.full(shape, value, np.float32)
        self.add_tensor_info(name, shape, values.dtype, values.nbytes)
        self.pending.append(lambda: values)

    def norm(self, name: str, n: int, *, bias: bool = False) -> None:
        self.vector(f"{name}.weight", n, value=1.0)
        if bias:
            self.vector(f"{name}.bias", n)

    def done(self) -> None:
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_ti_data_to_file()
        for values in self.pending:
            self.write_tensor_data(values())
        self.close()


@cache
def pool(kind: GGMLQuantizationType, n_in: int) -> Bytes:
    """Blocks of random weights with a deviation of about n_in ** -0.5, none of them NaN."""
    rng = np.random.default_rng(0)
    std = n_in**-0.5
    if kind == GGMLQuantizationType.F16:
        values = rng.normal(0, std, 64 * N_POOL).astype(np.float16)
        return values.view(np.uint8)
    blocks = rng.integers(0, 256, (N_POOL, GGML_QUANT_SIZES[kind][1]), np.uint8)
    # of bytes, or of products of 6 and 4 bits less 6 bits times the products' mean
    scales = [std / 74] if kind == GGMLQuantizationType.Q8_0 else [std / 330, 7.5 * std / 330]
    head = np.array(scales, np.float16).view(np.uint8)
    blocks[:, : len(head)] = head
    return blocks.reshape(-1)


def write_vocabulary(writer: GGUFWriter, n_vocab: int) -> None:
    """Text comes in byte by byte."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *CONTROL]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    kinds += [TokenType.BYTE] * 256 + [TokenType.CONTROL] * len(CONTROL)
    # a space comes in as the first of these; mtmd looks the others up
    tokens += ["\u2581", "\n", "\n\n"]
    kinds += [TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.USER_DEFINED]
    n_unused = n_vocab - len(tokens)
    tokens += [f"<unused_{i}>" for i in range(n_unused)]
    kinds += [TokenType.UNUSED] * n_unused
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * n_vocab)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)


def write_text(path: Path, name: str, shape: Text, type_name: str) -> None:
    kind, file_type = TYPES[type_name]
    head_dim = shape.n_embd // shape.n_head
    n_kv = shape.n_head_kv * head_dim
    w = Writer(path, shape.architecture)
    w.add_name(f"{name}, random weights")
    w.add_file_type(file_type)
    w.add_context_length(shape.n_ctx)
    w.add_embedding_length(shape.n_embd)
    w.add_block_count(shape.n_layer)
    w.add_feed_forward_length(shape.n_ff)
    w.add_head_count(shape.n_head)
    w.add_head_count_kv(shape.n_head_kv)
    w.add_layer_norm_rms_eps(NORM_EPS)
    w.add_rope_freq_base(shape.rope_base)
    w.add_rope_dimension_count(head_dim)
    if shape.rope_sections:
        w.add_rope_dimension_sections(shape.rope_sections)
    write_vocabulary(w, shape.n_vocab)

    w.matrix("token_embd.weight", shape.n_embd, shape.n_vocab, kind)
    for i in range(shape.n_layer):
        layer = f"blk.{i}"
        w.norm(f"{layer}.attn_norm", shape.n_embd)
        for part, n in {"q": shape.n_embd, "k": n_kv, "v": n_kv}.items():
            w.matrix(f"{layer}.attn_{part}.weight", shape.n_embd, n, kind)
            if shape.bias:
                w.vector(f"{layer}.attn_{part}.bias", n)
        w.matrix(f"{layer}.attn_output.weight", shape.n_embd, shape.n_embd, kind)
        w.norm(f"{layer}.ffn_norm", shape.n_embd)
        w.matrix(f"{layer}.ffn_gate.weight", shape.n_embd, shape.n_ff, kind)
        w.matrix(f"{layer}.ffn_up.weight", shape.n_embd, shape.n_ff, kind)
        w.matrix(f"{layer}.ffn_down.weight", shape.n_ff, shape.n_embd, kind)
    w.norm("output_norm", shape.n_embd)
    if not shape.tied:
        w.matrix("output.weight", shape.n_embd, shape.n_vocab, kind)
    w.done()


def write_projector(path: Path, name: str, shape: Vision, n_out: int) -> None:
    """In f16, as they come."""
    n_embd, f16 = shape.n_embd, GGMLQuantizationType.F16
    qwen = shape.projector == "qwen2.5vl_merger"
    w = Writer(path, "clip")
    w.add_name(f"{name}, random weights")
    w.add_file_type(LlamaFileType.MOSTLY_F16)
    w.add_bool("clip.has_vision_encoder", True)
    w.add_string("clip.projector_type", shape.projector)
    w.add_bool("clip.use_silu" if qwen else "clip.use_gelu", True)
    for key, value in {
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
        "embedding_length": n_embd,
        "feed_forward_length": shape.n_ff,
        "projection_dim": n_out,
        "block_count": shape.n_layer,
        "attention.head_count": shape.n_head,
        "projector.scale_factor": shape.merge,
        "spatial_merge_size": shape.merge,
        "preproc_image_size": shape.longest_edge,
        "n_wa_pattern": shape.window_pattern,
    }.items():
        if value:
            w.add_uint32(f"clip.vision.{key}", value)
    w.add_float32("clip.vision.attention.layer_norm_epsilon", NORM_EPS)
    w.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    w.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])

    def affine(name: str, n_in: int, n_out: int) -> None:
        w.matrix(f"{name}.weight", n_in, n_out, f16)
        w.vector(f"{name}.bias", n_out)

    patch = (n_embd, 3, shape.patch_size, shape.patch_size)
    w.kernel("v.patch_embd.weight", *patch)
    if qwen:
        w.kernel("v.patch_embd.weight.1", *patch)
    else:
        is_clip = shape.projector == "mlp"
        n_patches = (shape.image_size // shape.patch_size) ** 2
        if is_clip:
            w.vector("v.class_embd", n_embd)
            w.norm("v.pre_ln", n_embd, bias=True)
        else:
            w.vector("v.patch_embd.bias", n_embd)
        w.vector("v.position_embd.weight", n_patches + is_clip, n_embd)
    for i in range(shape.n_layer):
        layer = f"v.blk.{i}"
        w.norm(f"{layer}.ln1", n_embd, bias=not qwen)
        for part in ("q", "k", "v", "out"):
            affine(f"{layer}.attn_{part}", n_embd, n_embd)
        w.norm(f"{layer}.ln2", n_embd, bias=not qwen)
        if qwen:
            affine(f"{layer}.ffn_gate", n_embd, shape.n_ff)
        affine(f"{layer}.ffn_up", n_embd, shape.n_ff)
        affine(f"{layer}.ffn_down", shape.n_ff, n_embd)
    w.norm("v.post_ln", n_embd, bias=not qwen)
    n_merged = n_embd * shape.merge**2
    if shape.projector == "idefics3":
        w.matrix("mm.model.fc.weight", n_merged, n_out, f16)
    else:
        n_hidden = n_merged if qwen else n_out
        affine("mm.0", n_merged, n_hidden)
        affine("mm.2", n_hidden, n_out)
    w.done()


def write(
    name: str, folder: Path, *, type_name: str = "q4_k", n_layer: int | None = None
) -> tuple[Path, Path]:
    """The model's file and its projector's, in `folder`."""
    shape = SHAPES[name] if n_layer is None else SHAPES[name].cut(n_layer)
    folder.mkdir(parents=True, exist_ok=True)
    stem = name if n_layer is None else f"{name}-{n_layer}-layers"
    model, mmproj = folder / f"{stem}-{type_name}.gguf", folder / f"mmproj-{stem}-f16.gguf"
    write_text(model, name, shape.text, type_name)
    write_projector(mmproj, name, shape.vision, shape.text.n_embd)
    return model, mmproj


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--type", choices=TYPES, default="q4_k", help="of the model's matrices")
    parser.add_argument("--layers", type=int, metavar="N", help="at most, in model and projector")
    args = parser.parse_args()
    if args.layers is not None and args.layers < 1:
        parser.error("--layers: give 1 or more")
    for path in write(args.name, args.folder, type_name=args.type, n_layer=args.layers):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
