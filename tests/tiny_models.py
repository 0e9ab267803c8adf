"""Random models of other architectures: two layers, 128 wide.

What they write means nothing, but attention, caches and hooks work in them as in their big kin.
They take a vocabulary from a GGUF, or none: then they know 64 tokens without words.
"""

from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter

N_EMBD, N_HEAD, N_HEAD_KV, HEAD_DIM, N_FF, N_VOCAB, N_LAYER = 128, 4, 2, 64, 256, 64, 2
N_EXPERT, N_SWA = 4, 32


class _Writer(GGUFWriter):
    def __init__(self, path: Path, arch: str, vocabulary: Path | None = None) -> None:
        super().__init__(path, arch)
        self.rng = np.random.default_rng(0)
        self.n_vocab = N_VOCAB
        self.add_context_length(4096)
        self.add_embedding_length(N_EMBD)
        self.add_block_count(N_LAYER)
        self.add_feed_forward_length(N_FF)
        self.add_layer_norm_rms_eps(1e-5)
        if vocabulary:
            self.copy(vocabulary)
        else:
            self.add_vocab_size(N_VOCAB)
            self.add_tokenizer_model("none")

    def copy(self, vocabulary: Path) -> None:
        fields = GGUFReader(vocabulary).fields
        value = {name: field.contents() for name, field in fields.items() if "tokenizer" in name}
        self.add_tokenizer_model(value["tokenizer.ggml.model"])
        self.add_tokenizer_pre(value["tokenizer.ggml.pre"])
        self.add_token_list(value["tokenizer.ggml.tokens"])
        self.add_token_types(value["tokenizer.ggml.token_type"])
        self.add_token_merges(value["tokenizer.ggml.merges"])
        self.add_bos_token_id(value["tokenizer.ggml.bos_token_id"])
        self.add_eos_token_id(value["tokenizer.ggml.eos_token_id"])
        self.n_vocab = len(value["tokenizer.ggml.tokens"])

    def attention(self, n_head: int = N_HEAD, n_head_kv: int = N_HEAD_KV) -> None:
        self.add_head_count(n_head)
        self.add_head_count_kv(n_head_kv)
        self.add_key_length(HEAD_DIM)
        self.add_value_length(HEAD_DIM)

    def weights(self, **shapes: tuple[int, ...]) -> None:
        """Tensors by name, "__" for a dot, shapes as ggml has them (rows first)."""
        for name, shape in shapes.items():
            name = name.replace("__", ".")
            if name.endswith("bias"):
                data = np.zeros(shape[::-1], np.float32)
            elif len(shape) == 1:
                data = np.ones(shape, np.float32)
            else:
                data = self.rng.normal(0, 3 / np.sqrt(shape[0]), shape[::-1]).astype(np.float32)
            # a recurrent state decays
            self.add_tensor(name, -abs(data) if name.endswith("ssm_a") else data)

    def layer(self, i: int, **shapes: tuple[int, ...]) -> None:
        self.weights(**{f"blk.{i}.{name}": shape for name, shape in shapes.items()})

    def done(self) -> None:
        self.weights(token_embd__weight=(N_EMBD, self.n_vocab), output_norm__weight=(N_EMBD,))
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file()
        self.close()


_QKVO = {
    "attn_norm__weight": (N_EMBD,),
    "attn_q__weight": (N_EMBD, N_HEAD * HEAD_DIM),
    "attn_k__weight": (N_EMBD, N_HEAD_KV * HEAD_DIM),
    "attn_v__weight": (N_EMBD, N_HEAD_KV * HEAD_DIM),
    "attn_output__weight": (N_HEAD * HEAD_DIM, N_EMBD),
}
_FFN = {
    "ffn_norm__weight": (N_EMBD,),
    "ffn_gate__weight": (N_EMBD, N_FF),
    "ffn_up__weight": (N_EMBD, N_FF),
    "ffn_down__weight": (N_FF, N_EMBD),
}


def gemma2(path: Path, vocabulary: Path | None = None) -> None:
    """Sliding-window attention in the first layer, and soft-capped logits."""
    w = _Writer(path, "gemma2", vocabulary)
    w.attention()
    w.add_sliding_window(N_SWA)
    w.add_attn_logit_softcapping(20.0)
    w.add_final_logit_softcapping(30.0)
    for i in range(N_LAYER):
        post = {"post_attention_norm__weight": (N_EMBD,), "post_ffw_norm__weight": (N_EMBD,)}
        w.layer(i, **_QKVO, **_FFN, **post)
    w.done()


def gpt_oss(path: Path) -> None:
    """Attention sinks of its own, sliding-window attention in the first layer, experts."""
    w = _Writer(path, "gpt-oss")
    w.attention()
    w.add_sliding_window(N_SWA)
    w.add_rope_dimension_count(HEAD_DIM)
    w.add_expert_count(N_EXPERT)
    w.add_expert_used_count(2)
    w.add_expert_feed_forward_length(N_FF)
    for i in range(N_LAYER):
        w.layer(
            i,
            **_QKVO,
            attn_output__bias=(N_EMBD,),
            post_attention_norm__weight=(N_EMBD,),
            attn_sinks__weight=(N_HEAD,),
            ffn_gate_inp__weight=(N_EMBD, N_EXPERT),
            ffn_gate_inp__bias=(N_EXPERT,),
            ffn_gate_exps__weight=(N_EMBD, N_FF, N_EXPERT),
            ffn_gate_exps__bias=(N_FF, N_EXPERT),
            ffn_up_exps__weight=(N_EMBD, N_FF, N_EXPERT),
            ffn_up_exps__bias=(N_FF, N_EXPERT),
            ffn_down_exps__weight=(N_FF, N_EMBD, N_EXPERT),
            ffn_down_exps__bias=(N_EMBD, N_EXPERT),
        )
    w.weights(output__weight=(N_EMBD, N_VOCAB))
    w.done()


def qwen2vl(path: Path, vocabulary: Path | None = None) -> None:
    """M-RoPE: all patches of a picture share a position, and are told apart by row and column."""
    w = _Writer(path, "qwen2vl", vocabulary)
    w.attention(N_EMBD // HEAD_DIM, 1)
    w.add_rope_dimension_sections([16, 24, 24, 0])
    for i in range(N_LAYER):
        w.layer(i, **_FFN, attn_norm__weight=(N_EMBD,), attn_output__weight=(N_EMBD, N_EMBD))
        w.layer(i, attn_q__weight=(N_EMBD, N_EMBD))
        w.layer(i, attn_k__weight=(N_EMBD, HEAD_DIM), attn_v__weight=(N_EMBD, HEAD_DIM))
    w.done()


def mamba(path: Path, vocabulary: Path | None = None) -> None:
    """A recurrent state, no KV cache."""
    w = _Writer(path, "mamba", vocabulary)
    w.add_head_count(0)
    n_inner, n_state, n_dt, n_conv = 2 * N_EMBD, 16, 8, 4
    w.add_ssm_conv_kernel(n_conv)
    w.add_ssm_inner_size(n_inner)
    w.add_ssm_state_size(n_state)
    w.add_ssm_time_step_rank(n_dt)
    for i in range(N_LAYER):
        w.layer(
            i,
            attn_norm__weight=(N_EMBD,),
            ssm_in__weight=(N_EMBD, 2 * n_inner),
            ssm_conv1d__weight=(n_conv, n_inner),
            ssm_conv1d__bias=(n_inner,),
            ssm_x__weight=(n_inner, n_dt + 2 * n_state),
            ssm_dt__weight=(n_dt, n_inner),
            ssm_dt__bias=(n_inner,),
            ssm_a=(n_state, n_inner),
            ssm_d=(n_inner,),
            ssm_out__weight=(n_inner, N_EMBD),
        )
    w.done()


def deepseek2(path: Path) -> None:
    """Multi-head latent attention (MLA): one compressed row for all heads."""
    w = _Writer(path, "deepseek2")
    n_lora, n_rope, n_nope, n_v = 64, 32, 32, 64
    w.add_head_count(N_HEAD)
    w.add_head_count_kv(1)
    w.add_key_length(n_lora + n_rope)
    w.add_value_length(n_lora)
    w.add_key_length_mla(n_nope + n_rope)
    w.add_value_length_mla(n_v)
    w.add_kv_lora_rank(n_lora)
    w.add_q_lora_rank(n_lora)
    w.add_rope_dimension_count(n_rope)
    w.add_leading_dense_block_count(N_LAYER)
    w.add_expert_feed_forward_length(N_FF)
    w.add_expert_shared_count(1)
    for i in range(N_LAYER):
        w.layer(
            i,
            **_FFN,
            attn_norm__weight=(N_EMBD,),
            attn_q_a_norm__weight=(n_lora,),
            attn_kv_a_norm__weight=(n_lora,),
            attn_q_a__weight=(N_EMBD, n_lora),
            attn_q_b__weight=(n_lora, N_HEAD * (n_nope + n_rope)),
            attn_kv_a_mqa__weight=(N_EMBD, n_lora + n_rope),
            attn_k_b__weight=(n_nope, n_lora, N_HEAD),
            attn_v_b__weight=(n_lora, n_v, N_HEAD),
            attn_output__weight=(N_HEAD * n_v, N_EMBD),
        )
    w.done()


def bloom(path: Path) -> None:
    """ALiBi: a bias by distance, no positions in the keys."""
    w = _Writer(path, "bloom")
    w.attention(N_EMBD // HEAD_DIM, N_EMBD // HEAD_DIM)
    w.add_layer_norm_eps(1e-5)
    norms = ("attn_norm", "ffn_norm")
    for i in range(N_LAYER):
        w.layer(i, **{f"{n}__{k}": (N_EMBD,) for n in norms for k in ("weight", "bias")})
        w.layer(i, attn_qkv__weight=(N_EMBD, 3 * N_EMBD), attn_qkv__bias=(3 * N_EMBD,))
        w.layer(i, attn_output__weight=(N_EMBD, N_EMBD), attn_output__bias=(N_EMBD,))
        w.layer(i, ffn_up__weight=(N_EMBD, N_FF), ffn_up__bias=(N_FF,))
        w.layer(i, ffn_down__weight=(N_FF, N_EMBD), ffn_down__bias=(N_EMBD,))
    w.weights(token_embd_norm__weight=(N_EMBD,), token_embd_norm__bias=(N_EMBD,))
    w.weights(output_norm__bias=(N_EMBD,))
    w.done()


class _Projector(_Writer):
    """One layer, 32 wide, on patches of 4 x 4, of which 2 x 2 make a token."""

    n_embd, n_ff, patch = 32, 64, 4

    def __init__(self, path: Path, kind: str, n_grid: int) -> None:
        GGUFWriter.__init__(self, path, "clip")
        self.rng = np.random.default_rng(0)
        self.add_clip_has_vision_encoder(True)
        self.add_clip_projector_type(kind)
        self.add_vision_image_size(n_grid * self.patch)
        self.add_vision_patch_size(self.patch)
        self.add_vision_embedding_length(self.n_embd)
        self.add_vision_feed_forward_length(self.n_ff)
        self.add_vision_projection_dim(N_EMBD)
        self.add_vision_block_count(1)
        self.add_vision_head_count(2)
        self.add_vision_attention_layernorm_eps(1e-5)
        self.add_vision_image_mean([0.5] * 3)
        self.add_vision_image_std([0.5] * 3)
        n, patch = self.n_embd, (self.patch, self.patch, 3, self.n_embd)
        shapes: dict[str, tuple[int, ...]] = {"v__patch_embd__weight": patch}
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            shapes |= {f"v__blk__0__{name}__weight": (n, n), f"v__blk__0__{name}__bias": (n,)}
        for name in ("v__blk__0__ln1", "v__blk__0__ln2", "v__post_ln"):
            shapes |= {f"{name}__weight": (n,), f"{name}__bias": (n,)}
        for name, a, b in (("ffn_up", n, self.n_ff), ("ffn_down", self.n_ff, n)):
            shapes |= {f"v__blk__0__{name}__weight": (a, b), f"v__blk__0__{name}__bias": (b,)}
        self.weights(**shapes)

    def done(self, **shapes: tuple[int, ...]) -> None:
        self.weights(**shapes)
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file()
        self.close()


def qwen2vl_projector(path: Path) -> None:
    """Tokens in rows and columns, as many as a picture's size asks for."""
    w = _Projector(path, "qwen2vl_merger", 16)
    w.weights(**{"v__patch_embd__weight__1": (w.patch, w.patch, 3, w.n_embd)})
    w.done(
        mm__0__weight=(4 * w.n_embd, 4 * w.n_embd),
        mm__0__bias=(4 * w.n_embd,),
        mm__2__weight=(4 * w.n_embd, N_EMBD),
        mm__2__bias=(N_EMBD,),
    )


def hunyuanvl_projector(path: Path) -> None:
    """Counts the prompt's pictures: the positions of a picture's tokens hold its number."""
    w = _Projector(path, "hunyuanvl", 16)
    w.add_uint32("clip.vision.image_min_pixels", 16)
    w.add_uint32("clip.vision.image_max_pixels", 4096)
    w.done(
        v__position_embd__weight=(w.n_embd, 256),
        v__image_newline=(64,),
        mm__pre_norm__weight=(w.n_embd,),
        mm__0__weight=(2, 2, w.n_embd, 48),
        mm__0__bias=(48,),
        mm__2__weight=(1, 1, 48, 64),
        mm__2__bias=(64,),
        mm__model__fc__weight=(64, N_EMBD),
        mm__model__fc__bias=(N_EMBD,),
        mm__image_begin=(N_EMBD,),
        mm__image_end=(N_EMBD,),
        mm__post_norm__weight=(N_EMBD,),
    )
