#include "csp.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

// cells in a graph: the CPU's fast products take no other numbers
static uint32_t csp_n_pad(uint32_t n_cells) {
    return GGML_PAD(n_cells, 16);
}

// queries per graph: few enough for their attention to stay near the processor, and enough to be worth
// gathering the keys
static uint32_t csp_n_block(const llama_csp::layer & l, uint32_t n_cells) {
    constexpr size_t n_max = 1 << 20; // elements

    return std::clamp<size_t>(n_max/(size_t(n_cells)*l.n_head), 8, 64);
}

static constexpr uint32_t N_MODALITY = 2;

// the attention of some window queries in one layer
struct csp_attn_graph : csp_graph {
    // rows: of the ring
    csp_attn_graph(const llama_csp & csp, const llama_csp::layer & l, const llama_csp::cell_list & cells, std::vector<int32_t> rows, float n_score);

    void set_inputs();

    void build_sums();

    const llama_csp & csp;
    const llama_csp::layer & l;
    const llama_csp::cell_list & cells;

    const std::vector<int32_t> rows_data;

    const uint32_t n_q;
    const uint32_t n_pad;
    const float    n_score;

    ggml_tensor * archived = nullptr; // [n_embd_k_gqa, n_cells] keys that are not in the cache

    ggml_tensor * idxs; // I32 [n_pad]
    ggml_tensor * rows; // I32 [n_q]
    ggml_tensor * mask; // F32 [n_pad, n_q, 1], or n_head of them where heads have padding
    ggml_tensor * sink; // F32 [n_head] ln(n)

    ggml_tensor * q;      // F32 [n_embd_head_k*n_head, n_q]
    ggml_tensor * k;      // F32 [n_embd_k_gqa, n_pad]
    ggml_tensor * logits; // F32 [n_pad, n_q, n_head] scaled, not masked
    ggml_tensor * attn;   // F32 [n_pad, n_q, n_head]

    // by the queries' modality
    ggml_tensor * is_of[N_MODALITY] = {}; // F32 [1, n_q] 1 or 0, NULL where all are or none is
    ggml_tensor * sums [N_MODALITY] = {}; // F32 [n_pad, 1, n_head_kv] attention to a KV head, NULL where none is
};

// F32 [n_cells, n_q, n_head] scaled, not masked. q: F32 [n_embd_head_k*n_head, n_q], k: F32 [n_embd_k_gqa, n_cells]
static ggml_tensor * csp_build_logits(csp_graph & graph, const llama_csp::layer & l, ggml_tensor * q, ggml_tensor * k) {
    auto * ctx0 = graph.ctx0;

    const auto & hparams = graph.lctx.get_model().hparams;

    const int64_t n_q = q->ne[1];

    q = ggml_permute(ctx0, ggml_reshape_3d(ctx0, q, l.n_embd_head_k, l.n_head,    n_q),      0, 2, 1, 3);
    k = ggml_permute(ctx0, ggml_reshape_3d(ctx0, k, l.n_embd_head_k, l.n_head_kv, k->ne[1]), 0, 2, 1, 3);

    // all queries of a KV head in one product, and scaled before it: there is less of them
    const float cap = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 1.0f;

    q = ggml_scale(ctx0, ggml_cont(ctx0, q), l.kq_scale/cap);
    q = ggml_reshape_3d(ctx0, q, l.n_embd_head_k, n_q*l.n_head/l.n_head_kv, l.n_head_kv);

    ggml_tensor * res = ggml_mul_mat(ctx0, k, q);
    ggml_prec_set_acc(res, GGML_PREC_F32);

    res = ggml_reshape_3d(ctx0, res, k->ne[1], n_q, l.n_head);

    // as in ggml_flash_attn_ext
    return hparams.attn_soft_cap ? ggml_scale(ctx0, ggml_tanh(ctx0, res), cap) : res;
}

csp_attn_graph::csp_attn_graph(const llama_csp & csp, const llama_csp::layer & l, const llama_csp::cell_list & cells, std::vector<int32_t> rows_data, float n_score) :
    csp_graph(csp.ctx), csp(csp), l(l), cells(cells), rows_data(std::move(rows_data)), n_q(this->rows_data.size()), n_pad(csp_n_pad(cells.size())), n_score(n_score) {
    if (cells.idxs.empty()) {
        archived = new_input(l.archive_k.type, l.archive_k.n_embd, cells.size());
    }

    idxs = new_input(GGML_TYPE_I32, n_pad, 1);
    rows = new_input(GGML_TYPE_I32, n_q,   1);
    mask = new_input(GGML_TYPE_F32, n_pad, n_q, cells.n_chosen > 0 && csp.index.is_ragged ? l.n_head : 1);
    sink = new_input(GGML_TYPE_F32, l.n_head, 1);

    // also dequantizes
    q = ggml_get_rows(ctx0, l.q, rows);
    k = ggml_get_rows(ctx0, archived ? archived : ggml_view_2d(ctx0, l.k, l.k->ne[0], l.k->ne[1], l.k->nb[1], 0), idxs);

    logits = csp_build_logits(*this, l, q, k);

    attn = ggml_soft_max_ext(ctx0, logits, mask, 1.0f, 0.0f);
    ggml_soft_max_add_sinks(attn, sink);
}

void csp_attn_graph::set_inputs() {
    std::vector<int32_t> idxs_data(cells.idxs.begin(), cells.idxs.end());

    if (archived) {
        idxs_data.resize(cells.size());
        std::iota(idxs_data.begin(), idxs_data.end(), 0);

        std::vector<uint8_t> rows(csp_rows::N_BLOCK*archived->nb[1]);

        for (uint32_t i = 0; i < cells.size(); i += csp_rows::N_BLOCK) {
            const uint32_t n = std::min(cells.size() - i, csp_rows::N_BLOCK);

            l.archive_k.get(i, n, rows.data());

            ggml_backend_tensor_set(archived, rows.data(), i*archived->nb[1], n*archived->nb[1]);
        }
    }

    // any cell: it is hidden
    idxs_data.resize(n_pad, idxs_data[0]);

    ggml_backend_tensor_set(idxs, idxs_data.data(), 0, ggml_nbytes(idxs));
    ggml_backend_tensor_set(rows, rows_data.data(), 0, ggml_nbytes(rows));

    std::vector<float> data(ggml_nelements(mask), -INFINITY);

    for (int64_t h = 0; h < mask->ne[2]; ++h) {
        const uint32_t n_chosen = csp.index.is_ragged ? l.index.n_chosen[h/(l.n_head/l.n_head_kv)] : cells.n_chosen;

        for (uint32_t i = 0; i < n_q; ++i) {
            const auto row = rows_data[i];

            float * dst = data.data() + (h*n_q + i)*n_pad;

            const auto & cur = csp.window[row];

            for (uint32_t j = 0; j < cells.size(); ++j) {
                const bool hidden = j < cells.n_chosen ? j >= n_chosen : cells.pos[j] > cur.pos_max ||
                    (cur.is_2d && cells.pos[j] == cur.pos && cells.ext[j].is_2d_gt(cur.ext.x, cur.ext.y));

                dst[j] = hidden ? -INFINITY : 0.0f;
            }
        }
    }

    ggml_backend_tensor_set(mask, data.data(), 0, ggml_nbytes(mask));

    for (uint32_t m = 0; m < N_MODALITY; ++m) {
        if (is_of[m]) {
            std::vector<float> is;

            for (const auto row : rows_data) {
                is.push_back(csp.window[row].modality == int8_t(m) ? 1.0f : 0.0f);
            }

            ggml_backend_tensor_set(is_of[m], is.data(), 0, ggml_nbytes(is_of[m]));
        }
    }

    const std::vector<float> ln_n(l.n_head, n_score > 0.0f ? logf(n_score) : CSP_SINK_EMPTY);

    ggml_backend_tensor_set(sink, ln_n.data(), 0, ggml_nbytes(sink));
}

// [n, n_rows, ne2] -> [n, 1, ne2], by halves: what sums all rows at once wants them transposed, which takes longer
static ggml_tensor * csp_build_sum(ggml_context * ctx0, ggml_tensor * cur) {
    const auto rows = [&](int64_t i, int64_t n) {
        return ggml_view_3d(ctx0, cur, cur->ne[0], n, cur->ne[2], cur->nb[1], cur->nb[2], i*cur->nb[1]);
    };

    ggml_tensor * odd = nullptr;

    while (cur->ne[1] > 1) {
        const int64_t n = cur->ne[1]/2;

        if (cur->ne[1]%2 == 1) {
            odd = odd ? ggml_add(ctx0, odd, rows(2*n, 1)) : rows(2*n, 1);
        }

        cur = ggml_add(ctx0, rows(0, n), rows(n, n));
    }

    return odd ? ggml_add(ctx0, cur, odd) : cur;
}

void csp_attn_graph::build_sums() {
    const int64_t n_rows = n_q*l.n_head/l.n_head_kv; // of the attention to a KV head

    for (uint32_t m = 0; m < N_MODALITY; ++m) {
        const auto n = std::count_if(rows_data.begin(), rows_data.end(), [&](int32_t row) { return csp.window[row].modality == int8_t(m); });

        if (n == 0) {
            continue;
        }

        ggml_tensor * cur = attn;

        if (n < n_q) {
            is_of[m] = new_input(GGML_TYPE_F32, 1, n_q);

            cur = ggml_mul(ctx0, cur, is_of[m]);
        }

        sums[m] = ggml_cont(ctx0, csp_build_sum(ctx0, ggml_reshape_3d(ctx0, cur, cur->ne[0], n_rows, l.n_head_kv)));

        ggml_set_output(sums[m]);
        ggml_build_forward_expand(gf, sums[m]);
    }
}

static std::vector<float> csp_get(const ggml_tensor * t) {
    std::vector<float> res(ggml_nelements(t));

    ggml_backend_tensor_get(t, res.data(), 0, ggml_nbytes(t));

    return res;
}

// the next block of the rows from i on, up to end
static std::vector<int32_t> csp_block(const std::vector<int32_t> & rows, size_t i, size_t n, size_t end) {
    return { rows.begin() + i, rows.begin() + std::min(i + n, end) };
}

void llama_csp::score(layer & l, const cell_list & cells, const std::vector<int32_t> & rows, const llama_csp_params & params, std::vector<head_cells> & heads) {
    const uint32_t n_pad   = csp_n_pad(cells.size());
    const uint32_t n_block = csp_n_block(l, n_pad);

    // attention from queries of each modality: [n_head_kv][n_pad]
    std::array<std::vector<float>, N_MODALITY> sums;
    sums.fill(std::vector<float>(size_t(n_pad)*l.n_head_kv, 0.0f));

    std::vector<float> keys; // [n_pad][n_head_kv][n_embd_head_k]

    // the queries of the answer come last, in blocks of their own
    const size_t n_answer = std::min<size_t>(params.n_answer, rows.size());
    const size_t n_before = rows.size() - n_answer;

    const bool is_weighted = n_answer > 0 && n_before > 0;

    for (size_t i_block = 0, i_end; i_block < rows.size(); i_block = i_end) {
        const size_t end = i_block < n_before ? n_before : rows.size();

        i_end = std::min<size_t>(i_block + n_block, end);

        // mean over the queries: 1
        float weight = 1.0f;
        if (is_weighted) {
            weight = i_block < n_before ? (1.0f - params.answer)*rows.size()/n_before : params.answer*rows.size()/n_answer;
        }

        csp_attn_graph graph(*this, l, cells, csp_block(rows, i_block, n_block, end), params.n_score);

        graph.build_sums();

        const bool want_keys = i_block == 0 && (params.inspect || needs_keys(heads, params));

        if (params.inspect) {
            ggml_set_output(graph.q);
        }
        if (want_keys) {
            ggml_set_output(graph.k);
        }

        graph.alloc();
        graph.set_inputs();
        graph.compute();

        for (uint32_t m = 0; m < N_MODALITY; ++m) {
            if (!graph.sums[m]) {
                continue;
            }

            const auto data = csp_get(graph.sums[m]);

            for (size_t i = 0; i < data.size(); ++i) {
                sums[m][i] += weight*data[i];
            }
        }

        if (params.inspect) {
            const auto q_data = csp_get(graph.q);

            l.q_data.insert(l.q_data.end(), q_data.begin(), q_data.end());
        }
        if (want_keys) {
            keys = csp_get(graph.k);
        }
    }

    for (uint32_t h = 0; h < l.n_head_kv; ++h) {
        auto & head = heads[h];

        head.k.reserve(keys.empty() ? 0 : size_t(head.size())*l.n_embd_head_k);

        for (uint32_t i = 0; i < head.size(); ++i) {
            const size_t j = size_t(h)*n_pad + head.cells[i];

            head.self .push_back(sums[    head.modality[i]][j]);
            head.cross.push_back(sums[1 - head.modality[i]][j]);

            if (!keys.empty()) {
                const auto key = keys.begin() + (size_t(head.cells[i])*l.n_head_kv + h)*l.n_embd_head_k;

                head.k.insert(head.k.end(), key, key + l.n_embd_head_k);
            }
        }
    }
}

std::vector<float> llama_csp::measure(
        const layer & l,
        const cell_list & cells,
        const std::vector<int32_t> & rows,
        const llama_csp_params & params,
        const std::vector<head_cells> & heads,
        const std::vector<head_choice> & choice) {
    const uint32_t n_group = l.n_head/l.n_head_kv;
    const uint32_t n_block = csp_n_block(l, csp_n_pad(cells.size()));

    std::vector<std::vector<uint32_t>> evicted(l.n_head_kv);

    for (uint32_t h = 0; h < l.n_head_kv; ++h) {
        std::set_difference(heads[h].cells.begin(), heads[h].cells.end(), choice[h].kept.begin(), choice[h].kept.end(), std::back_inserter(evicted[h]));
    }

    std::vector<double>   sum(l.n_head, 0.0);
    std::vector<uint32_t> n_seen(l.n_head, 0); // queries that see a cell that is evicted

    for (size_t i_block = 0; i_block < rows.size(); i_block += n_block) {
        csp_attn_graph graph(*this, l, cells, csp_block(rows, i_block, n_block, rows.size()), params.n_score);

        ggml_set_output(graph.logits);
        ggml_set_output(graph.attn);
        ggml_build_forward_expand(graph.gf, graph.attn);

        graph.alloc();
        graph.set_inputs();
        graph.compute();

        const auto logits = csp_get(graph.logits);
        const auto attn   = csp_get(graph.attn);

        for (uint32_t h = 0; h < l.n_head; ++h) {
            const auto & ids = evicted[h/n_group];

            if (ids.empty()) {
                continue;
            }

            for (uint32_t i = 0; i < graph.n_q; ++i) {
                const float * x = logits.data() + (size_t(h)*graph.n_q + i)*graph.n_pad;
                const float * a = attn  .data() + (size_t(h)*graph.n_q + i)*graph.n_pad;

                // a = exp(x)/Z, so that log(sum(exp(x))) = x_j + log(sum(a)/a_j) for every j
                const uint32_t j = *std::max_element(ids.begin(), ids.end(), [a](uint32_t i0, uint32_t i1) { return a[i0] < a[i1]; });

                if (!(a[j] > 0.0f)) {
                    continue;
                }

                double mass = 0.0;
                for (const auto e : ids) {
                    mass += a[e];
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
