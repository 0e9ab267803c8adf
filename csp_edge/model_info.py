"""What a model is, by its header."""

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGMLQuantizationType, LlamaFileType

from csp_edge.errors import OptionError
from csp_edge.gguf_check import check_model, check_pair, check_projector, dimensions, projector_type
from csp_edge.gguf_file import BLOCKS, Array, Header, read_header, read_parts, type_name

# types of K and V in the cache
KV_TYPES = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q4_0": GGMLQuantizationType.Q4_0,
}


@dataclass(frozen=True, slots=True)
class ProjectorInfo:
    """Figures of a projector."""

    path: Path
    type: str
    image_size: int  # 0: any
    patch_size: int
    tokens_per_picture: int | None  # None: depends on the picture
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Figures of a model, from its header."""

    path: Path
    name: str
    architecture: str
    license: str | None
    n_params: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim_k: int
    head_dim_v: int
    n_embd: int
    n_ctx: int
    n_vocab: int
    quantization: str
    weight_bytes: int
    bytes_by_type: dict[str, int]
    kv_type: str
    kv_bytes_per_token: float  # all layers; quantized types may give fractions
    kv_bytes_per_picture: float | None
    projector: ProjectorInfo | None


def ggml_type(name: str, value: object) -> int:
    """Of a type of K and V in KV_TYPES.

    Args:
        name: of the option that has this value.

    Raises:
        OptionError: there is no such type.
    """
    if not isinstance(value, str) or value not in KV_TYPES:
        raise OptionError(f"{name}={value!r}: choose one of {', '.join(KV_TYPES)}")
    return int(KV_TYPES[value])


def describe(
    model: str | os.PathLike[str],
    mmproj: str | os.PathLike[str] | None = None,
    kv_type: str = "f16",
) -> ModelInfo:
    """Figures of a model and its projector, from their headers alone.

    Args:
        model: the model's file, the first part of a split one.
        mmproj: its projector's.
        kv_type: the cache's type, one of `KV_TYPES`.

    Raises:
        ModelError, ProjectorError: a file is corrupt, or they don't belong together.
        OptionError: there is no such cache type.
    """
    if not isinstance(kv_type, str) or kv_type not in KV_TYPES:
        raise OptionError(f"unknown kv_type {kv_type!r}: choose one of {', '.join(KV_TYPES)}")
    header = read_header(model)
    check_model(header)
    projector = None if mmproj is None else _describe_projector(read_header(mmproj), header)

    dims = dimensions(header)
    tensors = [tensor for part in read_parts(header) for tensor in part.tensors.values()]
    bytes_by_type: Counter[str] = Counter()
    for tensor in tensors:
        bytes_by_type[type_name(tensor.type)] += tensor.n_bytes
    block, n_bytes = BLOCKS[KV_TYPES[kv_type]]
    per_token = sum(dims.n_head_kv) * (dims.head_dim_k + dims.head_dim_v) * n_bytes / block
    per_picture = None
    if projector is not None and projector.tokens_per_picture is not None:
        per_picture = per_token * projector.tokens_per_picture
    licence = header.metadata.get("general.license")
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    return ModelInfo(
        path=header.path,
        name=str(header.metadata.get("general.name", header.path.stem)),
        architecture=header.architecture,
        license=None if licence is None else str(licence),
        n_params=sum(math.prod(tensor.shape) for tensor in tensors),
        n_layer=dims.n_layer,
        n_head=max(dims.n_head),
        n_head_kv=max(dims.n_head_kv),
        head_dim_k=dims.head_dim_k,
        head_dim_v=dims.head_dim_v,
        n_embd=dims.n_embd,
        n_ctx=dims.n_ctx,
        n_vocab=tokens.length if isinstance(tokens, Array) else 0,
        quantization=_quantization(header, bytes_by_type),
        weight_bytes=bytes_by_type.total(),
        bytes_by_type=dict(bytes_by_type.most_common()),
        kv_type=kv_type,
        kv_bytes_per_token=per_token,
        kv_bytes_per_picture=per_picture,
        projector=projector,
    )


def _describe_projector(header: Header, model: Header) -> ProjectorInfo:
    check_projector(header)
    check_pair(model, header)
    kind = projector_type(header)
    image_size = header.metadata.get("clip.vision.image_size", 0)
    patch_size = header.metadata.get("clip.vision.patch_size", 0)
    tokens = None
    if image_size and patch_size:
        n_patches = (image_size // patch_size) ** 2
        if kind in ("mlp", "janus_pro") and "clip.vision.image_grid_pinpoints" not in header.types:
            tokens = n_patches
        elif kind in ("ldp", "ldpv2"):
            tokens = n_patches // 4
        elif kind == "gemma3":
            tokens = n_patches // header.metadata.get("clip.vision.projector.scale_factor", 4) ** 2
    return ProjectorInfo(
        path=header.path,
        type=kind,
        image_size=image_size,
        patch_size=patch_size,
        tokens_per_picture=tokens,
        weight_bytes=sum(tensor.n_bytes for tensor in header.tensors.values()),
    )


def _quantization(header: Header, bytes_by_type: Counter[str]) -> str:
    """The file's own word for it, else the type that most bytes are of."""
    try:
        name = LlamaFileType(header.metadata["general.file_type"]).name
    except (KeyError, ValueError):
        return bytes_by_type.most_common(1)[0][0]
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")
