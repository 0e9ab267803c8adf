import pytest

from csp_edge.errors import OptionError
from csp_edge.model_info import describe
from small_gguf import MMPROJ, MODEL


def test_describe() -> None:
    info = describe(MODEL, MMPROJ)
    assert (info.name, info.architecture) == ("csp-demo", "llama")
    assert info.license is not None and info.license.startswith("MIT")
    assert (info.n_layer, info.n_head, info.n_head_kv) == (6, 4, 2)
    assert (info.head_dim_k, info.head_dim_v, info.n_embd) == (64, 64, 256)
    assert (info.n_ctx, info.n_vocab, info.quantization) == (4096, 768, "Q8_0")
    assert info.n_params == 5115136
    assert info.weight_bytes == sum(info.bytes_by_type.values())
    assert list(info.bytes_by_type) == ["Q8_0", "F32"]
    assert info.kv_bytes_per_token == 6 * 2 * (64 + 64) * 2
    assert info.projector is not None
    assert (info.projector.type, info.projector.image_size) == ("mlp", 96)
    assert info.projector.patch_size == 12
    assert info.projector.tokens_per_picture == 64
    assert info.kv_bytes_per_picture == 64 * info.kv_bytes_per_token
    assert describe(MODEL).projector is None


def test_describe_kv_types() -> None:
    sizes = {t: describe(MODEL, kv_type=t).kv_bytes_per_token for t in ("f32", "q8_0", "q4_0")}
    assert sizes == {"f32": 6144, "q8_0": 1536 * 34 / 32, "q4_0": 1536 * 18 / 32}
    with pytest.raises(OptionError, match="unknown kv_type 'q3': choose one of f32, f16"):
        describe(MODEL, kv_type="q3")
