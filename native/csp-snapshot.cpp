#include "csp.h"

#include "llama-context.h"
#include "llama-kv-cache-iswa.h"

#include <stdexcept>

static std::vector<uint8_t> csp_get_rows(const ggml_tensor * t, uint32_t n_rows) {
    std::vector<uint8_t> res(n_rows*t->nb[1]);

    ggml_backend_tensor_get(t, res.data(), 0, res.size());

    return res;
}

static void csp_set_rows(ggml_tensor * t, const std::vector<uint8_t> & rows) {
    ggml_backend_tensor_set(t, rows.data(), 0, rows.size());
}

std::vector<llama_kv_cache *> llama_csp::caches() const {
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(ctx.get_memory())) {
        return { iswa->get_base(), iswa->get_swa() };
    }

    return { &kv };
}

llama_csp_snapshot * llama_csp::take_snapshot() {
    ctx.synchronize();

    update_index();

    auto res = std::make_unique<llama_csp_snapshot>();

    for (const auto * cache : caches()) {
        llama_csp_snapshot::cache cur = { cache->v_cells[0], cache->v_heads[0], cache->type_k(), cache->type_v(), {} };

        for (const auto & l : cache->layers) {
            cur.rows.push_back(csp_get_rows(l.k, cur.cells.used_max_p1()));
            cur.rows.push_back(csp_get_rows(l.v, cur.cells.used_max_p1()));
        }

        res->caches.push_back(std::move(cur));
    }

    res->index = index;
    res->stats = stats;
    res->model = &ctx.get_model();

    res->n_window   = n_window;
    res->n_observed = n_observed;
    res->i_row      = i_row;
    res->is_holding = is_holding;
    res->window     = window;

    for (const auto & l : layers) {
        res->layers.push_back(l.index);
        res->archives.emplace_back(l.archive_k, l.archive_v);
        res->kq_scales.push_back(l.kq_scale);
        res->q.push_back(n_window > 0 ? csp_get_rows(l.q, n_window) : std::vector<uint8_t>());
    }

    return res.release();
}

void llama_csp::restore(const llama_csp_snapshot & snapshot) {
    ctx.synchronize();

    const auto all = caches();

    for (size_t i = 0; i < all.size(); ++i) {
        const auto & cur = snapshot.caches.at(i);

        bool fits = snapshot.model == &ctx.get_model() && std::max(cur.cells.size(), snapshot.n_window) <= ctx.get_cparams().n_ctx;

        for (size_t il = 0; fits && il < all[i]->layers.size(); ++il) {
            const auto & l = all[i]->layers[il];

            // rows of another type can be as long
            fits = cur.type_k == l.k->type && cur.type_v == l.v->type && cur.rows[2*il].size() == cur.cells.used_max_p1()*l.k->nb[1] && cur.rows[2*il + 1].size() == cur.cells.used_max_p1()*l.v->nb[1];
        }

        if (!fits) {
            throw std::invalid_argument("the snapshot is of another kind of context");
        }
    }

    if (is_archiving && snapshot.archives.at(0).first.n_embd == 0) {
        throw std::invalid_argument("the snapshot holds nothing of what was evicted");
    }

    forget();

    try {
        set_snapshot(snapshot);
    } catch (...) {
        forget();

        throw;
    }
}

void llama_csp::set_snapshot(const llama_csp_snapshot & snapshot) {
    const auto all = caches();

    resize(snapshot.caches[0].cells.size());

    for (size_t i = 1; i < all.size(); ++i) {
        if (snapshot.caches[i].cells.size() > all[i]->get_size()) {
            resize_cache(*all[i], snapshot.caches[i].cells.size());
        }
    }

    if (snapshot.index.is_ragged) {
        alloc_pad();
    }

    observe(snapshot.n_window);

    reset_graphs();
    clear_inspection();

    for (size_t i = 0; i < all.size(); ++i) {
        const auto & cur = snapshot.caches[i];

        for (size_t il = 0; il < all[i]->layers.size(); ++il) {
            csp_set_rows(all[i]->layers[il].k, cur.rows[2*il]);
            csp_set_rows(all[i]->layers[il].v, cur.rows[2*il + 1]);
        }

        all[i]->v_cells[0].reset();
        all[i]->v_cells[0].set(0, cur.cells);
        all[i]->v_heads[0] = cur.head;
    }

    index = snapshot.index;
    stats = snapshot.stats;

    n_observed = snapshot.n_observed;
    i_row      = snapshot.i_row;
    is_holding = snapshot.is_holding;
    window     = snapshot.window;

    for (size_t il = 0; il < layers.size(); ++il) {
        auto & l = layers[il];

        l.index    = snapshot.layers[il];
        l.kq_scale = std::max(l.kq_scale, snapshot.kq_scales[il]);

        l.archive_k.share(snapshot.archives[il].first);
        l.archive_v.share(snapshot.archives[il].second);

        if (n_window > 0) {
            csp_set_rows(l.q, snapshot.q[il]);
        }
        if (index.use_sinks) {
            ggml_backend_tensor_set(l.sink, l.index.sink.data(), 0, ggml_nbytes(l.sink));
        }
        if (index.is_ragged) {
            set_pad(l);
        }
    }
}
