#include "csp.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>

// queries per graph: bounds the memory of the attention matrix
static uint32_t csp_n_block(const llama_csp::layer & l, uint32_t n_cells) {
    constexpr size_t n_max = 1 << 24; // elements

    return std::clamp<size_t>(n_max/(size_t(n_cells)*l.n_head), 1, 64);
}

static constexpr uint32_t N_MODALITY = 2;

// the attention of window queries [q0, q1) of one layer
struct csp_attn_graph : csp_graph {
    csp_attn_graph(const llama_csp & csp, const llama_csp::layer & l, const llama_csp::cell_list & cells, uint32_t q0, uint32_t q1, float n_score);

    void set_inputs();

    const llama_csp & csp;
    const llama_csp::layer & l;
    const llama_csp::cell_list & cells;

    const uint32_t q0;
    const uint32_t n_q;
    const float    n_score;

    ggml_tensor * idxs; // I32 [n_cells]
    ggml_tensor * rows; // I32 [n_q]
    ggml_tensor * mask; // F32 [n_cells, n_q]
    ggml_tensor * sink; // F32 [n_head] ln(n)

    ggml_tensor * q;      // F32 [n_embd_head_k*n_head, n_q]
    ggml_tensor * k;      // F32 [n_embd_k_gqa, n_cells]
    ggml_tensor * logits; // F32 [n_cells, n_q, n_head] scaled, not masked
    ggml_tensor * attn;   // F32 [n_cells, n_q, n_head]
};

csp_attn_graph::csp_attn_graph(const llama_csp & csp, const llama_csp::layer & l, const llama_csp::cell_list & cells, uint32_t q0, uint32_t q1, float n_score) :
    csp_graph(csp.ctx), csp(csp), l(l), cells(cells), q0(q0), n_q(q1 - q0), n_score(n_score) {
    const auto & hparams = csp.ctx.get_model().hparams;

    const int64_t n_cells = cells.size();

    idxs = new_input(GGML_TYPE_I32, n_cells, 1);
    rows = new_input(GGML_TYPE_I32, n_q,     1);
    mask = new_input(GGML_TYPE_F32, n_cells, n_q);
    sink = new_input(GGML_TYPE_F32, l.n_head, 1);

    // also dequantizes
    q = ggml_get_rows(ctx0, l.q, rows);
    k = ggml_get_rows(ctx0, ggml_view_2d(ctx0, l.k, l.k->ne[0], l.k->ne[1], l.k->nb[1], 0), idxs);

    ggml_tensor * qh = ggml_permute(ctx0, ggml_reshape_3d(ctx0, q, l.n_embd_head_k, l.n_head,    n_q),     0, 2, 1, 3);
    ggml_tensor * kh = ggml_permute(ctx0, ggml_reshape_3d(ctx0, k, l.n_embd_head_k, l.n_head_kv, n_cells), 0, 2, 1, 3);

    logits = ggml_mul_mat(ctx0, kh, qh);
    ggml_prec_set_acc(logits, GGML_PREC_F32);

    // as in ggml_flash_attn_ext
    if (hparams.attn_soft_cap) {
        const float cap = hparams.f_attn_logit_softcapping;

        logits = ggml_scale(ctx0, ggml_tanh(ctx0, ggml_scale(ctx0, logits, l.kq_scale/cap)), cap);
    } else {
        logits = ggml_scale(ctx0, logits, l.kq_scale);
    }

    attn = ggml_soft_max_ext(ctx0, logits, mask, 1.0f, 0.0f);
    ggml_soft_max_add_sinks(attn, sink);
}

void csp_attn_graph::set_inputs() {
    const auto all_rows = csp.window_rows();

    ggml_backend_tensor_set(idxs, cells.idxs.data(),    0, ggml_nbytes(idxs));
    ggml_backend_tensor_set(rows, all_rows.data() + q0, 0, ggml_nbytes(rows));

    std::vector<float> data(ggml_nelements(mask));

    float * dst = data.data();

    for (uint32_t i = 0; i < n_q; ++i) {
        const auto & cur = csp.window[all_rows[q0 + i]];

        for (uint32_t j = 0; j < cells.size(); ++j) {
            const bool chosen = j < cells.n_chosen;
            const bool future = cells.pos[j] > cur.pos_max ||
                (cur.is_2d && cells.pos[j] == cur.pos && cells.ext[j].is_2d_gt(cur.ext.x, cur.ext.y));

            *dst++ = chosen || !future ? 0.0f : -INFINITY;
        }
    }

    ggml_backend_tensor_set(mask, data.data(), 0, ggml_nbytes(mask));

    const std::vector<float> ln_n(l.n_head, n_score > 0.0f ? logf(n_score) : CSP_SINK_EMPTY);

    ggml_backend_tensor_set(sink, ln_n.data(), 0, ggml_nbytes(sink));
}

static std::vector<float> csp_get(const ggml_tensor * t) {
    std::vector<float> res(ggml_nelements(t));

    ggml_backend_tensor_get(t, res.data(), 0, ggml_nbytes(t));

    return res;
}

std::vector<llama_csp::head_scores> llama_csp::score(layer & l, const cell_list & cells, const llama_csp_params & params) {
    const uint32_t n_cells = cells.size();
    const uint32_t n_group = l.n_head/l.n_head_kv;
    const uint32_t n_block = csp_n_block(l, n_cells);

    const auto rows = window_rows();

    // attention from queries of modality m: [n_head_kv][n_cells][m]
    std::vector<float> sums(size_t(N_MODALITY)*n_cells*l.n_head_kv, 0.0f);

    for (uint32_t q0 = 0; q0 < n_observed; q0 += n_block) {
        csp_attn_graph graph(*this, l, cells, q0, std::min(q0 + n_block, n_observed), params.n_score);

        ggml_tensor * from = graph.new_input(GGML_TYPE_F32, graph.n_q, N_MODALITY);

        ggml_tensor * cur = ggml_cont(graph.ctx0, ggml_permute(graph.ctx0, graph.attn, 1, 0, 2, 3));

        cur = ggml_mul_mat(graph.ctx0, from, cur); // [N_MODALITY, n_cells, n_head]
        ggml_prec_set_acc(cur, GGML_PREC_F32);

        ggml_set_output(cur);

        if (params.inspect) {
            ggml_set_output(graph.q);
            ggml_set_output(graph.k);
        }

        ggml_build_forward_expand(graph.gf, cur);

        graph.alloc();
        graph.set_inputs();

        std::vector<float> from_data(N_MODALITY*graph.n_q, 0.0f);
        for (uint32_t i = 0; i < graph.n_q; ++i) {
            from_data[window[rows[q0 + i]].modality*graph.n_q + i] = 1.0f;
        }
        ggml_backend_tensor_set(from, from_data.data(), 0, ggml_nbytes(from));

        graph.compute();

        const auto data = csp_get(cur);

        for (uint32_t h = 0; h < l.n_head; ++h) {
            const float * src = data.data() + size_t(h)*N_MODALITY*n_cells;
                  float * dst = sums.data() + size_t(h/n_group)*N_MODALITY*n_cells;

            for (size_t i = 0; i < size_t(N_MODALITY)*n_cells; ++i) {
                dst[i] += src[i];
            }
        }

        if (params.inspect) {
            const auto q_data = csp_get(graph.q);

            l.q_data.insert(l.q_data.end(), q_data.begin(), q_data.end());
            l.k_data = csp_get(graph.k);
        }
    }

    std::vector<head_scores> res(l.n_head_kv);

    for (uint32_t h = 0; h < l.n_head_kv; ++h) {
        res[h].self .resize(n_cells);
        res[h].cross.resize(n_cells);

        for (uint32_t i = 0; i < n_cells; ++i) {
            const float * sum = sums.data() + (size_t(h)*n_cells + i)*N_MODALITY;

            const int8_t m = i < cells.n_chosen ? modality[get_token(l, cells, h, i)] : csp_modality(cells.ext[i]);

            res[h].self [i] = sum[m];
            res[h].cross[i] = sum[1 - m];
        }
    }

    return res;
}

std::vector<float> llama_csp::measure(const layer & l, const cell_list & cells, float n_score, const std::vector<uint32_t> & kept) {
    const uint32_t n_cells = cells.size();
    const uint32_t n_group = l.n_head/l.n_head_kv;
    const uint32_t n_block = csp_n_block(l, n_cells);
    const uint32_t n_kept  = kept.size()/l.n_head_kv;

    // [n_head_kv][n_cells - n_kept]
    std::vector<uint32_t> evicted;

    for (uint32_t h = 0; h < l.n_head_kv; ++h) {
        const auto begin = kept.begin() + size_t(h)*n_kept;

        for (uint32_t i = 0; i < n_cells; ++i) {
            if (!std::binary_search(begin, begin + n_kept, i)) {
                evicted.push_back(i);
            }
        }
    }

    const uint32_t n_evicted = n_cells - n_kept;

    std::vector<double>   sum(l.n_head, 0.0);
    std::vector<uint32_t> n_seen(l.n_head, 0); // queries that see a cell that is evicted

    for (uint32_t q0 = 0; q0 < n_observed; q0 += n_block) {
        csp_attn_graph graph(*this, l, cells, q0, std::min(q0 + n_block, n_observed), n_score);

        ggml_set_output(graph.logits);
        ggml_set_output(graph.attn);
        ggml_build_forward_expand(graph.gf, graph.attn);

        graph.alloc();
        graph.set_inputs();
        graph.compute();

        const auto logits = csp_get(graph.logits);
        const auto attn   = csp_get(graph.attn);

        for (uint32_t h = 0; h < l.n_head; ++h) {
            const uint32_t * ids = evicted.data() + size_t(h/n_group)*n_evicted;

            for (uint32_t i = 0; i < graph.n_q; ++i) {
                const float * x = logits.data() + (size_t(h)*graph.n_q + i)*n_cells;
                const float * a = attn  .data() + (size_t(h)*graph.n_q + i)*n_cells;

                // a = exp(x)/Z, so that log(sum(exp(x))) = x_j + log(sum(a)/a_j) for every j
                const uint32_t j = *std::max_element(ids, ids + n_evicted, [a](uint32_t i0, uint32_t i1) { return a[i0] < a[i1]; });

                if (!(a[j] > 0.0f)) {
                    continue;
                }

                double mass = 0.0;
                for (uint32_t e = 0; e < n_evicted; ++e) {
                    mass += a[ids[e]];
                }

                sum   [h] += x[j] + std::log(mass/a[j]);
                n_seen[h] += 1;
            }
        }
    }

    std::vector<float> res(l.n_head);

    for (uint32_t h = 0; h < l.n_head; ++h) {
        res[h] = n_seen[h] > 0 ? sum[h]/n_seen[h] : CSP_SINK_EMPTY;
    }

    return res;
}
