#include "csp.h"

#include "llama-context.h"

#include <algorithm>
#include <cmath>

// every backend takes a mask per sequence, but not every one a mask per head: each KV head becomes a sequence of its
// own. sinks are shared by all sequences, so with them it is a mask per head after all, where the scheduler finds a
// backend that takes it
ggml_tensor * llama_csp::build_ragged_attn(
        const llm_graph_context & graph,
        const layer & l,
        ggml_tensor * q,
        ggml_tensor * k,
        ggml_tensor * v,
        ggml_tensor * kq_mask,
        ggml_tensor * sinks,
              float   kq_scale) const {
    auto * ctx0 = graph.ctx0;

    const auto & hparams = graph.hparams;

    const int64_t n_head_kv = k->ne[1];
    const int64_t n_group   = q->ne[1]/n_head_kv;
    const int64_t n_tokens  = q->ne[2];
    const int64_t n_kv      = k->ne[2];

    const size_t nb_pad = l.k->ne[1]*ggml_type_size(l.pad->type);

    // not all backends can add up F16
    ggml_tensor * mask = ggml_cast(ctx0, kq_mask, GGML_TYPE_F32);
    ggml_tensor * pad  = ggml_view_4d(ctx0, l.pad, n_kv, 1, 1, n_head_kv, nb_pad, nb_pad, nb_pad, 0);

    mask = ggml_repeat_4d(ctx0, mask, n_kv, n_tokens, sinks ? n_group : 1, n_head_kv);
    mask = ggml_cast(ctx0, ggml_add(ctx0, mask, pad), GGML_TYPE_F16);

    if (k->type == GGML_TYPE_F32) {
        k = ggml_cast(ctx0, k, GGML_TYPE_F16);
    }
    if (v->type == GGML_TYPE_F32) {
        v = ggml_cast(ctx0, v, GGML_TYPE_F16);
    }

    if (sinks) {
        q = ggml_permute(ctx0, q, 0, 2, 1, 3);
        k = ggml_permute(ctx0, k, 0, 2, 1, 3);
        v = ggml_permute(ctx0, v, 0, 2, 1, 3);

        mask = ggml_reshape_3d(ctx0, mask, n_kv, n_tokens, n_group*n_head_kv);
    } else {
        q = ggml_view_4d(ctx0, q, q->ne[0], n_group, n_head_kv, n_tokens, q->nb[1], q->nb[1]*n_group, q->nb[2], 0);
        q = ggml_permute(ctx0, q, 0, 2, 3, 1); // [n_embd_head_k, n_tokens, n_group, n_head_kv]
        k = ggml_permute(ctx0, k, 0, 3, 1, 2); // [n_embd_head_k, n_kv,     1,       n_head_kv]
        v = ggml_permute(ctx0, v, 0, 3, 1, 2);
    }

    ggml_tensor * cur = ggml_flash_attn_ext(ctx0, q, k, v, mask, kq_scale, hparams.f_max_alibi_bias,
            hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f);

    ggml_flash_attn_ext_add_sinks(cur, sinks);
    ggml_prec_set_acc(cur, GGML_PREC_F32);

    if (!sinks) {
        cur = ggml_cont(ctx0, ggml_permute(ctx0, cur, 0, 1, 3, 2)); // [n_embd_head_v, n_group, n_head_kv, n_tokens]
    }

    cur = ggml_reshape_2d(ctx0, cur, ggml_nelements(cur)/n_tokens, n_tokens);

    ggml_build_forward_expand(graph.gf, cur);

    return cur;
}

void llama_csp::alloc_pad() {
    if (bufs_pad.empty()) {
        bufs_pad = csp_alloc(layers, &layer::pad, [](const layer & l) -> int64_t { return l.k->ne[1]*l.n_head_kv; }, 1);
    }
}

void llama_csp::set_pad(layer & l) {
    std::vector<float> data(ggml_nelements(l.pad), 0.0f);

    for (uint32_t h = 0; h < l.n_head_kv; ++h) {
        const auto row = data.begin() + h*l.k->ne[1];

        std::fill(row + l.index.n_chosen[h], row + index.n_chosen, -INFINITY);
    }

    ggml_backend_tensor_set(l.pad, data.data(), 0, ggml_nbytes(l.pad));
}
