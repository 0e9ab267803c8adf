#include "csp.h"

#include "llama-context.h"

#include <algorithm>
#include <numeric>

llama_csp::cell_list llama_csp::get_cells() const {
    const auto & cells = kv.v_cells[0];

    cell_list res;

    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (!cells.is_empty(i)) {
            res.idxs.push_back(i);
        }
    }

    // chosen cells are the first ones. a position can repeat within a picture, there the order of the cells counts
    std::sort(res.idxs.begin() + index.n_chosen, res.idxs.end(), [&](uint32_t a, uint32_t b) {
        return std::make_pair(cells.pos_get(a), a) < std::make_pair(cells.pos_get(b), b);
    });

    for (const auto i : res.idxs) {
        res.pos.push_back(cells.pos_get(i));
        res.ext.push_back(cells.ext_get(i));
    }

    res.n_chosen = index.n_chosen;
    res.n_base   = index.n_base;
    res.n_true   = res.size() - res.n_chosen;

    return res;
}

// cache [n_embd_head*n_head_kv, kv_size], idxs I32 [n_kept, n_head_kv], rows I64 [n_kept]
static void csp_build_compact(csp_graph & graph, ggml_tensor * cache, int64_t n_embd_head, int64_t n_head_kv, ggml_tensor * idxs, ggml_tensor * rows) {
    auto * ctx0 = graph.ctx0;

    const size_t nb_head = ggml_row_size(cache->type, n_embd_head);

    ggml_tensor * cur = ggml_view_3d(ctx0, cache, n_embd_head, cache->ne[1], n_head_kv, cache->nb[1], nb_head, 0);

    // through F32, which changes nothing: quantizing what was dequantized gives the same blocks again
    cur = ggml_get_rows(ctx0, cur, idxs); // [n_embd_head, n_kept, n_head_kv]
    cur = ggml_cont_2d (ctx0, ggml_permute(ctx0, cur, 0, 2, 1, 3), n_embd_head*n_head_kv, idxs->ne[0]);

    ggml_tensor * dst = ggml_view_2d(ctx0, cache, cache->ne[0], cache->ne[1], cache->nb[1], 0);

    ggml_build_forward_expand(graph.gf, ggml_set_rows(ctx0, dst, cur, rows));
}

void llama_csp::compact(const layer & l, const cell_list & cells, const std::vector<head_choice> & choice, uint32_t n_kept, uint32_t n_true) {
    csp_graph graph(ctx);

    ggml_tensor * idxs = graph.new_input(GGML_TYPE_I32, n_kept, l.n_head_kv);
    ggml_tensor * rows = graph.new_input(GGML_TYPE_I64, n_kept, 1);

    csp_build_compact(graph, l.k, l.n_embd_head_k, l.n_head_kv, idxs, rows);
    csp_build_compact(graph, l.v, l.n_embd_head_v, l.n_head_kv, idxs, rows);

    graph.alloc();

    std::vector<int32_t> idxs_data;

    for (const auto & cur : choice) {
        auto kept = cur.kept;

        // padding is between the chosen and the true cells, with whatever in it
        const uint32_t any = kept.empty() ? 0 : kept[0];

        kept.insert(kept.end() - n_true, n_kept - kept.size(), any);

        std::transform(kept.begin(), kept.end(), std::back_inserter(idxs_data), [&](uint32_t i) { return cells.idxs[i]; });
    }

    std::vector<int64_t> rows_data(n_kept);
    std::iota(rows_data.begin(), rows_data.end(), 0);

    ggml_backend_tensor_set(idxs, idxs_data.data(), 0, ggml_nbytes(idxs));
    ggml_backend_tensor_set(rows, rows_data.data(), 0, ggml_nbytes(rows));

    graph.compute();
}

void llama_csp::set_cells(const cell_list & list, uint32_t n_kept, uint32_t n_true) {
    auto & cells = kv.v_cells[0];

    for (const auto i : list.idxs) {
        cells.rm(i);
    }

    for (uint32_t i = 0; i < n_kept; ++i) {
        // all that matters of a chosen cell is that every later query sees it
        const bool chosen = i + n_true < n_kept;

        const uint32_t j = list.size() - (chosen ? n_true + 1 : n_kept - i);

        cells.pos_set(i, list.pos[j]);
        cells.ext_set(i, list.ext[j]);
        cells.seq_add(i, 0);
    }

    kv.v_heads[0] = n_kept;
}
