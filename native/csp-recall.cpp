#include "csp.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

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

void llama_csp::keep_evicted(ggml_type type, int fd) {
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

    const auto file = fd < 0 ? nullptr : std::make_shared<csp_file>(fd);

    is_archiving = true;

    for (auto & l : layers) {
        l.archive_k = { type, l.k->ne[0], file, {} };
        l.archive_v = { type, l.v->ne[0], file, {} };
    }
}

static void csp_append(csp_rows & dst, uint32_t n_rows, const ggml_tensor * src, const std::vector<uint32_t> & idxs) {
    for (size_t i0 = 0; i0 < idxs.size(); i0 += csp_rows::N_BLOCK) {
        const auto begin = idxs.begin() + i0;
        const auto end   = idxs.begin() + std::min(i0 + csp_rows::N_BLOCK, idxs.size());

        const auto [first, last] = std::minmax_element(begin, end);

        std::vector<uint8_t> data((*last - *first + 1)*src->nb[1]);
        std::vector<uint8_t> rows((end - begin)*dst.size());

        ggml_backend_tensor_get(src, data.data(), *first*src->nb[1], data.size());

        for (auto it = begin; it != end; ++it) {
            csp_convert_row(data.data() + (*it - *first)*src->nb[1], src->type, rows.data() + (it - begin)*dst.size(), dst.type, dst.n_embd);
        }

        dst.set(n_rows + i0, end - begin, rows.data());
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

llama_csp::cell_list llama_csp::get_archived(const cell_list & cells) const {
    cell_list res;

    for (uint32_t i = 0; i < index.n_base; ++i) {
        res.pos.push_back(index.pos[i]);
        res.ext.emplace_back();
        res.ext.back().tok = index.modality[i] == LLAMA_CSP_MODALITY_TEXT ? 0 : LLAMA_TOKEN_NULL;
    }

    res.pos.insert(res.pos.end(), cells.pos.begin() + cells.n_chosen, cells.pos.end());
    res.ext.insert(res.ext.end(), cells.ext.begin() + cells.n_chosen, cells.ext.end());

    // the position of one token at least is that of the chosen cells
    res.n_true = std::min(cells.n_true, res.size() - 1);

    return res;
}

// the chosen ones of n_rows tokens of every head to the first rows of the cache, laid out as by compact()
static void csp_set_rows(ggml_tensor * cache, const csp_rows & src, uint32_t n_rows, const std::vector<llama_csp::head_choice> & choice, uint32_t n_kept, uint32_t n_true, uint32_t n_embd_head) {
    const size_t nb_src = ggml_row_size(src.type,    n_embd_head);
    const size_t nb_dst = ggml_row_size(cache->type, n_embd_head);

    std::vector<uint8_t> data(n_kept*cache->nb[1]);
    std::vector<uint8_t> rows(csp_rows::N_BLOCK*src.size());

    std::vector<uint32_t> i_next(choice.size(), 0);

    for (uint32_t i0 = 0; i0 < n_rows; i0 += csp_rows::N_BLOCK) {
        const uint32_t n = std::min(n_rows - i0, csp_rows::N_BLOCK);

        src.get(i0, n, rows.data());

        for (uint32_t h = 0; h < choice.size(); ++h) {
            const auto & kept = choice[h].kept;

            for (uint32_t & i = i_next[h]; i < kept.size() && kept[i] < i0 + n; ++i) {
                const size_t row = i + n_true < kept.size() ? i : n_kept - kept.size() + i;

                csp_convert_row(rows.data() + (kept[i] - i0)*src.size() + h*nb_src, src.type, data.data() + row*cache->nb[1] + h*nb_dst, cache->type, n_embd_head);
            }
        }
    }

    ggml_backend_tensor_set(cache, data.data(), 0, data.size());
}

void llama_csp::recall(const llama_csp_params & params) {
    if (!is_archiving) {
        throw std::invalid_argument("what is evicted is not kept: call llama_csp_keep_evicted() first");
    }

    ctx.synchronize();
    reset_graphs();
    clear_inspection();

    const auto cells = get_cells();

    archive(cells, 0);

    auto cur = plan(get_archived(cells), params);

    // some heads may keep more than the budget
    if (cur.n_kept > kv.get_size()) {
        resize(cur.n_kept);
    }

    cur.is_evicting = true;

    const int64_t t_start_us = ggml_time_us();

    if (cur.is_ragged) {
        alloc_pad();
    }

    try {
        for (size_t il = 0; il < layers.size(); ++il) {
            csp_set_rows(layers[il].k, layers[il].archive_k, cur.cells.size(), cur.choices[il], cur.n_kept, cur.n_true, layers[il].n_embd_head_k);
            csp_set_rows(layers[il].v, layers[il].archive_v, cur.cells.size(), cur.choices[il], cur.n_kept, cur.n_true, layers[il].n_embd_head_v);
        }

        for (const auto i : cells.idxs) {
            kv.v_cells[0].rm(i);
        }

        for (auto & l : layers) {
            l.index.mass.clear();
        }

        set_index(cur, params);
    } catch (...) {
        forget();

        throw;
    }

    set_stats(cur, ggml_time_us() - t_start_us);
}
