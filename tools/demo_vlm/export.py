"""Write a trained demo model as the GGUF pair that csp_edge/models holds.

python tools/demo_vlm/export.py RUN_FOLDER/all.pt csp_edge/models
"""

import argparse
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from model import HEAD_DIM, N_CTX, N_PIXELS_PATCH, NORM_EPS, ROPE_BASE, TEXT, VISION
from tokens import BOS, BYTES, EOS, IDS, MERGES, PAD, SPECIAL, TOKENS

from csp_edge.eval.scenes import N_PIXELS

NAME = "csp-demo"
DESCRIPTION = "Answers questions about drawn scenes: emoji, shapes and signs, in up to 16 pictures"
LICENSE = "MIT; trained on drawings under Apache-2.0, CC-BY-4.0 and MIT, see licenses/drawings.txt"

# pictures, which come as parts of their own type or as the marker, are numbered through the whole
# conversation, and stand before the question
TEMPLATE = """\
{{ bos_token }}{% set n = namespace(image=0) %}
{% for message in messages %}
{% if message.role == 'assistant' %} {{ message.content }}{{ eos_token }}
{% elif message.content is string %}
<|user|> {{ message.content }}<|assistant|>
{% else %}
{% for part in message.content if part.type != 'text' or part.text == '<__media__>' %}
{% set n.image = n.image + 1 %} image {{ n.image }}:<__media__>
{% endfor %}
<|user|>
{% for part in message.content if part.type == 'text' and part.text != '<__media__>' %}
 {{ part.text }}
{% endfor %}
<|assistant|>
{% endif %}
{% endfor %}
""".replace("\n", "")

Weights = dict[str, np.ndarray]


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_matrix(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, kind: Type) -> None:
    writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)


def add_general(writer: gguf.GGUFWriter) -> None:
    writer.add_name(NAME)
    writer.add_description(DESCRIPTION)
    writer.add_license(LICENSE)
    writer.add_string(
        "general.training_data",
        "scenes drawn by csp_edge/eval/scenes.py of Noto Emoji, Twemoji and EmojiOne 2",
    )


def export_text(weights: Weights, file: Path) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    add_general(writer)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(TEXT["n_embd"])
    writer.add_block_count(TEXT["n_layer"])
    writer.add_feed_forward_length(TEXT["n_ff"])
    writer.add_head_count(TEXT["n_head"])
    writer.add_head_count_kv(TEXT["n_head_kv"])
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)

    types = [gguf.TokenType.NORMAL] * len(TOKENS)
    for i, token in enumerate(TOKENS):
        if token in SPECIAL:
            types[i] = gguf.TokenType.CONTROL
        elif token.startswith("<unused"):
            types[i] = gguf.TokenType.UNUSED
    assert TOKENS[: len(BYTES)] == BYTES
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(IDS[BOS])
    writer.add_eos_token_id(IDS[EOS])
    writer.add_pad_token_id(IDS[PAD])
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)

    add_matrix(writer, "token_embd.weight", weights["embedding.weight"], Type.Q8_0)
    add_matrix(writer, "output.weight", weights["output.weight"], Type.Q8_0)
    writer.add_tensor("output_norm.weight", weights["norm.weight"])
    for i in range(TEXT["n_layer"]):
        for name, ours in {
            "attn_q": "q",
            "attn_k": "k",
            "attn_v": "v",
            "attn_output": "out",
            "ffn_gate": "gate",
            "ffn_up": "up",
            "ffn_down": "down",
        }.items():
            weight = weights[f"blocks.{i}.{ours}.weight"]
            add_matrix(writer, f"blk.{i}.{name}.weight", weight, Type.Q8_0)
        writer.add_tensor(f"blk.{i}.attn_norm.weight", weights[f"blocks.{i}.n1.weight"])
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", weights[f"blocks.{i}.n2.weight"])
    write(writer)


def export_vision(weights: Weights, file: Path) -> None:
    n_embd, n_layer = VISION["n_embd"], VISION["n_layer"]
    writer = gguf.GGUFWriter(file, "clip")
    add_general(writer)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)
    for key, value in {
        "image_size": N_PIXELS,
        "patch_size": N_PIXELS_PATCH,
        "embedding_length": n_embd,
        "feed_forward_length": VISION["n_ff"],
        "projection_dim": TEXT["n_embd"],
        # LLaVA reads the last layer but one: the last is never run
        "block_count": n_layer + 1,
        "attention.head_count": n_embd // HEAD_DIM,
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", NORM_EPS)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)

    patch = weights["vision.patch.weight"].reshape(n_embd, N_PIXELS_PATCH, N_PIXELS_PATCH, 3)
    writer.add_tensor("v.patch_embd.weight", f16(patch.transpose(0, 3, 1, 2)))
    writer.add_tensor("v.position_embd.weight", weights["vision.position"])
    for name, ours in {"pre_ln": "pre", "post_ln": "post"}.items():
        add_affine(writer, f"v.{name}", weights, f"vision.{ours}", np.float32)
    for i in range(n_layer + 1):
        ours = f"vision.blocks.{min(i, n_layer - 1)}"
        qkv = zip(
            *(np.split(weights[f"{ours}.qkv.{part}"], 3) for part in ("weight", "bias")),
            strict=True,
        )
        for name, (weight, bias) in zip("qkv", qkv, strict=True):
            writer.add_tensor(f"v.blk.{i}.attn_{name}.weight", f16(weight))
            writer.add_tensor(f"v.blk.{i}.attn_{name}.bias", np.ascontiguousarray(bias))
        for name, part in {"attn_out": "out", "ffn_up": "up", "ffn_down": "down"}.items():
            add_affine(writer, f"v.blk.{i}.{name}", weights, f"{ours}.{part}", np.float16)
        for name in ("ln1", "ln2"):
            add_affine(writer, f"v.blk.{i}.{name}", weights, f"{ours}.{name}", np.float32)
    for name, part in {"mm.0": "mm0", "mm.2": "mm2"}.items():
        add_affine(writer, name, weights, part, np.float16)
    write(writer)


def add_affine(
    writer: gguf.GGUFWriter, name: str, weights: Weights, ours: str, kind: type[np.floating]
) -> None:
    writer.add_tensor(f"{name}.weight", weights[f"{ours}.weight"].astype(kind))
    writer.add_tensor(f"{name}.bias", weights[f"{ours}.bias"])


def f16(weight: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(weight, np.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    state = torch.load(arguments.checkpoint, map_location="cpu", weights_only=True)["model"]
    weights = {name: tensor.float().numpy() for name, tensor in state.items()}
    export_text(weights, arguments.folder / f"{NAME}-q8_0.gguf")
    export_vision(weights, arguments.folder / f"mmproj-{NAME}-f16.gguf")


if __name__ == "__main__":
    main()
