"""GGUF files for tests of what is read from headers: the embedded pair, and smaller ones."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

MODELS = Path(__file__).parents[1] / "csp_edge/models"
MODEL = MODELS / "csp-demo-q8_0.gguf"
MMPROJ = MODELS / "mmproj-csp-demo-f16.gguf"


def write(path: Path, architecture: str = "llama", n_embd: int = 32, **keys: Any) -> Path:
    """A small GGUF with one tensor, sound as far as headers go."""
    writer = gguf.GGUFWriter(path, architecture)
    if architecture == "clip":
        writer.add_bool("clip.has_vision_encoder", True)
        writer.add_string("clip.projector_type", "pixtral")
        writer.add_tensor("mm.2.weight", np.zeros((n_embd, 8), np.float32))
    else:
        for name, value in {
            "block_count": 1,
            "embedding_length": n_embd,
            "context_length": 8,
            "attention.head_count": 2,
        }.items():
            writer.add_uint32(f"{architecture}.{name}", value)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(keys.pop("tokens", ["a", "b", "", ""]))
        writer.add_tensor("token_embd.weight", np.zeros((4, n_embd), np.float32))
    for key, value in keys.items():
        writer.add_uint32(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def copy(source: Path, path: Path, **keys: str | list[int]) -> Path:
    """A GGUF with other metadata, "__" for a dot."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    metadata = {
        key.replace("__", "."): MetadataDetails(gguf.GGUFValueType.get_type(value), value)
        for key, value in keys.items()
    }
    copy_with_new_metadata(reader, writer, metadata, [])
    return path


def unquantize(source: Path, target: Path) -> Path:
    """The same model, with weights in F32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != gguf.Keys.General.ARCHITECTURE:
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
