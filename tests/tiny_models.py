"""Models of other architectures, in small: random weights, the embedded model's vocabulary."""

from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter

N_EMBD = 64
N_CTX = 4096


def write_gemma2(path: Path, vocabulary: Path, n_swa: int = 32) -> Path:
    """Two layers: one with a sliding window of `n_swa`, one with full attention."""
    writer = _writer(path, "gemma2", vocabulary, n_layer=2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_feed_forward_length(128)
    writer.add_sliding_window(n_swa)
    for i in range(2):
        shapes = {
            "attn_norm": (N_EMBD,),
            "attn_q": (4 * 32, N_EMBD),
            "attn_k": (2 * 32, N_EMBD),
            "attn_v": (2 * 32, N_EMBD),
            "attn_output": (N_EMBD, 4 * 32),
            "post_attention_norm": (N_EMBD,),
            "ffn_norm": (N_EMBD,),
            "ffn_gate": (128, N_EMBD),
            "ffn_up": (128, N_EMBD),
            "ffn_down": (N_EMBD, 128),
            "post_ffw_norm": (N_EMBD,),
        }
        _add(writer, {f"blk.{i}.{name}.weight": shape for name, shape in shapes.items()})
    return _finish(writer, path)


def write_mamba(path: Path, vocabulary: Path) -> Path:
    """One recurrent layer: no KV cache at all."""
    writer = _writer(path, "mamba", vocabulary, n_layer=1)
    inner, state, rank, kernel = 2 * N_EMBD, 4, 4, 4
    writer.add_head_count(0)
    writer.add_feed_forward_length(0)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    shapes = {
        "attn_norm.weight": (N_EMBD,),
        "ssm_in.weight": (2 * inner, N_EMBD),
        "ssm_conv1d.weight": (inner, kernel),
        "ssm_conv1d.bias": (inner,),
        "ssm_x.weight": (rank + 2 * state, inner),
        "ssm_dt.weight": (inner, rank),
        "ssm_dt.bias": (inner,),
        "ssm_a": (inner, state),
        "ssm_d": (inner,),
        "ssm_out.weight": (N_EMBD, inner),
    }
    _add(writer, {f"blk.0.{name}": shape for name, shape in shapes.items()})
    return _finish(writer, path)


def _writer(path: Path, architecture: str, vocabulary: Path, n_layer: int) -> GGUFWriter:
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(n_layer)
    writer.add_layer_norm_rms_eps(1e-6)

    fields = GGUFReader(vocabulary).fields

    def value(name):
        return fields[f"tokenizer.ggml.{name}"].contents()

    writer.add_tokenizer_model(value("model"))
    writer.add_tokenizer_pre(value("pre"))
    writer.add_token_list(value("tokens"))
    writer.add_token_types(value("token_type"))
    writer.add_token_merges(value("merges"))
    writer.add_bos_token_id(value("bos_token_id"))
    writer.add_eos_token_id(value("eos_token_id"))
    _add(
        writer,
        {"token_embd.weight": (len(value("tokens")), N_EMBD), "output_norm.weight": (N_EMBD,)},
    )
    return writer


def _add(writer: GGUFWriter, shapes: dict[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        draw = np.random.default_rng(sum(name.encode()))
        weights = draw.normal(0, 0.3, shape).astype(np.float32)
        # a state that decays
        writer.add_tensor(name, -abs(weights) if name.endswith("ssm_a") else weights)


def _finish(writer: GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
