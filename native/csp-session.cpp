#include "csp.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

// a snapshot as bytes: numbers as the machine has them, vectors after their length. what is of 32 bits each has no gaps,
// in which there could be anything

struct csp_head {
    uint32_t  n_kept;
    uint32_t  n_chosen;
    uint32_t  n_base;
    llama_pos pos_chosen;

    uint32_t use_sinks;
    uint32_t is_ragged;

    uint32_t n_observed;
    uint32_t i_row;
    uint32_t is_holding;

    uint32_t n_cells;
    uint32_t n_recent;
};

struct csp_cell {
    uint32_t    i;
    llama_pos   pos;
    llama_pos   x;
    llama_pos   y;
    llama_token tok;
};

struct csp_query {
    llama_pos pos;
    llama_pos pos_max;
    llama_pos x;
    llama_pos y;
    uint32_t  is_2d;
    uint32_t  modality;
};

struct csp_writer {
    llama_csp_write write;
    void * user_data;

    void bytes(const void * data, size_t size) {
        if (size > 0 && !write(data, size, user_data)) {
            throw std::runtime_error("the snapshot could not be written");
        }
    }

    template<typename T>
    void value(const T & x) {
        bytes(&x, sizeof(T));
    }

    template<typename T>
    void vector(const std::vector<T> & v) {
        value<uint64_t>(v.size());
        bytes(v.data(), v.size()*sizeof(T));
    }
};

struct csp_reader {
    llama_csp_read read;
    void * user_data;
    size_t n_left;

    void bytes(void * data, size_t size) {
        if (size > n_left || (size > 0 && !read(data, size, user_data))) {
            throw std::runtime_error("the snapshot ends too early");
        }

        n_left -= size;
    }

    template<typename T>
    T value() {
        T res;
        bytes(&res, sizeof(T));

        return res;
    }

    template<typename T>
    void vector(std::vector<T> & v) {
        const auto n = value<uint64_t>();

        // no memory for what isn't there
        if (n > n_left/sizeof(T)) {
            throw std::runtime_error("the snapshot ends too early");
        }

        v.resize(n);
        bytes(v.data(), n*sizeof(T));
    }
};

static void csp_write_archive(csp_writer & out, const csp_rows & rows, uint32_t n_rows) {
    out.value<uint32_t>(rows.type);
    out.value(rows.n_embd);

    if (rows.n_embd == 0) {
        return;
    }

    for (uint32_t i = 0; i < n_rows; i += csp_rows::N_BLOCK) {
        const uint32_t n = std::min(n_rows - i, csp_rows::N_BLOCK);

        std::vector<uint8_t> data(n*rows.size());

        rows.get(i, n, data.data());

        out.bytes(data.data(), data.size());
    }
}

static void csp_write_cache(csp_writer & out, const llama_csp_snapshot::cache & cache) {
    std::vector<csp_cell> cells;

    for (uint32_t i = 0; i < cache.cells.used_max_p1(); ++i) {
        if (!cache.cells.is_empty(i)) {
            const auto & ext = cache.cells.ext_get(i);

            cells.push_back({ i, cache.cells.pos_get(i), ext.x, ext.y, ext.tok });
        }
    }

    out.value<uint32_t>(cache.type_k);
    out.value<uint32_t>(cache.type_v);
    out.value(cache.cells.size());
    out.value(cache.head);
    out.vector(cells);

    for (const auto & rows : cache.rows) {
        out.vector(rows);
    }
}

void llama_csp::write_snapshot(const llama_csp_snapshot & snapshot, llama_csp_write write, void * user_data) {
    csp_writer out = { write, user_data };

    const auto & index = snapshot.index;

    out.value(csp_head {
        index.n_kept, index.n_chosen, index.n_base, index.pos_chosen, index.use_sinks, index.is_ragged,
        snapshot.n_observed, snapshot.i_row, snapshot.is_holding, snapshot.stats.n_cells, snapshot.stats.n_recent,
    });

    out.vector(index.pos);
    out.vector(index.modality);
    out.vector(index.window_pos);
    out.vector(index.window_modality);

    std::vector<csp_query> window;

    for (const auto & cur : snapshot.window) {
        window.push_back({ cur.pos, cur.pos_max, cur.ext.x, cur.ext.y, cur.is_2d, (uint32_t) cur.modality });
    }

    out.vector(window);

    for (size_t il = 0; il < snapshot.layers.size(); ++il) {
        const auto & l = snapshot.layers[il];

        out.value(snapshot.kq_scales[il]);

        out.vector(l.n_chosen);
        out.vector(l.n_kept);
        out.vector(l.kept);
        out.vector(l.sink);
        out.vector(l.mass);

        out.vector(snapshot.q[il]);

        csp_write_archive(out, snapshot.archives[il].first,  index.n_base);
        csp_write_archive(out, snapshot.archives[il].second, index.n_base);
    }

    for (const auto & cache : snapshot.caches) {
        csp_write_cache(out, cache);
    }
}

static void csp_expect(bool is_true, const char * what) {
    if (!is_true) {
        throw std::invalid_argument(format("the snapshot is of another kind of context, or damaged: %s", what));
    }
}

static bool csp_are_finite(const std::vector<float> & v) {
    return std::all_of(v.begin(), v.end(), [](float x) { return std::isfinite(x); });
}

static bool csp_are_modalities(const std::vector<int8_t> & v) {
    return std::all_of(v.begin(), v.end(), [](int8_t x) { return x == LLAMA_CSP_MODALITY_TEXT || x == LLAMA_CSP_MODALITY_MEDIA; });
}

// the next one is a position too
static bool csp_is_pos(llama_pos p) {
    return p >= 0 && p < std::numeric_limits<llama_pos>::max()/2;
}

// like: what the context keeps of its own evicted cells
static csp_rows csp_read_archive(csp_reader & in, const csp_rows & like, uint32_t n_rows) {
    csp_rows res = { like.type, like.n_embd, like.file, {} };

    csp_expect(in.value<uint32_t>() == (uint32_t) like.type && in.value<int64_t>() == like.n_embd, "type of the evicted cells");

    for (uint32_t i = 0; res.n_embd > 0 && i < n_rows; i += csp_rows::N_BLOCK) {
        const uint32_t n = std::min(n_rows - i, csp_rows::N_BLOCK);

        std::vector<uint8_t> data(n*res.size());

        in.bytes(data.data(), data.size());

        res.set(i, n, data.data());
    }

    return res;
}

static void csp_check_layer(const llama_csp::layer & l, const llama_csp::layer_index & cur, const llama_csp::seq_index & index) {
    const auto is_per_head = [&](const std::vector<uint32_t> & v, uint32_t max) {
        return v.size() == l.n_head_kv && std::all_of(v.begin(), v.end(), [max](uint32_t n) { return n <= max; });
    };

    csp_expect(index.n_kept == 0 ? cur.n_kept.empty() : is_per_head(cur.n_kept, index.n_kept), "cells kept per head");
    csp_expect(cur.kept.size() == cur.n_kept.size()*index.n_kept, "kept tokens");

    for (size_t h = 0; h < cur.n_kept.size(); ++h) {
        const auto row = cur.kept.begin() + h*index.n_kept;
        const auto end = row + cur.n_kept[h];

        csp_expect(std::adjacent_find(row, end, std::greater_equal<uint32_t>()) == end, "order of the kept tokens");
        csp_expect(row == end || end[-1] < index.pos.size(), "kept tokens");
    }

    if (index.n_base > 0) {
        csp_expect(is_per_head(cur.n_chosen, index.n_chosen) && cur.n_kept.size() == l.n_head_kv, "chosen cells per head");

        for (size_t h = 0; h < cur.n_chosen.size(); ++h) {
            const uint32_t n = cur.n_chosen[h];

            csp_expect(n <= cur.n_kept[h] && (index.is_ragged || n == index.n_chosen), "chosen cells per head");
            csp_expect(n == 0 || cur.kept[h*index.n_kept + n - 1] < index.n_base, "chosen tokens");
        }
    }

    csp_expect(cur.sink.size() == l.n_head || (cur.sink.empty() && !index.use_sinks), "sinks");
    csp_expect(cur.mass.size() == l.n_head ||  cur.mass.empty(), "mass of the evicted cells");
    csp_expect(csp_are_finite(cur.sink) && csp_are_finite(cur.mass), "sinks");
}

static void csp_check_index(const llama_csp::seq_index & index, const llama_kv_cells & cells) {
    csp_expect(index.modality.size() == index.pos.size() && csp_are_modalities(index.modality), "modalities of the tokens");
    csp_expect(std::all_of(index.pos.begin(), index.pos.end(), csp_is_pos), "positions of the tokens");
    csp_expect(index.window_modality.size() == index.window_pos.size() && csp_are_modalities(index.window_modality), "modalities of the queries");

    csp_expect(index.n_chosen <= index.n_kept && index.n_chosen <= cells.size(), "chosen cells");
    csp_expect(index.n_base <= index.pos.size(), "tokens");

    if (index.n_base == 0) {
        csp_expect(index.n_chosen == 0 && !index.use_sinks && !index.is_ragged, "no pruned part");
    } else {
        csp_expect(csp_is_pos(index.pos_chosen), "position of the chosen cells");
    }

    for (uint32_t i = 0; i < index.n_chosen; ++i) {
        csp_expect(!cells.is_empty(i) && cells.pos_get(i) == index.pos_chosen, "position of the chosen cells");
    }
}

static llama_csp_snapshot::cache csp_read_cache(csp_reader & in, const llama_kv_cache & cache, uint32_t n_ctx) {
    llama_csp_snapshot::cache res = {};

    res.type_k = cache.type_k();
    res.type_v = cache.type_v();

    csp_expect(in.value<uint32_t>() == (uint32_t) res.type_k, "type of K");
    csp_expect(in.value<uint32_t>() == (uint32_t) res.type_v, "type of V");

    const auto size = in.value<uint32_t>();

    res.head = in.value<uint32_t>();

    std::vector<csp_cell> cells;

    in.vector(cells);

    const auto is_before = [](const csp_cell & a, const csp_cell & b) { return a.i < b.i; };

    csp_expect(size > 0 && size == csp_pad_cells(size) && res.head <= size, "size of the cache");
    csp_expect(std::is_sorted(cells.begin(), cells.end(), is_before), "order of the cells");
    csp_expect(cells.empty() || cells.back().i < size, "cells");

    const uint32_t n_used = cells.empty() ? 0 : cells.back().i + 1;

    if (n_used > n_ctx) {
        throw std::invalid_argument(format("the snapshot holds %u cells, which is beyond n_ctx = %u", n_used, n_ctx));
    }

    // no more than an n_ctx that is smaller now
    res.cells.resize(std::min(size, n_ctx));
    res.head = std::min(res.head, res.cells.size());

    for (const auto & cur : cells) {
        csp_expect(res.cells.is_empty(cur.i) && csp_is_pos(cur.pos), "cells");

        res.cells.pos_set(cur.i, cur.pos);
        res.cells.ext_set(cur.i, { cur.x, cur.y, cur.tok });
        res.cells.seq_add(cur.i, 0);
    }

    return res;
}

llama_csp_snapshot * llama_csp::read_snapshot(llama_csp_read read, void * user_data, size_t size) const {
    csp_reader in = { read, user_data, size };

    auto res = std::make_unique<llama_csp_snapshot>();

    const auto head = in.value<csp_head>();

    csp_expect(head.use_sinks <= 1 && head.is_ragged <= 1 && head.is_holding <= 1, "flags");

    auto & index = res->index;

    index.n_kept     = head.n_kept;
    index.n_chosen   = head.n_chosen;
    index.n_base     = head.n_base;
    index.pos_chosen = head.pos_chosen;
    index.use_sinks  = head.use_sinks;
    index.is_ragged  = head.is_ragged;

    in.vector(index.pos);
    in.vector(index.modality);
    in.vector(index.window_pos);
    in.vector(index.window_modality);

    std::vector<csp_query> window;

    in.vector(window);

    const uint32_t n_ctx = ctx.get_cparams().n_ctx;

    csp_expect(window.size() <= n_ctx && head.n_observed <= window.size(), "observed queries");
    csp_expect(head.i_row < window.size() || (window.empty() && head.i_row == 0), "observed queries");

    for (const auto & cur : window) {
        csp_expect(cur.is_2d <= 1 && cur.modality <= LLAMA_CSP_MODALITY_MEDIA, "observed queries");

        res->window.push_back({ cur.pos, cur.pos_max, { cur.x, cur.y, LLAMA_TOKEN_NULL }, cur.is_2d == 1, (int8_t) cur.modality });
    }

    res->n_window   = window.size();
    res->n_observed = head.n_observed;
    res->i_row      = head.i_row;
    res->is_holding = head.is_holding;

    for (const auto & l : layers) {
        auto & cur = res->layers.emplace_back();

        res->kq_scales.push_back(in.value<float>());

        in.vector(cur.n_chosen);
        in.vector(cur.n_kept);
        in.vector(cur.kept);
        in.vector(cur.sink);
        in.vector(cur.mass);

        in.vector(res->q.emplace_back());

        res->archives.emplace_back();
        res->archives.back().first  = csp_read_archive(in, l.archive_k, index.n_base);
        res->archives.back().second = csp_read_archive(in, l.archive_v, index.n_base);

        csp_expect(std::isfinite(res->kq_scales.back()), "scale of the attention");
        csp_expect(res->q.back().size() == window.size()*l.n_embd_head_k*l.n_head*sizeof(float), "observed queries");

        csp_check_layer(l, cur, index);
    }

    for (const auto * cache : caches()) {
        auto & cur = res->caches.emplace_back(csp_read_cache(in, *cache, n_ctx));

        for (const auto & l : cache->layers) {
            for (const auto * t : { l.k, l.v }) {
                in.vector(cur.rows.emplace_back());

                csp_expect(cur.rows.back().size() == cur.cells.used_max_p1()*t->nb[1], "K and V");
            }
        }
    }

    csp_expect(in.n_left == 0, "length");
    csp_check_index(index, res->caches[0].cells);

    res->model = &ctx.get_model();

    res->stats = {};
    res->stats.n_layer  = layers.size();
    res->stats.n_cells  = head.n_cells;
    res->stats.n_kept   = index.n_kept;
    res->stats.n_recent = head.n_recent;
    res->stats.n_tokens = index.pos.size();
    res->stats.n_window = index.window_pos.size();

    return res.release();
}
