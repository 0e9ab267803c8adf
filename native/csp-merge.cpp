#include "csp.h"

#include "llama-context.h"

#include <algorithm>
#include <set>

// rows of the cache through F32
static std::vector<float> csp_read_rows(llama_context & lctx, ggml_tensor * cache, const std::vector<uint32_t> & idxs_data) {
    csp_graph graph(lctx);

    ggml_tensor * idxs = graph.new_input(GGML_TYPE_I32, idxs_data.size(), 1);

    ggml_tensor * cur = ggml_get_rows(graph.ctx0, ggml_view_2d(graph.ctx0, cache, cache->ne[0], cache->ne[1], cache->nb[1], 0), idxs);

    ggml_set_output(cur);
    ggml_build_forward_expand(graph.gf, cur);

    graph.alloc();

    ggml_backend_tensor_set(idxs, idxs_data.data(), 0, ggml_nbytes(idxs));

    graph.compute();

    std::vector<float> res(ggml_nelements(cur));

    ggml_backend_tensor_get(cur, res.data(), 0, ggml_nbytes(cur));

    return res;
}

static void csp_write_rows(llama_context & lctx, ggml_tensor * cache, const std::vector<int64_t> & idxs_data, const std::vector<float> & data) {
    csp_graph graph(lctx);

    ggml_tensor * idxs = graph.new_input(GGML_TYPE_I64, idxs_data.size(), 1);
    ggml_tensor * rows = graph.new_input(GGML_TYPE_F32, cache->ne[0], idxs_data.size());

    ggml_tensor * dst = ggml_view_2d(graph.ctx0, cache, cache->ne[0], cache->ne[1], cache->nb[1], 0);

    ggml_build_forward_expand(graph.gf, ggml_set_rows(graph.ctx0, dst, rows, idxs));

    graph.alloc();

    ggml_backend_tensor_set(idxs, idxs_data.data(), 0, ggml_nbytes(idxs));
    ggml_backend_tensor_set(rows, data.data(),      0, ggml_nbytes(rows));

    graph.compute();
}

// x' = (x + sum over the n cells merged into it of (x + x_e)/2)/(n + 1)
static void csp_merge(llama_context & lctx, ggml_tensor * cache, uint32_t n_embd_head, const std::vector<uint32_t> & idxs, const std::vector<llama_csp::head_choice> & choice) {
    const size_t n_embd = cache->ne[0];

    const auto src = csp_read_rows(lctx, cache, idxs);

    auto dst = src;

    std::set<uint32_t> changed;

    for (size_t h = 0; h < choice.size(); ++h) {
        std::vector<uint32_t> n_merged(idxs.size(), 0);

        for (const auto & [from, into] : choice[h].merged) {
            const float * x_e = src.data() + from*n_embd + h*n_embd_head;
            const float * x   = src.data() + into*n_embd + h*n_embd_head;
                  float * sum = dst.data() + into*n_embd + h*n_embd_head;

            for (uint32_t i = 0; i < n_embd_head; ++i) {
                sum[i] += 0.5f*(x[i] + x_e[i]);
            }

            n_merged[into]++;
            changed.insert(into);
        }

        for (const auto j : choice[h].kept) {
            float * sum = dst.data() + j*n_embd + h*n_embd_head;

            for (uint32_t i = 0; i < n_embd_head && n_merged[j] > 0; ++i) {
                sum[i] /= n_merged[j] + 1;
            }
        }
    }

    // the other heads of a changed row stay as they are: quantizing what was dequantized gives the same blocks again
    std::vector<int64_t> rows;
    std::vector<float>   data;

    for (const auto j : changed) {
        rows.push_back(idxs[j]);
        data.insert(data.end(), dst.begin() + j*n_embd, dst.begin() + (j + 1)*n_embd);
    }

    csp_write_rows(lctx, cache, rows, data);
}

void llama_csp::merge(const layer & l, const cell_list & cells, const std::vector<head_choice> & choice) {
    if (std::all_of(choice.begin(), choice.end(), [](const head_choice & cur) { return cur.merged.empty(); })) {
        return;
    }

    csp_merge(ctx, l.k, l.n_embd_head_k, cells.idxs, choice);
    csp_merge(ctx, l.v, l.n_embd_head_v, cells.idxs, choice);
}
