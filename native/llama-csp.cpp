#include "csp.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>

//
// helpers
//

csp_graph::csp_graph(llama_context & lctx) : lctx(lctx) {
    auto * res = lctx.get_gf_res_reserve();

    ggml_backend_sched_reset(lctx.get_sched());
    ggml_backend_sched_set_eval_callback(lctx.get_sched(), nullptr, nullptr);

    res->reset();

    ctx0 = res->get_ctx();
    gf   = res->get_gf();
}

ggml_tensor * csp_graph::new_input(ggml_type type, int64_t ne0, int64_t ne1) {
    ggml_tensor * res = ggml_new_tensor_2d(ctx0, type, ne0, ne1);

    ggml_set_input(res);

    return res;
}

void csp_graph::alloc() {
    if (!ggml_backend_sched_alloc_graph(lctx.get_sched(), gf)) {
        throw std::runtime_error("no memory for the compute buffer of a pruning graph");
    }
}

void csp_graph::compute() {
    if (lctx.graph_compute(gf, true) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("a pruning graph was aborted or failed");
    }

    ggml_backend_sched_synchronize(lctx.get_sched());
}

llama_csp::bufs_t csp_alloc(
        std::vector<llama_csp::layer> & layers,
        ggml_tensor * llama_csp::layer::* member,
        int64_t (*ne0)(const llama_csp::layer &),
        int64_t ne1) {
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctxs;

    for (auto & l : layers) {
        auto & ctx = ctxs[ggml_backend_buffer_get_type(l.k->buffer)];

        if (!ctx) {
            ctx.reset(ggml_init({ layers.size()*ggml_tensor_overhead(), nullptr, true }));
        }

        l.*member = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, ne0(l), ne1);
    }

    llama_csp::bufs_t res;

    for (auto & [buft, ctx] : ctxs) {
        ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft) };
        if (!buf) {
            throw std::runtime_error("no memory for the queries and sinks of a window");
        }

        res.emplace_back(std::move(ctx), std::move(buf));
    }

    return res;
}

//
// llama_csp
//

// throws if the memory of the context can't be pruned
static llama_kv_cache & csp_get_kv_cache(llama_context & ctx) {
    const auto & cparams = ctx.get_cparams();
    const auto & hparams = ctx.get_model().hparams;

    const std::string arch = ctx.get_model().arch_name();

    auto * mem = ctx.get_memory();

    auto * kv = dynamic_cast<llama_kv_cache *>(mem);

    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(mem)) {
        kv = iswa->get_base();
    }

    if (hparams.is_mla()) {
        throw std::runtime_error(arch + " keeps a compressed cache (MLA), which can't be pruned per head");
    }
    if (!kv) {
        throw std::runtime_error(arch + " keeps a recurrent, hybrid or indexed state, or none: only a plain KV cache can be pruned");
    }
    if (hparams.use_alibi || hparams.n_rel_attn_bkts > 0) {
        throw std::runtime_error(arch + " adds a bias by distance to its attention, which needs a position of its own for every cell");
    }
    if (hparams.ple_n_heads > 0) {
        throw std::runtime_error(arch + " reads the tokens before a token back from the cache, where pruning removes them");
    }
    if (ctx.get_model().arch == LLM_ARCH_GROK) {
        throw std::runtime_error(arch + " transforms its attention logits in a way that scoring does not know");
    }
    if (hparams.router_layer >= 0) {
        throw std::runtime_error(arch + " routes by a layer of its cache, which pruning would change");
    }
    if (ctx.get_model().split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        throw std::runtime_error("a cache that is split by tensor parallelism can't be pruned");
    }
    if (cparams.n_seq_max != 1) {
        throw std::runtime_error("n_seq_max = " + std::to_string(cparams.n_seq_max) + ": only a context of one sequence can be pruned");
    }

    return *kv;
}

llama_csp::llama_csp(llama_context & ctx) : ctx(ctx), kv(csp_get_kv_cache(ctx)) {
    if (ctx.cparams.csp) {
        throw std::runtime_error("the context has a llama_csp already");
    }
    if (kv.v_trans) {
        throw std::runtime_error("flash attention is off, which transposes V: only a cache with V in rows can be pruned");
    }
    if (kv.other) {
        throw std::runtime_error("the cache shares its cells with that of another context");
    }

    for (const auto & cur : kv.layers) {
        if (kv.hparams.n_head_kv(cur.il) == 0) {
            continue;
        }

        layer l;

        l.il            = cur.il;
        l.n_head        = kv.hparams.n_head(cur.il);
        l.n_head_kv     = kv.hparams.n_head_kv(cur.il);
        l.n_embd_head_k = kv.hparams.n_embd_head_k(cur.il);
        l.n_embd_head_v = kv.hparams.n_embd_head_v(cur.il);

        l.k = cur.k;
        l.v = cur.v;

        // a row of the cache is cut into heads
        if (l.n_embd_head_k%ggml_blck_size(l.k->type) != 0 || l.n_embd_head_v%ggml_blck_size(l.v->type) != 0) {
            throw std::runtime_error("the head size of layer " + std::to_string(l.il) + " is not a multiple of the block size of the cache's type");
        }

        layers.push_back(std::move(l));
    }

    if (layers.empty()) {
        throw std::runtime_error("no layer has full attention: there is nothing to prune");
    }

    bufs_sink = csp_alloc(layers, &layer::sink, [](const layer & l) -> int64_t { return l.n_head; }, 1);

    ctx.cparams.csp = this;
}

llama_csp::~llama_csp() {
    ctx.synchronize();
    ctx.cparams.csp = nullptr;

    reset_graphs();
}

void llama_csp::reset_graphs() {
    for (auto & res : ctx.gf_res_prev) {
        if (res) {
            res->reset();
        }
    }
    ctx.gf_res_prev_active = nullptr;
}

void llama_csp::reserve() {
    const auto & cparams = ctx.get_cparams();

    const uint32_t n_tokens = std::min(cparams.n_ctx, cparams.n_ubatch);

    const auto mctx = ctx.get_memory()->init_full();

    if (!ctx.graph_reserve(n_tokens, cparams.n_seq_max, std::min(n_tokens, cparams.n_outputs_max), mctx.get())) {
        throw std::runtime_error("no memory for the compute buffers after pruning");
    }
}

ggml_tensor * llama_csp::build_attn(
        const llm_graph_context & graph,
                ggml_tensor * q,
                ggml_tensor * k,
                ggml_tensor * sinks,
                      float   kq_scale,
                        int   il) {
    const auto it = std::find_if(layers.begin(), layers.end(), [k](const layer & l) { return l.k == k->view_src; });

    if (it == layers.end()) {
        return sinks;
    }

    // other layers may reuse the cache of this one: its own queries score
    if (it->il == il && n_window > 0 && q->ne[2] == graph.ubatch.n_tokens) {
        it->kq_scale = kq_scale;

        build_observe(graph, *it, q);
    }

    update_index();

    return use_sinks && q->ne[1] == it->n_head ? build_sinks(graph, *it, sinks) : sinks;
}

uint32_t llama_csp::get_token(const layer & l, const cell_list & cells, uint32_t h, uint32_t i) const {
    return i < cells.n_chosen ? l.kept[h*stats.n_kept + i] : n_base + i - cells.n_chosen;
}

bool llama_csp::is_index_gone() const {
    const auto & cells = kv.v_cells[0];

    if (n_base == 0 || cells.get_used() == 0) {
        return true;
    }

    for (uint32_t i = 0; i < n_chosen; ++i) {
        if (cells.is_empty(i) || cells.pos_get(i) != pos_chosen) {
            return true;
        }
    }

    // without chosen cells the sequence begins after the evicted ones
    return n_chosen == 0 && cells.seq_pos_min(0) < pos_true();
}

void llama_csp::update_index() {
    if (!is_index_gone()) {
        return;
    }

    n_chosen   =  0;
    n_base     =  0;
    pos_chosen = -1;

    use_sinks = false;

    for (auto & l : layers) {
        l.mass_data.clear();
    }
}

llama_pos llama_csp::pos_true() const {
    // the parts of one picture can share a position
    return kv.hparams.n_pos_per_embd() > 1 ? pos_chosen : pos_chosen + 1;
}

void llama_csp::clear_inspection() {
    for (auto & l : layers) {
        l.token_data.clear();
        l.q_data    .clear();
        l.k_data    .clear();
        l.self_data .clear();
        l.cross_data.clear();
    }
}

void llama_csp::check(const llama_csp_params & params) {
    if (params.budget == 0) {
        throw std::invalid_argument("budget = 0: at least one cell has to stay");
    }
    if (params.recent > params.budget) {
        throw std::invalid_argument(format("recent = %u is larger than budget = %u", params.recent, params.budget));
    }
    if (!(params.cross_ratio <= 1.0)) {
        throw std::invalid_argument(format("cross_ratio = %g is above 1", params.cross_ratio));
    }
    if (!(params.n_score >= 0.0f) || std::isinf(params.n_score)) {
        throw std::invalid_argument(format("n_score = %g is not a finite number from 0 on", params.n_score));
    }
    if (params.sink < LLAMA_CSP_SINK_NONE || params.sink > LLAMA_CSP_SINK_MASS) {
        throw std::invalid_argument(format("sink = %d is not a llama_csp_sink", params.sink));
    }
    if (params.sink == LLAMA_CSP_SINK_FIXED && (!(params.n_decode > 0.0f) || std::isinf(params.n_decode))) {
        throw std::invalid_argument(format("n_decode = %g is not a finite number above 0", params.n_decode));
    }

    if (kv.get_has_shift()) {
        throw std::invalid_argument("positions were shifted since the last llama_decode()");
    }

    const llama_pos pos_max = kv.seq_pos_max(0);
    if (pos_max < 0) {
        throw std::invalid_argument("the cache is empty");
    }

    update_index();

    // queries of tokens that were taken back, and of those that were there when the cache was last pruned: in every
    // head another part of what they saw is gone
    take_back(pos_max + 1, {});

    if (n_base > 0) {
        drop_before(pos_true());
    }

    if (n_observed == 0) {
        throw std::invalid_argument("no query was observed: call llama_csp_observe() before decoding the prompt");
    }
    for (const auto & l : layers) {
        if (l.kq_scale == 0.0f) {
            throw std::invalid_argument(format("the attention of layer %d was not seen", l.il));
        }
    }
}

void llama_csp::prune(const llama_csp_params & params) {
    ctx.synchronize();
    reset_graphs();
    clear_inspection();

    const auto cells = get_cells();

    const uint32_t n_cells = cells.size();
    const uint32_t n_kept  = std::min(n_cells, params.budget);
    const uint32_t n_true  = std::min(params.recent, n_cells - n_chosen);

    int64_t t_score_us   = 0;
    int64_t t_select_us  = 0;

    std::vector<std::vector<uint32_t>> kept (layers.size()); // [n_head_kv][n_kept] indices into cells
    std::vector<std::vector<float>>    sinks(layers.size()); // [n_head]

    for (size_t il = 0; il < layers.size(); ++il) {
        auto & l = layers[il];

        kept[il].resize(size_t(l.n_head_kv)*n_kept);

        if (n_kept == n_cells && !params.inspect) {
            for (size_t i = 0; i < kept[il].size(); ++i) {
                kept[il][i] = i%n_cells;
            }
            continue;
        }

        const int64_t t_start_us = ggml_time_us();

        const auto scores = score(l, cells, params);

        const int64_t t_scored_us = ggml_time_us();

        for (uint32_t h = 0; h < l.n_head_kv; ++h) {
            const auto & cur = scores[h];

            llama_csp_select(cur.self.data(), cur.cross.data(), n_cells, params.budget, params.recent, params.cross_ratio, kept[il].data() + size_t(h)*n_kept);

            if (params.inspect) {
                l.self_data .insert(l.self_data .end(), cur.self .begin(), cur.self .end());
                l.cross_data.insert(l.cross_data.end(), cur.cross.begin(), cur.cross.end());
            }
        }

        const int64_t t_selected_us = ggml_time_us();

        if (n_kept < n_cells && params.sink == LLAMA_CSP_SINK_MASS) {
            sinks[il] = measure(l, cells, params.n_score, kept[il]);
        }

        t_score_us  += t_scored_us - t_start_us + ggml_time_us() - t_selected_us;
        t_select_us += t_selected_us - t_scored_us;
    }

    const int64_t t_start_us = ggml_time_us();

    if (n_kept < n_cells) {
        try {
            for (size_t il = 0; il < layers.size(); ++il) {
                compact(layers[il], cells, kept[il]);
            }
        } catch (...) {
            ctx.get_memory()->clear(false);
            update_index();

            throw;
        }
    }

    for (size_t il = 0; il < layers.size(); ++il) {
        auto & l = layers[il];

        // to tokens
        auto tokens = std::move(kept[il]);

        for (uint32_t h = 0; h < l.n_head_kv; ++h) {
            for (uint32_t i = 0; i < n_kept; ++i) {
                auto & cur = tokens[size_t(h)*n_kept + i];

                cur = get_token(l, cells, h, cur);
            }

            for (uint32_t i = 0; params.inspect && i < n_cells; ++i) {
                l.token_data.push_back(get_token(l, cells, h, i));
            }
        }

        l.kept = std::move(tokens);
    }

    // tokens from n_base on are known by their cells
    pos     .resize(n_base);
    modality.resize(n_base);

    for (uint32_t i = n_chosen; i < n_cells; ++i) {
        pos     .push_back(cells.pos[i]);
        modality.push_back(csp_modality(cells.ext[i]));
    }

    window_pos     .clear();
    window_modality.clear();

    for (const auto i : window_rows()) {
        window_pos     .push_back(window[i].pos);
        window_modality.push_back(window[i].modality);
    }

    stats.n_kept = n_kept;

    if (n_kept < n_cells) {
        set_cells(cells, n_kept, n_true);

        n_chosen   = n_kept - n_true;
        n_base     = pos.size() - n_true;
        pos_chosen = cells.pos[n_cells - n_true - 1];

        for (size_t il = 0; il < layers.size(); ++il) {
            set_sinks(layers[il], params, sinks[il]);
        }

        use_sinks = params.sink != LLAMA_CSP_SINK_NONE;
    }

    stats.n_layer  = layers.size();
    stats.n_cells  = n_cells;
    stats.n_tokens = pos.size();
    stats.n_window = n_observed;

    stats.pos      = pos.data();
    stats.modality = modality.data();

    stats.window_pos      = window_pos.data();
    stats.window_modality = window_modality.data();

    stats.t_score_us   = t_score_us;
    stats.t_select_us  = t_select_us;
    stats.t_compact_us = ggml_time_us() - t_start_us;
}

//
// interface
//

static thread_local std::string csp_last_error;

// run f, return false and keep the message if it throws
template<typename F>
static bool csp_try(F && f) {
    try {
        f();

        return true;
    } catch (const std::bad_alloc &) {
        csp_last_error = "not enough memory";
    } catch (const std::exception & e) {
        csp_last_error = e.what();
    }

    return false;
}

llama_csp_params llama_csp_default_params(void) {
    return {
        /*.budget      =*/ 0,
        /*.recent      =*/ 0,
        /*.cross_ratio =*/ -1.0,
        /*.n_score     =*/ 1.0f,
        /*.n_decode    =*/ 1.0f,
        /*.sink        =*/ LLAMA_CSP_SINK_NONE,
        /*.inspect     =*/ false,
    };
}

const char * llama_csp_last_error(void) {
    return csp_last_error.c_str();
}

llama_csp * llama_csp_init(llama_context * ctx) {
    llama_csp * res = nullptr;

    csp_try([&] { res = new llama_csp(*ctx); });

    return res;
}

void llama_csp_free(llama_csp * csp) {
    delete csp;
}

bool llama_csp_observe(llama_csp * csp, uint32_t n_window) {
    return csp_try([&] { csp->observe(n_window); });
}

bool llama_csp_prune(llama_csp * csp, llama_csp_params params) {
    if (!csp_try([&] { csp->check(params); })) {
        return false;
    }

    const bool res = csp_try([&] { csp->prune(params); });

    if (!res) {
        csp->clear_inspection();
    }

    // if this fails, the next llama_decode() plans its graph by itself
    const std::string error = csp_last_error;

    csp_try([&] { csp->reserve(); });

    csp_last_error = error;

    return res;
}

llama_csp_stats llama_csp_get_stats(const llama_csp * csp) {
    return csp->stats;
}

llama_csp_layer llama_csp_get_layer(const llama_csp * csp, uint32_t i) {
    GGML_ASSERT(i < csp->layers.size());

    const auto & l = csp->layers[i];

    const auto data = [](const auto & v) { return v.empty() ? nullptr : v.data(); };

    return {
        /*.il            =*/ l.il,
        /*.n_head        =*/ l.n_head,
        /*.n_head_kv     =*/ l.n_head_kv,
        /*.n_embd_head_k =*/ l.n_embd_head_k,
        /*.kq_scale      =*/ l.kq_scale,
        /*.kept          =*/ data(l.kept),
        /*.sink          =*/ csp->use_sinks ? data(l.sink_data) : nullptr,
        /*.token         =*/ data(l.token_data),
        /*.q             =*/ data(l.q_data),
        /*.k             =*/ data(l.k_data),
        /*.self          =*/ data(l.self_data),
        /*.cross         =*/ data(l.cross_data),
    };
}
