"""Models and projectors looked at before llama.cpp sees them.

llama.cpp ends the process at some values of a header, mtmd at more. What can be known to end there
is refused here.
"""

import math
import re
from typing import NamedTuple

from gguf.constants import GGUFValueType

from csp_edge.errors import ModelError, ProjectorError
from csp_edge.gguf_file import Array, Header, read_parts

_MAX_LAYERS = 512
_MAX_EXPERTS = 1024


class Dimensions(NamedTuple):
    """A language model's. Heads for each layer; their sizes in layers with full attention."""

    n_ctx: int
    n_embd: int
    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]
    head_dim_k: int
    head_dim_v: int

    @property
    def n_layer(self) -> int:
        return len(self.n_head)


def dimensions(header: Header) -> Dimensions:
    """The dimensions of a language model.

    Raises:
        ModelError: one is missing, or makes no sense.
    """
    arch = header.architecture
    n_layer = _int(header, f"{arch}.block_count", 1, _MAX_LAYERS)
    n_embd = _int(header, f"{arch}.embedding_length", 1, 2**20)
    n_ctx = _int(header, f"{arch}.context_length", 1, 2**31 - 1)
    heads = _per_layer(header, f"{arch}.attention.head_count", n_layer, (0,) * n_layer)
    heads_kv = _per_layer(header, f"{arch}.attention.head_count_kv", n_layer, heads)
    head_dim = n_embd // max(1, heads[0])
    head_dim_k = _optional(header, f"{arch}.attention.key_length", head_dim, 1, 2**16)
    head_dim_v = _optional(header, f"{arch}.attention.value_length", head_dim, 1, 2**16)
    return Dimensions(n_ctx, n_embd, heads, heads_kv, head_dim_k, head_dim_v)


def check_model(header: Header) -> None:
    """Refuse a language model whose header llama.cpp would stumble over.

    Raises:
        ModelError: it is a projector, a part of a split model is missing, or a value makes no
            sense.
    """
    arch = header.architecture
    if arch == "clip":
        raise ModelError(f"{header.path}: a projector, give the model it belongs to")
    if not any(part.tensors for part in read_parts(header)):
        raise ModelError(f"{header.path}: holds no weights")
    dims = dimensions(header)
    _check_heads(header, dims)
    _check_experts(header, dims.n_layer)
    _optional(header, f"{arch}.nextn_predict_layers", 0, 0, dims.n_layer - 1)
    _check_epsilons(header)
    _check_vocabulary(header)


def check_projector(header: Header) -> None:
    """Refuse a projector whose header mtmd would stumble over.

    Raises:
        ProjectorError: it is not a projector, or a value makes no sense.
    """
    if header.architecture != "clip":
        raise ProjectorError(f"{header.path}: not a projector, but a {header.architecture} model")
    for key, kind in header.types.items():
        name = re.sub(r"^clip\.(vision\.|audio\.|gen\.audio\.)?", "", key)
        if name == key and key not in ("general.name", "general.description"):
            continue
        if kind != _CLIP_TYPES.get(name, kind):
            raise ProjectorError(f"{header.path}: {key} is of type {kind.name}, it is corrupt")
        if name in _CLIP_UINTS:
            low = 1 if name in _CLIP_POSITIVE else 0
            high = _CLIP_MAX.get(name, 2**31 - 1)
            if not low <= header.metadata[key] <= high:
                value = header.metadata[key]
                raise ProjectorError(f"{header.path}: {key} is {value}, it is corrupt")
    _check_epsilons(header)
    encoders = [header.metadata.get(f"clip.has_{kind}_encoder") for kind in _CLIP_ENCODERS]
    if not any(encoders):
        raise ProjectorError(f"{header.path}: has neither a vision nor an audio encoder")
    if encoders[0] and projector_type(header) in _FIXED_SIZE:
        _check_vision(header)


def check_pair(model: Header, mmproj: Header) -> None:
    """Refuse a projector that was made for another model.

    Raises:
        ProjectorError: the sizes of their embeddings differ. A few kinds of projector don't say
            theirs in the header; they pass, and mtmd refuses them.
    """
    n_embd = _int(model, f"{model.architecture}.embedding_length", 1, 2**20)
    n_projected = _n_projected(mmproj)
    if n_projected is not None and n_projected != n_embd:
        raise ProjectorError(
            f"{mmproj.path}: made for another model, its embeddings have {n_projected} values, "
            f"those of {model.path} {n_embd}"
        )


def projector_type(header: Header) -> str:
    """The projector's type as mtmd knows it, "" if there is none."""
    general = header.metadata.get("clip.projector_type")
    return str(general or header.metadata.get("clip.vision.projector_type", ""))


# values


def _bad(header: Header, key: str, value: object, wanted: str) -> ModelError | ProjectorError:
    error = ProjectorError if header.architecture == "clip" else ModelError
    has = "is missing" if value is None else f"is {str(value)[:80]}"
    return error(f"{header.path}: {key} {has}, not {wanted}: the file is corrupt")


def _int(header: Header, key: str, low: int, high: int) -> int:
    value = header.metadata.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _bad(header, key, value, f"a number from {low} to {high}")
    return value


def _optional(header: Header, key: str, default: int, low: int, high: int) -> int:
    return _int(header, key, low, high) if key in header.metadata else default


def _per_layer(header: Header, key: str, n_layer: int, default: tuple[int, ...]) -> tuple[int, ...]:
    """Either one number for all layers, or an array of them."""
    value = header.metadata.get(key, default)
    if isinstance(value, Array):
        value = value.values
    values = value if isinstance(value, tuple) else (value,) * n_layer
    if len(values) != n_layer or not all(type(n) is int and 0 <= n <= 2**16 for n in values):
        raise _bad(header, key, value, f"{n_layer} numbers of at least 0")
    return values


# models


def _check_heads(header: Header, dims: Dimensions) -> None:
    prefix = f"{header.architecture}.attention"
    if any(kv and n % kv for n, kv in zip(dims.n_head, dims.n_head_kv, strict=True)):
        raise _bad(header, f"{prefix}.head_count_kv", dims.n_head_kv, "dividing head_count")
    n_head = dims.n_head[0]
    if not n_head:
        return
    if f"{prefix}.key_length" not in header.metadata and dims.n_embd % n_head:
        raise _bad(header, f"{prefix}.head_count", n_head, f"dividing {dims.n_embd}")
    _check_rope(header, dims.head_dim_k)


def _check_rope(header: Header, head_dim: int) -> None:
    arch = header.architecture
    key = f"{arch}.rope.dimension_count"
    n_rot = _optional(header, key, head_dim, 0, head_dim)
    head_dim_swa = _optional(header, f"{arch}.attention.key_length_swa", head_dim, 1, 2**16)
    n_rot_swa = _optional(header, f"{key}_swa", min(n_rot, head_dim_swa), 0, head_dim_swa)
    if n_rot % 2 or n_rot_swa % 2:
        raise _bad(header, key, (n_rot, n_rot_swa), "even")
    key = f"{arch}.rope.scaling.type"
    scaling = header.metadata.get(key, "none")
    if scaling not in ("none", "linear", "yarn", "longrope"):
        raise _bad(header, key, scaling, "none, linear, yarn or longrope")
    key = f"{arch}.rope.dimension_sections"
    sections = header.metadata.get(key)
    if isinstance(sections, Array) and not any(
        isinstance(n, int) and n > 0 for n in sections.values or ()
    ):
        raise _bad(header, key, sections.values, "a number above 0 among them")


def _check_experts(header: Header, n_layer: int) -> None:
    arch = header.architecture
    prefix = f"{arch}.expert"
    n_expert = _optional(header, f"{prefix}_count", 0, 0, _MAX_EXPERTS)
    n_used = max(_per_layer(header, f"{prefix}_used_count", n_layer, (0,) * n_layer))
    n_groups = _optional(header, f"{prefix}_group_count", 0, 0, _MAX_EXPERTS)
    n_groups_used = _optional(header, f"{prefix}_group_used_count", 0, 0, _MAX_EXPERTS)
    if arch.startswith("hunyuan") and n_expert <= 1:
        return
    if n_used > n_expert or (n_expert and not n_used):
        raise _bad(header, f"{prefix}_used_count", n_used, f"from 1 to {n_expert}")
    if n_groups and n_groups >= n_expert:
        raise _bad(header, f"{prefix}_group_count", n_groups, f"below {n_expert}")
    if n_groups > 1 and (n_expert % n_groups or not 0 < n_groups_used < n_groups):
        raise _bad(header, f"{prefix}_group_used_count", n_groups_used, f"below {n_groups}")


def _check_epsilons(header: Header) -> None:
    for key, value in header.metadata.items():
        is_fine = isinstance(value, float) and math.isfinite(value) and value >= 0
        if key.endswith("epsilon") and not is_fine:
            raise _bad(header, key, value, "a number of at least 0")


def _check_vocabulary(header: Header) -> None:
    kind = header.metadata.get("tokenizer.ggml.model")
    if not isinstance(kind, str):
        raise _bad(header, "tokenizer.ggml.model", kind, "a str")
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if kind not in ("none", "no_vocab") and not (
        isinstance(tokens, Array) and tokens.type == GGUFValueType.STRING and tokens.length
    ):
        raise ModelError(f"{header.path}: holds no vocabulary (tokenizer.ggml.tokens)")


# projectors

# what clip.cpp reads, by the key's last parts: it aborts on any other type
_CLIP_ENCODERS = ("vision", "audio", "gen_audio")
_CLIP_POSITIVE = frozenset(
    """
    attention.head_count attention.head_count_kv attention.head_dim embedding_length patch_size
    projector.query_side projector.scale_factor projector.window_side spatial_merge_size
    """.split()  # noqa: SIM905
)
_CLIP_UINTS = _CLIP_POSITIVE.union(
    """
    block_count chunk_size conv_kernel_size expert_used_count feed_forward_length image_max_pixels
    image_min_pixels image_size local_block_count local_group_size max_pos_emb minicpmv_query_num
    n_wa_pattern num_mel_bins preproc_image_size preproc_max_tiles preproc_min_tiles projection_dim
    projector.downsample_rate projector.head_count projector.stack_factor projector.window_size
    rvq.num_quantizers sam.block_count sam.embedding_length sam.head_count subsampling_factor
    window_size
    """.split()  # noqa: SIM905
)
_CLIP_MAX = {"image_size": 8192, "patch_size": 65535}
_CLIP_TYPES = {
    "general.name": GGUFValueType.STRING,
    "general.description": GGUFValueType.STRING,
    "projector_type": GGUFValueType.STRING,
    "mm_patch_merge_type": GGUFValueType.STRING,
    "model_variant": GGUFValueType.STRING,
    "attention.layer_norm_epsilon": GGUFValueType.FLOAT32,
    "swiglu_clamp": GGUFValueType.FLOAT32,
    "use_gelu": GGUFValueType.BOOL,
    "use_silu": GGUFValueType.BOOL,
    "minicpmv_version": GGUFValueType.INT32,
    **{f"has_{kind}_encoder": GGUFValueType.BOOL for kind in _CLIP_ENCODERS},
    **dict.fromkeys(_CLIP_UINTS, GGUFValueType.UINT32),
}

# encoders whose pictures all have image_size, with learned positions and one kernel for patches
_FIXED_SIZE = {"mlp", "ldp", "ldpv2", "gemma3", "idefics3", "internvl"}

# the tensor and its dimension that give the size of a projector's embeddings
_PROJECTED = {
    "gemma3": ("mm.input_projection.weight", 0),
    "gemma4v": ("mm.input_projection.weight", 1),
    "idefics3": ("mm.model.fc.weight", 1),
    "internvl": ("mm.model.mlp.3.weight", 1),
    "janus_pro": ("mm.1.bias", 0),
    "kimivl": ("mm.2.weight", 1),
    "lfm2": ("mm.2.weight", 1),
    "llama4": ("mm.model.fc.weight", 1),
    "mlp": ("mm.2.weight", 1),
    "pixtral": ("mm.2.weight", 1),
    "qwen2vl_merger": ("mm.2.bias", 0),
    "qwen2.5vl_merger": ("mm.2.bias", 0),
    "qwen3vl_merger": ("mm.2.bias", 0),
}


def _check_vision(header: Header) -> None:
    n_embd, n_head, n_layer, image_size, patch_size = (
        _int(header, f"clip.vision.{name}", 0, 2**31 - 1)
        for name in (
            "embedding_length",
            "attention.head_count",
            "block_count",
            "image_size",
            "patch_size",
        )
    )
    if not 0 < n_layer <= _MAX_LAYERS or n_embd % n_head or image_size < patch_size:
        raise ProjectorError(
            f"{header.path}: an encoder of {n_layer} layers, {n_embd} values, {n_head} heads and "
            f"{patch_size}-pixel patches of {image_size} can't be, the file is corrupt"
        )
    for name in _vision_tensors(header, n_layer):
        if name not in header.tensors:
            raise ProjectorError(f"{header.path}: tensor {name!r} is missing, the file is corrupt")
    n_positions = (image_size // patch_size) ** 2 + ("v.class_embd" in header.tensors)
    for name, shape in {
        "v.patch_embd.weight": (patch_size, patch_size, 3, n_embd),
        "v.position_embd.weight": (n_embd, n_positions),
    }.items():
        found = header.tensors[name].shape
        # some converters leave dimensions of 1 behind
        if found[: len(shape)] != shape or math.prod(found[len(shape) :]) != 1:
            raise ProjectorError(
                f"{header.path}: tensor {name!r} has the shape "
                f"{list(found)}, not {list(shape)}: the file is corrupt"
            )


def _vision_tensors(header: Header, n_layer: int) -> list[str]:
    """Those that mtmd takes for granted."""
    names = ["v.patch_embd.weight", "v.position_embd.weight"]
    for i in range(n_layer):
        parts = ["ln1", "ln2", "attn_out", "ffn_up", "ffn_down"]
        if f"v.blk.{i}.attn_qkv.weight" not in header.tensors:
            parts += ["attn_q", "attn_k", "attn_v"]
        names += [f"v.blk.{i}.{part}.weight" for part in parts]
    if projector_type(header) == "mlp":
        layers = (0, 1, 3, 4) if "mm.3.weight" in header.tensors else (0, 2)
        names += [f"mm.{i}.{part}" for i in layers for part in ("weight", "bias")]
    return names


def _n_projected(header: Header) -> int | None:
    """The size of its embeddings, without deepstack's further layers."""
    name, axis = _PROJECTED.get(projector_type(header), ("", 0))
    if name == "mm.2.weight" and "mm.3.weight" in header.tensors:
        name, axis = "mm.3.bias", 0
    tensor = header.tensors.get(name)
    return tensor.shape[axis] if tensor and axis < len(tensor.shape) else None
