#include "csp.h"

#include "llama-csp-policies.h"

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

ggml_tensor * csp_graph::new_input(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2) {
    ggml_tensor * res = ggml_new_tensor_3d(ctx0, type, ne0, ne1, ne2);

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
            throw std::runtime_error("no memory for the queries, sinks and masks of the layers");
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

    resize_swa();

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

// has the graph built anew, without our sinks and masks, once the sequence is gone for which they stood
class llm_graph_input_csp_index : public llm_graph_input_i {
public:
    llm_graph_input_csp_index(const llama_csp * csp) : csp(csp) {}
    virtual ~llm_graph_input_csp_index() = default;

    void set_input(const llama_ubatch * ubatch) override {
        GGML_UNUSED(ubatch);
    }

    bool can_reuse(const llm_graph_params & params) override {
        GGML_UNUSED(params);

        return !csp->is_index_gone();
    }

    const llama_csp * csp;
};

ggml_tensor * llama_csp::build_attn(
        const llm_graph_context & graph,
                ggml_tensor *  q,
                ggml_tensor *  k,
                ggml_tensor *  v,
                ggml_tensor *  kq_mask,
                ggml_tensor *& sinks,
                      float    kq_scale,
                        int    il) {
    const auto it = std::find_if(layers.begin(), layers.end(), [k](const layer & l) { return l.k == k->view_src; });

    if (it == layers.end()) {
        return nullptr;
    }

    // other layers may reuse the cache of this one: its own queries score
    if (it->il == il && n_window > 0 && !is_holding && q->ne[2] == graph.ubatch.n_tokens) {
        it->kq_scale = kq_scale;

        build_observe(graph, *it, q);
    }

    update_index();

    if ((index.use_sinks || index.is_ragged) && !csp_find_input<llm_graph_input_csp_index>(graph)) {
        graph.res->add_input(std::make_unique<llm_graph_input_csp_index>(this));
    }

    if (index.use_sinks && q->ne[1] == it->n_head) {
        sinks = build_sinks(graph, *it, sinks);
    }

    return index.is_ragged ? build_ragged_attn(graph, *it, q, k, v, kq_mask, sinks, kq_scale) : nullptr;
}

bool llama_csp::is_index_gone() const {
    if (is_probing) {
        return false;
    }

    const auto & cells = kv.v_cells[0];

    if (index.n_base == 0 || cells.get_used() == 0) {
        return true;
    }

    for (uint32_t i = 0; i < index.n_chosen; ++i) {
        if (cells.is_empty(i) || cells.pos_get(i) != index.pos_chosen) {
            return true;
        }
    }

    // without chosen cells the sequence begins after the evicted ones
    return index.n_chosen == 0 && cells.seq_pos_min(0) < pos_true();
}

void llama_csp::update_index() {
    if (!is_index_gone()) {
        return;
    }

    index.n_chosen   =  0;
    index.n_base     =  0;
    index.pos_chosen = -1;

    index.use_sinks = false;
    index.is_ragged = false;

    for (auto & l : layers) {
        l.index.mass.clear();
    }

    clear_archive();
}

void llama_csp::forget() {
    ctx.get_memory()->clear(false);
    update_index();
}

llama_pos llama_csp::pos_true() const {
    // the parts of one picture can share a position
    return kv.hparams.n_pos_per_embd() > 1 ? index.pos_chosen : index.pos_chosen + 1;
}

std::vector<llama_csp::head_cells> llama_csp::get_heads(const layer & l, const cell_list & cells) const {
    std::vector<head_cells> res(l.n_head_kv);

    for (uint32_t h = 0; h < l.n_head_kv; ++h) {
        for (uint32_t i = 0; i < cells.size(); ++i) {
            if (i >= cells.n_chosen) {
                res[h].token   .push_back(cells.n_base + i - cells.n_chosen);
                res[h].modality.push_back(csp_modality(cells.ext[i]));
            } else if (i < l.index.n_chosen[h]) {
                res[h].token   .push_back(l.index.kept[size_t(h)*index.n_kept + i]);
                res[h].modality.push_back(index.modality[res[h].token.back()]);
            } else {
                continue;
            }

            res[h].cells.push_back(i);
        }
    }

    return res;
}

template<typename T>
static void csp_append(std::vector<T> & dst, const std::vector<T> & row, size_t n) {
    dst.insert(dst.end(), row.begin(), row.end());
    dst.resize(dst.size() + n - row.size());
}

void llama_csp::inspect(layer & l, const cell_list & cells, const std::vector<head_cells> & heads) {
    for (const auto & head : heads) {
        l.n_cells_data.push_back(head.size());

        csp_append(l.token_data, head.token, cells.size());
        csp_append(l.self_data,  head.self,  cells.size());
        csp_append(l.cross_data, head.cross, cells.size());
        csp_append(l.k_data,     head.k,     size_t(cells.size())*l.n_embd_head_k);
    }
}

void llama_csp::clear_inspection() {
    for (auto & l : layers) {
        l.n_cells_data.clear();
        l.token_data  .clear();
        l.q_data      .clear();
        l.k_data      .clear();
        l.self_data   .clear();
        l.cross_data  .clear();
    }
}

void llama_csp::check(const llama_csp_params & params) {
    if (params.budget == 0) {
        throw std::invalid_argument("budget = 0: at least one cell has to stay");
    }
    if (params.recent > params.budget) {
        throw std::invalid_argument(format("recent = %u is larger than budget = %u", params.recent, params.budget));
    }
    if (!(params.n_score >= 0.0f) || std::isinf(params.n_score)) {
        throw std::invalid_argument(format("n_score = %g is not a finite number from 0 on", params.n_score));
    }
    if (!(params.answer >= 0.0f && params.answer <= 1.0f)) {
        throw std::invalid_argument(format("answer = %g is not a number from 0 to 1", params.answer));
    }
    if (params.sink < LLAMA_CSP_SINK_NONE || params.sink > LLAMA_CSP_SINK_MASS) {
        throw std::invalid_argument(format("sink = %d is not a llama_csp_sink", params.sink));
    }
    if (params.sink == LLAMA_CSP_SINK_FIXED && (!(params.n_decode > 0.0f) || std::isinf(params.n_decode))) {
        throw std::invalid_argument(format("n_decode = %g is not a finite number above 0", params.n_decode));
    }
    if (params.keys < LLAMA_CSP_KEYS_NONE || params.keys > LLAMA_CSP_KEYS_ALL) {
        throw std::invalid_argument(format("keys = %d is not a llama_csp_keys", params.keys));
    }

    if (kv.get_has_shift()) {
        throw std::invalid_argument("positions were shifted since the last llama_decode()");
    }

    const llama_pos pos_max = kv.seq_pos_max(0);
    if (pos_max < 0) {
        throw std::invalid_argument("the cache is empty");
    }

    update_index();

    // queries of tokens that were taken back
    if (!is_holding) {
        take_back(pos_max + 1, {});
    }

    // and of those that were there when the cache was last pruned: in every head another part of what they saw is gone,
    // unless it is kept
    if (index.n_base > 0 && !is_archiving) {
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

llama_csp::pruning llama_csp::plan(const cell_list & cells, const llama_csp_params & params) {
    pruning res;

    res.cells  = cells;
    res.rows   = window_rows(params.window > 0 ? std::min(params.window, n_observed) : n_observed);
    res.n_true = std::min(params.recent, cells.n_true);

    const uint32_t n_cells = cells.size();

    for (size_t il = 0; il < layers.size(); ++il) {
        auto & l = layers[il];

        auto heads = get_heads(l, cells);

        const bool is_within = std::all_of(heads.begin(), heads.end(), [&](const head_cells & head) { return head.size() <= params.budget; });

        const int64_t t_start_us = ggml_time_us();

        if (!is_within || params.inspect) {
            score(l, cells, res.rows, params, heads);
        }
        if (params.inspect) {
            inspect(l, cells, heads);
        }

        const int64_t t_scored_us = ggml_time_us();

        const auto & choice = res.choices.emplace_back(choose(il, heads, params));

        const int64_t t_selected_us = ggml_time_us();

        if (!is_within && params.sink == LLAMA_CSP_SINK_MASS) {
            res.masses.push_back(measure(l, cells, res.rows, params, heads, choice));
        } else {
            res.masses.emplace_back(l.n_head, CSP_SINK_EMPTY);
        }

        res.t_score_us  += t_scored_us - t_start_us + ggml_time_us() - t_selected_us;
        res.t_select_us += t_selected_us - t_scored_us;

        for (uint32_t h = 0; h < l.n_head_kv; ++h) {
            res.is_evicting = res.is_evicting || choice[h].kept.size() < heads[h].size();

            res.add(choice[h], n_cells);
        }
    }

    return res;
}

void llama_csp::pruning::add(const head_choice & choice, uint32_t n_cells) {
    const auto & kept = choice.kept;

    n_kept    = std::max<uint32_t>(n_kept, kept.size());
    is_ragged = is_ragged || kept.size() != choices[0][0].kept.size();

    uint32_t n_last = 0;
    while (n_last < std::min<uint32_t>(n_true, kept.size()) && kept[kept.size() - n_last - 1] == n_cells - n_last - 1) {
        n_last++;
    }

    n_true = n_last;
}

void llama_csp::prune(const llama_csp_params & params) {
    ctx.synchronize();
    reset_graphs();
    clear_inspection();

    const auto cur = plan(get_cells(), params);

    const int64_t t_start_us = ggml_time_us();

    if (cur.is_evicting) {
        if (cur.is_ragged) {
            alloc_pad();
        }

        archive(cur.cells, cur.n_true);
    }

    try {
        for (size_t il = 0; cur.is_evicting && il < layers.size(); ++il) {
            if (!is_archiving) {
                merge(layers[il], cur.cells, cur.choices[il]);
            }
            compact(layers[il], cur.cells, cur.choices[il], cur.n_kept, cur.n_true);
        }

        set_index(cur, params);
    } catch (...) {
        forget();

        throw;
    }

    set_stats(cur, ggml_time_us() - t_start_us);
}

void llama_csp::set_stats(const pruning & plan, int64_t t_compact_us) {
    stats = {
        /*.n_layer         =*/ (uint32_t) layers.size(),
        /*.n_cells         =*/ plan.cells.size(),
        /*.n_kept          =*/ plan.n_kept,
        /*.n_recent        =*/ plan.is_evicting ? plan.n_true : plan.cells.size() - plan.cells.n_chosen,
        /*.n_tokens        =*/ (uint32_t) index.pos.size(),
        /*.n_window        =*/ (uint32_t) plan.rows.size(),
        /*.pos             =*/ nullptr,
        /*.modality        =*/ nullptr,
        /*.window_pos      =*/ nullptr,
        /*.window_modality =*/ nullptr,
        /*.t_score_us      =*/ plan.t_score_us,
        /*.t_select_us     =*/ plan.t_select_us,
        /*.t_compact_us    =*/ t_compact_us,
    };
}

void llama_csp::set_index(const pruning & plan, const llama_csp_params & params) {
    const auto & cells = plan.cells;

    for (size_t il = 0; il < layers.size(); ++il) {
        auto & l = layers[il];

        std::vector<uint32_t> tokens;

        for (uint32_t h = 0; h < l.n_head_kv; ++h) {
            for (const auto i : plan.choices[il][h].kept) {
                tokens.push_back(i < cells.n_chosen ? l.index.kept[size_t(h)*index.n_kept + i] : cells.n_base + i - cells.n_chosen);
            }

            tokens.resize(size_t(h + 1)*plan.n_kept);
        }

        l.index.kept = std::move(tokens);

        l.index.n_kept.clear();
        for (const auto & cur : plan.choices[il]) {
            l.index.n_kept.push_back(cur.kept.size());
        }
    }

    index.n_kept = plan.n_kept;

    // tokens from n_base on are known by their cells
    index.pos     .resize(cells.n_base);
    index.modality.resize(cells.n_base);

    for (uint32_t i = cells.n_chosen; i < cells.size(); ++i) {
        index.pos     .push_back(cells.pos[i]);
        index.modality.push_back(csp_modality(cells.ext[i]));
    }

    index.window_pos     .clear();
    index.window_modality.clear();

    for (const auto i : plan.rows) {
        index.window_pos     .push_back(window[i].pos);
        index.window_modality.push_back(window[i].modality);
    }

    if (!plan.is_evicting) {
        return;
    }

    set_cells(cells, plan.n_kept, plan.n_true);

    index.n_chosen   = plan.n_kept - plan.n_true;
    index.n_base     = index.pos.size() - plan.n_true;
    index.pos_chosen = cells.pos[cells.size() - plan.n_true - 1];

    index.use_sinks = params.sink != LLAMA_CSP_SINK_NONE;
    index.is_ragged = plan.is_ragged;

    for (size_t il = 0; il < layers.size(); ++il) {
        auto & l = layers[il];

        l.index.n_chosen.clear();
        for (const auto & cur : plan.choices[il]) {
            l.index.n_chosen.push_back(cur.kept.size() - plan.n_true);
        }

        if (index.is_ragged) {
            set_pad(l);
        }

        set_sinks(l, params, plan.masses[il]);
    }
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
        /*.budget          =*/ 0,
        /*.recent          =*/ 0,
        /*.window          =*/ 0,
        /*.n_answer        =*/ 0,
        /*.answer          =*/ 0.0f,
        /*.n_score         =*/ 1.0f,
        /*.n_decode        =*/ 1.0f,
        /*.sink            =*/ LLAMA_CSP_SINK_NONE,
        /*.keys            =*/ LLAMA_CSP_KEYS_NONE,
        /*.policy          =*/ nullptr,
        /*.policy_settings =*/ nullptr,
        /*.inspect         =*/ false,
    };
}

const char * llama_csp_last_error(void) {
    return csp_last_error.c_str();
}

llama_context * llama_csp_init_context(llama_model * model, llama_context_params params, uint32_t n_cells) {
    const uint32_t n_ctx = csp_pad_cells(params.n_ctx > 0 ? params.n_ctx : llama_model_n_ctx_train(model));

    // batches are cut to the size of the cache
    params.n_ctx = std::min(n_ctx, csp_pad_cells(std::max(n_cells, params.n_batch)));

    llama_context * res = llama_init_from_model(model, params);

    if (res) {
        llama_csp::set_n_ctx(*res, n_ctx);
    }

    return res;
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

bool llama_csp_probe(llama_csp * csp, const llama_token * tokens, const llama_pos * pos, uint32_t n_tokens) {
    return csp_try([&] { csp->probe(tokens, pos, n_tokens); });
}

bool llama_csp_resize(llama_csp * csp, uint32_t n_cells) {
    return csp_try([&] { csp->resize(n_cells); });
}

uint32_t llama_csp_n_cells(const llama_csp * csp) {
    return csp->kv.get_size();
}

static bool csp_change(llama_csp * csp, llama_csp_params & params, void (llama_csp::*change)(const llama_csp_params &)) {
    if (!params.policy) {
        params.policy = llama_csp_policy_csp;
    }

    if (!csp_try([&] { csp->check(params); })) {
        return false;
    }

    const bool res = csp_try([&] { (csp->*change)(params); });

    if (!res) {
        csp->clear_inspection();
    }

    return res;
}

bool llama_csp_prune(llama_csp * csp, llama_csp_params params) {
    const bool res = csp_change(csp, params, &llama_csp::prune);

    // if this fails, the next llama_decode() plans its graph by itself
    const std::string error = csp_last_error;

    csp_try([&] { csp->reserve(); });

    csp_last_error = error;

    return res;
}

bool llama_csp_keep_evicted(llama_csp * csp, ggml_type type, int fd) {
    return csp_try([&] { csp->keep_evicted(type, fd); });
}

bool llama_csp_recall(llama_csp * csp, llama_csp_params params) {
    return csp_change(csp, params, &llama_csp::recall);
}

llama_csp_snapshot * llama_csp_take_snapshot(llama_csp * csp) {
    llama_csp_snapshot * res = nullptr;

    csp_try([&] { res = csp->take_snapshot(); });

    return res;
}

bool llama_csp_restore(llama_csp * csp, const llama_csp_snapshot * snapshot) {
    return csp_try([&] { csp->restore(*snapshot); });
}

void llama_csp_free_snapshot(llama_csp_snapshot * snapshot) {
    delete snapshot;
}

bool llama_csp_write_snapshot(const llama_csp_snapshot * snapshot, llama_csp_write write, void * user_data) {
    return csp_try([&] { llama_csp::write_snapshot(*snapshot, write, user_data); });
}

llama_csp_snapshot * llama_csp_read_snapshot(const llama_csp * csp, llama_csp_read read, void * user_data, size_t size) {
    llama_csp_snapshot * res = nullptr;

    csp_try([&] { res = csp->read_snapshot(read, user_data, size); });

    return res;
}

llama_csp_stats llama_csp_get_stats(const llama_csp * csp) {
    llama_csp_stats res = csp->stats;

    res.pos      = csp->index.pos.data();
    res.modality = csp->index.modality.data();

    res.window_pos      = csp->index.window_pos.data();
    res.window_modality = csp->index.window_modality.data();

    return res;
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
        /*.n_kept        =*/ data(l.index.n_kept),
        /*.kept          =*/ data(l.index.kept),
        /*.sink          =*/ csp->index.use_sinks ? data(l.index.sink) : nullptr,
        /*.n_cells       =*/ data(l.n_cells_data),
        /*.token         =*/ data(l.token_data),
        /*.q             =*/ data(l.q_data),
        /*.k             =*/ data(l.k_data),
        /*.self          =*/ data(l.self_data),
        /*.cross         =*/ data(l.cross_data),
    };
}
