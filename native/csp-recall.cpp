#include "csp.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

//
// csp_rows
//

static void csp_convert_row(const uint8_t * src, ggml_type type_src, uint8_t * dst, ggml_type type_dst, int64_t n) {
    if (type_src == type_dst) {
        memcpy(dst, src, ggml_row_size(type_src, n));
        return;
    }

    std::vector<float> row(n);

    if (type_src == GGML_TYPE_F32) {
        memcpy(row.data(), src, ggml_row_size(type_src, n));
    } else {
        ggml_get_type_traits(type_src)->to_float(src, row.data(), n);
    }

    ggml_quantize_chunk(type_dst, row.data(), dst, 0, 1, n, nullptr);
}

uint8_t * csp_rows::row(uint32_t i) {
    while (blocks.size() <= i/N_BLOCK) {
        blocks.emplace_back(N_BLOCK*size());
    }

    return blocks[i/N_BLOCK].data() + (i%N_BLOCK)*size();
}

const uint8_t * csp_rows::row(uint32_t i) const {
    return blocks.at(i/N_BLOCK).data() + (i%N_BLOCK)*size();
}

size_t csp_rows::size() const {
    return ggml_row_size(type, n_embd);
}

//
// llama_csp
//

void llama_csp::keep_evicted(ggml_type type) {
    update_index();

    if (index.n_base > 0) {
        throw std::invalid_argument("the cache was pruned already: what was evicted is lost");
    }

    for (const auto & l : layers) {
        for (const auto n_embd : { l.n_embd_head_k, l.n_embd_head_v }) {
            // types that are no more have blocks of 0, and no to_float
            if (type < 0 || type >= GGML_TYPE_COUNT || (type != GGML_TYPE_F32 && !ggml_get_type_traits(type)->to_float) ||
                    n_embd%ggml_blck_size(type) != 0 || ggml_quantize_requires_imatrix(type)) {
                throw std::invalid_argument(format("evicted cells can't be kept as type %d", type));
            }
        }
    }

    is_archiving = true;

    for (auto & l : layers) {
        l.archive_k = { type, l.k->ne[0], {} };
        l.archive_v = { type, l.v->ne[0], {} };
    }
}

static void csp_append(csp_rows & dst, uint32_t n_rows, const ggml_tensor * src, const std::vector<uint32_t> & idxs) {
    if (idxs.empty()) {
        return;
    }

    const auto [first, last] = std::minmax_element(idxs.begin(), idxs.end());

    std::vector<uint8_t> data((*last - *first + 1)*src->nb[1]);

    ggml_backend_tensor_get(src, data.data(), *first*src->nb[1], data.size());

    for (const auto i : idxs) {
        csp_convert_row(data.data() + (i - *first)*src->nb[1], src->type, dst.row(n_rows++), dst.type, dst.n_embd);
    }
}

void llama_csp::archive(const cell_list & cells, uint32_t n_true) {
    if (!is_archiving) {
        return;
    }

    const std::vector<uint32_t> idxs(cells.idxs.begin() + cells.n_chosen, cells.idxs.end() - n_true);

    for (auto & l : layers) {
        csp_append(l.archive_k, index.n_base, l.k, idxs);
        csp_append(l.archive_v, index.n_base, l.v, idxs);
    }
}

void llama_csp::clear_archive() {
    for (auto & l : layers) {
        l.archive_k.blocks.clear();
        l.archive_v.blocks.clear();
    }
}

// the logits of the window's queries on all archived tokens
struct csp_archive_logits {
    csp_archive_logits(const llama_csp & csp, const llama_csp::layer & l, const std::vector<int32_t> & rows_data, uint32_t n_tokens);

    // those of tokens [i0, i0 + n)
    void compute(const llama_csp & csp, const llama_csp::layer & l, const std::vector<int32_t> & rows_data, uint32_t i0, uint32_t n);

    const float * row(uint32_t h, uint32_t i) const {
        return data.data() + (size_t(h)*n_q + i)*n_tokens;
    }

    const uint32_t n_q;
    const uint32_t n_tokens;

    std::vector<float> data; // [n_head][n_q][n_tokens]
};

csp_archive_logits::csp_archive_logits(const llama_csp & csp, const llama_csp::layer & l, const std::vector<int32_t> & rows_data, uint32_t n_tokens) :
    n_q(rows_data.size()), n_tokens(n_tokens), data(size_t(l.n_head)*n_q*n_tokens) {
    constexpr uint32_t n_max = 8*csp_rows::N_BLOCK;

    for (uint32_t i0 = 0; i0 < n_tokens; i0 += n_max) {
        compute(csp, l, rows_data, i0, std::min(n_tokens - i0, n_max));
    }
}

void csp_archive_logits::compute(const llama_csp & csp, const llama_csp::layer & l, const std::vector<int32_t> & rows_data, uint32_t i0, uint32_t n) {
    csp_graph graph(csp.ctx);

    ggml_tensor * rows = graph.new_input(GGML_TYPE_I32, n_q, 1);
    ggml_tensor * idxs = graph.new_input(GGML_TYPE_I32, n,   1);
    ggml_tensor * k    = graph.new_input(l.archive_k.type, l.archive_k.n_embd, n);

    ggml_tensor * cur = csp_build_logits(graph, l, ggml_get_rows(graph.ctx0, l.q, rows), ggml_get_rows(graph.ctx0, k, idxs));

    ggml_set_output(cur);
    ggml_build_forward_expand(graph.gf, cur);

    graph.alloc();

    std::vector<int32_t> idxs_data(n);
    std::iota(idxs_data.begin(), idxs_data.end(), 0);

    ggml_backend_tensor_set(rows, rows_data.data(), 0, ggml_nbytes(rows));
    ggml_backend_tensor_set(idxs, idxs_data.data(), 0, ggml_nbytes(idxs));

    for (uint32_t i = 0; i < n; i += csp_rows::N_BLOCK) {
        ggml_backend_tensor_set(k, l.archive_k.row(i0 + i), i*k->nb[1], std::min(n - i, csp_rows::N_BLOCK)*k->nb[1]);
    }

    graph.compute();

    std::vector<float> part(ggml_nelements(cur));

    ggml_backend_tensor_get(cur, part.data(), 0, ggml_nbytes(cur));

    for (size_t j = 0; j < part.size()/n; ++j) {
        std::copy_n(part.begin() + j*n, n, data.begin() + j*n_tokens + i0);
    }
}

// the sum of softmax_n over the window, by the modality of the queries
static void csp_sum_attn(
        const csp_archive_logits & logits,
        const std::vector<int8_t> & modality,
        float n_score,
        uint32_t n_group,
        std::vector<llama_csp::head_cells> & heads) {
    const uint32_t n_tokens = logits.n_tokens;

    std::vector<float> attn(n_tokens);

    for (uint32_t h = 0; h < heads.size()*n_group; ++h) {
        auto & head = heads[h/n_group];

        head.self .resize(n_tokens, 0.0f);
        head.cross.resize(n_tokens, 0.0f);

        for (uint32_t i = 0; i < logits.n_q; ++i) {
            const float * x = logits.row(h, i);

            const float max = std::max(*std::max_element(x, x + n_tokens), n_score > 0.0f ? logf(n_score) : -INFINITY);

            double sum = n_score*exp(-max);

            for (uint32_t j = 0; j < n_tokens; ++j) {
                sum += attn[j] = expf(x[j] - max);
            }
            for (uint32_t j = 0; j < n_tokens; ++j) {
                (head.modality[j] == modality[i] ? head.self : head.cross)[j] += attn[j]/sum;
            }
        }
    }
}

// as llama_csp::measure()
static std::vector<float> csp_measure(const csp_archive_logits & logits, const std::vector<llama_csp::head_choice> & choice, uint32_t n_group) {
    std::vector<float> res;

    for (uint32_t h = 0; h < choice.size()*n_group; ++h) {
        const auto & kept = choice[h/n_group].kept;

        double mean = 0.0;

        for (uint32_t i = 0; i < logits.n_q; ++i) {
            const float * x   = logits.row(h, i);
            const float   max = *std::max_element(x, x + logits.n_tokens);

            double sum = 0.0;

            auto it = kept.begin();

            for (uint32_t j = 0; j < logits.n_tokens; ++j) {
                if (it != kept.end() && *it == j) {
                    ++it;
                } else {
                    sum += expf(x[j] - max);
                }
            }

            mean += (max + log(std::max<double>(sum, std::numeric_limits<float>::min())))/logits.n_q;
        }

        res.push_back(kept.size() < logits.n_tokens ? mean : CSP_SINK_EMPTY);
    }

    return res;
}

llama_csp::cell_list llama_csp::get_archived(const cell_list & cells) const {
    cell_list res;

    for (uint32_t i = 0; i < index.n_base; ++i) {
        res.pos.push_back(index.pos[i]);
        res.ext.emplace_back();
        res.ext.back().tok = index.modality[i] == LLAMA_CSP_MODALITY_TEXT ? 0 : LLAMA_TOKEN_NULL;
    }

    res.pos.insert(res.pos.end(), cells.pos.begin() + cells.n_chosen, cells.pos.end());
    res.ext.insert(res.ext.end(), cells.ext.begin() + cells.n_chosen, cells.ext.end());

    return res;
}

static std::vector<float> csp_get_keys(const csp_rows & rows, uint32_t n_tokens, uint32_t h, uint32_t n_embd_head) {
    std::vector<float> res(size_t(n_tokens)*n_embd_head);

    for (uint32_t i = 0; i < n_tokens; ++i) {
        csp_convert_row(rows.row(i) + h*ggml_row_size(rows.type, n_embd_head), rows.type, (uint8_t *) (res.data() + size_t(i)*n_embd_head), GGML_TYPE_F32, n_embd_head);
    }

    return res;
}

llama_csp::pruning llama_csp::plan_recall(const cell_list & cells, const llama_csp_params & params) {
    pruning res;

    res.cells = get_archived(cells);
    res.rows  = window_rows(params.window > 0 ? std::min(params.window, n_observed) : n_observed);

    res.is_evicting = true;

    const uint32_t n_tokens = res.cells.size();

    res.n_true = std::min(params.recent, cells.size() - cells.n_chosen);

    std::vector<int8_t> modality;
    for (const auto row : res.rows) {
        modality.push_back(window[row].modality);
    }

    for (size_t il = 0; il < layers.size(); ++il) {
        auto & l = layers[il];

        const uint32_t n_group = l.n_head/l.n_head_kv;

        const int64_t t_start_us = ggml_time_us();

        head_cells head;

        head.cells.resize(n_tokens);
        std::iota(head.cells.begin(), head.cells.end(), 0);

        head.token = head.cells;
        std::transform(res.cells.ext.begin(), res.cells.ext.end(), std::back_inserter(head.modality), csp_modality);

        std::vector<head_cells> heads(l.n_head_kv, head);

        const csp_archive_logits logits(*this, l, res.rows, n_tokens);

        csp_sum_attn(logits, modality, params.n_score, n_group, heads);

        if (params.inspect || needs_keys(heads, params)) {
            for (uint32_t h = 0; h < l.n_head_kv; ++h) {
                heads[h].k = csp_get_keys(l.archive_k, n_tokens, h, l.n_embd_head_k);
            }
        }

        if (params.inspect) {
            inspect(l, res.cells, heads);

            for (const auto row : res.rows) {
                std::vector<float> q(l.q->ne[0]);

                ggml_backend_tensor_get(l.q, q.data(), row*l.q->nb[1], l.q->nb[1]);

                l.q_data.insert(l.q_data.end(), q.begin(), q.end());
            }
        }

        const int64_t t_scored_us = ggml_time_us();

        const auto & choice = res.choices.emplace_back(choose(il, heads, params));

        const int64_t t_selected_us = ggml_time_us();

        res.masses.push_back(params.sink == LLAMA_CSP_SINK_MASS ? csp_measure(logits, choice, n_group) : std::vector<float>(l.n_head, CSP_SINK_EMPTY));

        res.t_score_us  += t_scored_us - t_start_us + ggml_time_us() - t_selected_us;
        res.t_select_us += t_selected_us - t_scored_us;

        for (const auto & cur : choice) {
            res.add(cur, n_tokens);
        }
    }

    if (res.n_kept > kv.get_size()) {
        throw std::invalid_argument(format("%u cells come back, and the cache has %u: resize it first", res.n_kept, kv.get_size()));
    }

    return res;
}

// the chosen tokens of every head to the first rows of the cache, laid out as by compact()
static void csp_set_rows(ggml_tensor * cache, const csp_rows & src, const std::vector<llama_csp::head_choice> & choice, uint32_t n_kept, uint32_t n_true, uint32_t n_embd_head) {
    const size_t nb_src = ggml_row_size(src.type,    n_embd_head);
    const size_t nb_dst = ggml_row_size(cache->type, n_embd_head);

    std::vector<uint8_t> data(n_kept*cache->nb[1]);

    for (uint32_t h = 0; h < choice.size(); ++h) {
        const auto & kept = choice[h].kept;

        for (uint32_t i = 0; i < kept.size(); ++i) {
            const size_t row = i + n_true < kept.size() ? i : n_kept - kept.size() + i;

            csp_convert_row(src.row(kept[i]) + h*nb_src, src.type, data.data() + row*cache->nb[1] + h*nb_dst, cache->type, n_embd_head);
        }
    }

    ggml_backend_tensor_set(cache, data.data(), 0, data.size());
}

void llama_csp::recall(const llama_csp_params & params) {
    ctx.synchronize();
    reset_graphs();
    clear_inspection();

    const auto cells = get_cells();

    archive(cells, 0);

    const auto cur = plan_recall(cells, params);

    const int64_t t_start_us = ggml_time_us();

    if (cur.is_ragged) {
        alloc_pad();
    }

    try {
        for (size_t il = 0; il < layers.size(); ++il) {
            csp_set_rows(layers[il].k, layers[il].archive_k, cur.choices[il], cur.n_kept, cur.n_true, layers[il].n_embd_head_k);
            csp_set_rows(layers[il].v, layers[il].archive_v, cur.choices[il], cur.n_kept, cur.n_true, layers[il].n_embd_head_v);
        }
    } catch (...) {
        ctx.get_memory()->clear(false);
        update_index();

        throw;
    }

    for (const auto i : cells.idxs) {
        kv.v_cells[0].rm(i);
    }

    // every token is one to choose, as in a cache that was never pruned
    index.n_base   = 0;
    index.n_chosen = 0;

    for (auto & l : layers) {
        l.index.mass.clear();
    }

    set_index(cur, params);
    set_stats(cur, ggml_time_us() - t_start_us);
}
