#include "csp.h"

#include "csp-map.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"

#include <algorithm>
#include <stdexcept>

#ifdef __GLIBC__
#include <malloc.h>
#endif

// the pages of what was freed, back to the operating system
static void csp_trim() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

// bytes that are worth the time
static constexpr size_t N_TRIM = 1 << 18;

// the tensor has n_rows rows, whatever its buffer could hold
static void csp_set_n_rows(ggml_tensor * t, uint32_t n_rows) {
    t->ne[1] = n_rows;
    t->nb[2] = t->nb[1]*n_rows;
    t->nb[3] = t->nb[2];
}

static void csp_copy_rows(ggml_context * ctx, ggml_tensor * src, ggml_tensor * dst, uint32_t n_rows) {
    if (n_rows == 0) {
        return;
    }

    ggml_tensor * from = ggml_view_2d(ctx, src, src->ne[0], n_rows, src->nb[1], 0);
    ggml_tensor * to   = ggml_view_2d(ctx, dst, dst->ne[0], n_rows, dst->nb[1], 0);

    ggml_backend_view_init(from);
    ggml_backend_view_init(to);

    ggml_backend_tensor_copy(from, to);
}

static ggml_backend_buffer_t csp_alloc_rows(ggml_context * ctx, ggml_tensor * t, ggml_backend_buffer_type_t buft) {
    ggml_backend_buffer_t map = buft == ggml_backend_cpu_buffer_type() ? csp_map_alloc(ggml_nbytes(t)) : nullptr;

    if (map) {
        ggml_backend_tensor_alloc(map, t, ggml_backend_buffer_get_base(map));

        return map;
    }

    ggml_backend_buffer_t res = ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft);

    // no NaN in the padding
    if (res) {
        ggml_backend_buffer_clear(res, 0);
    }

    return res;
}

// give K or V of a layer n_cells rows, of which n_rows are in use. returns false if there is no memory for it
static bool csp_resize_rows(ggml_tensor *& t, ggml_tensor *& stream, uint32_t n_cells, uint32_t n_rows, llama_csp::bufs_t & bufs) {
    if (csp_is_map(t->buffer)) {
        if (!csp_map_resize(t->buffer, n_cells*t->nb[1], n_rows*t->nb[1])) {
            return false;
        }

        t->data = stream->data = ggml_backend_buffer_get_base(t->buffer);

        return true;
    }

    ggml_context_ptr ctx { ggml_init({ 4*ggml_tensor_overhead(), nullptr, true }) };

    ggml_tensor * res = ggml_new_tensor_3d(ctx.get(), t->type, t->ne[0], n_cells, 1);

    ggml_set_name(res, t->name);

    ggml_backend_buffer_ptr buf { csp_alloc_rows(ctx.get(), res, ggml_backend_buffer_get_type(t->buffer)) };
    if (!buf) {
        return false;
    }

    csp_copy_rows(ctx.get(), t, res, n_rows);

    t      = res;
    stream = ggml_view_2d(ctx.get(), res, res->ne[0], n_cells, res->nb[1], 0);

    ggml_backend_view_init(stream);

    bufs.emplace_back(std::move(ctx), std::move(buf));

    return true;
}

bool llama_csp::resize_layer(llama_kv_cache & cache, size_t i, uint32_t n_cells) {
    auto & l = cache.layers[i];

    const uint32_t n_rows = std::min(n_cells, cache.v_cells[0].used_max_p1());

    const auto * k = l.k;

    const bool res =
        csp_resize_rows(l.k, l.k_stream[0], n_cells, n_rows, cache.ctxs_bufs) &&
        csp_resize_rows(l.v, l.v_stream[0], n_cells, n_rows, cache.ctxs_bufs);

    for (auto & cur : layers) {
        if (cur.k == k) {
            cur.k = l.k;
            cur.v = l.v;
        }
    }

    // layers leave the buffer that they share one by one
    const auto is_unused = [&](const auto & cur) {
        return std::none_of(cache.layers.begin(), cache.layers.end(), [&](const auto & l) {
            return l.k->buffer == cur.second.get() || l.v->buffer == cur.second.get();
        });
    };

    cache.ctxs_bufs.erase(std::remove_if(cache.ctxs_bufs.begin(), cache.ctxs_bufs.end(), is_unused), cache.ctxs_bufs.end());

    // else the pages of all layers are held until the last of them has moved
    if (!csp_is_map(l.k->buffer) && ggml_nbytes(l.k) > N_TRIM) {
        csp_trim();
    }

    return res;
}

void llama_csp::resize_cache(llama_kv_cache & cache, uint32_t n_cells) {
    const uint32_t n_old = cache.get_size();

    size_t n_done = 0;
    while (n_done < cache.layers.size() && resize_layer(cache, n_done, n_cells)) {
        n_done++;
    }

    // without memory for a smaller copy, or back from a larger one, a layer keeps its buffer
    const bool is_done = n_done == cache.layers.size() || n_cells < n_old;

    for (auto & l : cache.layers) {
        for (auto * t : { l.k, l.v, l.k_stream[0], l.v_stream[0] }) {
            csp_set_n_rows(t, is_done ? n_cells : n_old);
        }
    }

    if (!is_done) {
        // what was gained already is given back, where there is memory to do so
        for (size_t i = 0; i < n_done; ++i) {
            resize_layer(cache, i, n_old);
        }

        throw std::runtime_error(format("no memory for a cache of %u cells", n_cells));
    }

    auto & cells = cache.v_cells[0];

    const auto old = cells.cp(0, std::min(n_cells, n_old));

    cells.resize(n_cells);
    cells.set(0, old);

    cache.v_heads[0] = std::min(cache.v_heads[0], cells.used_max_p1());
}

void llama_csp::resize(uint32_t n_cells) {
    ctx.synchronize();
    update_index();

    const auto & cparams = ctx.get_cparams();

    if (n_cells > cparams.n_ctx) {
        throw std::invalid_argument(format("n_cells = %u is beyond n_ctx = %u", n_cells, cparams.n_ctx));
    }
    if (n_cells < kv.v_cells[0].used_max_p1()) {
        throw std::invalid_argument(format("n_cells = %u, but %u are in use", n_cells, kv.v_cells[0].used_max_p1()));
    }
    if (kv.get_has_shift()) {
        throw std::invalid_argument("positions were shifted since the last llama_decode()");
    }

    n_cells = csp_pad_cells(n_cells);

    if (n_cells == kv.get_size()) {
        return;
    }

    reset_graphs();

    resize_cache(kv, n_cells);

    if (!bufs_pad.empty()) {
        bufs_pad.clear();

        if (index.is_ragged) {
            try {
                alloc_pad();
            } catch (...) {
                forget();

                throw;
            }

            for (auto & l : layers) {
                set_pad(l);
            }
        }
    }

    reserve();
}

// the ring of a sliding window takes every token, though the cache beside it is pruned: it has to hold all that the
// window reaches over from the start
void llama_csp::resize_swa() {
    auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(ctx.get_memory());

    if (!iswa) {
        return;
    }

    const auto & cparams = ctx.get_cparams();

    const uint32_t n_cells = csp_pad_cells(std::min(cparams.n_ctx, iswa->get_swa()->n_swa + cparams.n_ubatch));

    if (n_cells > iswa->get_swa()->get_size()) {
        ctx.synchronize();

        resize_cache(*iswa->get_swa(), n_cells);
        reserve();
    }
}

void llama_csp::reserve() {
    // a buffer that is hardly written to would take over the pages of one that was
    csp_trim();

    const auto & cparams = ctx.get_cparams();

    const uint32_t n_tokens = std::min(cparams.n_ctx, cparams.n_ubatch);

    reset_graphs();

    // anew, as the buffers of a scheduler only grow
    const auto new_sched = [&] {
        ctx.sched.reset(ggml_backend_sched_new(ctx.backend_ptrs.data(), ctx.backend_buft.data(), ctx.backend_ptrs.size(),
                ctx.graph_max_nodes(n_tokens), cparams.pipeline_parallel, cparams.op_offload));
    };

    new_sched();

    // as llama_context::sched_reserve(), for one graph
    const auto mctx = ctx.get_memory()->init_full();

    if (!ctx.graph_reserve(n_tokens, cparams.n_seq_max, std::min(n_tokens, cparams.n_outputs_max), mctx.get())) {
        // the next llama_decode() plans its graph by itself, and fails if there still is no memory
        new_sched();
    }

    csp_trim();
}

void llama_csp::set_n_ctx(llama_context & ctx, uint32_t n_ctx) {
    ctx.cparams.n_ctx     = n_ctx;
    ctx.cparams.n_ctx_seq = n_ctx;
}
