#pragma once

#include "llama-csp.h"

#include "csp-rows.h"

#include "llama-graph.h"
#include "llama-kv-cache.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

//
// llama_csp
//
// observe -> score -> choose -> merge -> compact -> decode, one file each
// build_attn() is called by the patched llm_graph_context::build_attn_mha(), everything else from llama-csp.cpp
//

struct llama_csp {
    using bufs_t = std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>>;

    // what is known of the pruned part of the sequence, per layer
    struct layer_index {
        std::vector<uint32_t> n_chosen; // [n_head_kv] chosen cells, the rest up to index.n_chosen is padding
        std::vector<uint32_t> n_kept;   // [n_head_kv]
        std::vector<uint32_t> kept;     // [n_head_kv][index.n_kept] tokens

        std::vector<float> sink; // [n_head] logits in use
        std::vector<float> mass; // [n_head] logits measured so far
    };

    struct layer {
        int32_t  il;
        uint32_t n_head;
        uint32_t n_head_kv;
        uint32_t n_embd_head_k;
        uint32_t n_embd_head_v;

        ggml_tensor * k; // the cache [n_embd_k_gqa, kv_size]
        ggml_tensor * v; // the cache [n_embd_v_gqa, kv_size]

        ggml_tensor * q    = nullptr; // F32 [n_embd_head_k*n_head, n_window] ring of the newest queries
        ggml_tensor * sink = nullptr; // F32 [n_head]

        ggml_tensor * pad  = nullptr; // F32 [kv_size, n_head_kv] -INF where a head has padding

        float kq_scale = 0.0f; // 0: its attention did not pass build_attn()

        layer_index index;

        csp_rows archive_k; // [n_embd_k_gqa, index.n_base] all tokens that have no cell of their own
        csp_rows archive_v; // [n_embd_v_gqa, index.n_base]

        // of the last prune, if it was to be inspected
        std::vector<uint32_t> n_cells_data; // [n_head_kv]
        std::vector<uint32_t> token_data;   // [n_head_kv][n_cells]
        std::vector<float>    q_data;       // [n_window][n_head][n_embd_head_k]
        std::vector<float>    k_data;       // [n_head_kv][n_cells][n_embd_head_k]
        std::vector<float>    self_data;    // [n_head_kv][n_cells]
        std::vector<float>    cross_data;   // [n_head_kv][n_cells]
    };

    // an observed query
    struct query {
        llama_pos pos;
        llama_pos pos_max; // the newest position it sees: its own, or the last of its ubatch if attention is not causal

        llama_kv_cell_ext ext;

        bool   is_2d; // compare ext where positions are equal
        int8_t modality;
    };

    // the cells of the sequence, in order: first the chosen ones, in which every head holds another token
    struct cell_list {
        uint32_t n_chosen = 0;
        uint32_t n_base   = 0; // the token of the first one after them
        uint32_t n_true   = 0; // the last ones, of which all is known that the cache knows

        std::vector<uint32_t>          idxs; // [n_cells] in the KV cache, none of archived tokens
        std::vector<llama_pos>         pos;  // [n_cells]
        std::vector<llama_kv_cell_ext> ext;  // [n_cells]

        uint32_t size() const { return pos.size(); }
    };

    // the cells of one KV head, without padding
    struct head_cells {
        std::vector<uint32_t> cells;    // [n] indices into the cell_list
        std::vector<uint32_t> token;    // [n]
        std::vector<int8_t>   modality; // [n]

        // the attention they receive, summed over the window
        std::vector<float> self;  // [n]
        std::vector<float> cross; // [n]

        std::vector<float> k; // [n][n_embd_head_k] if asked for

        uint32_t size() const { return cells.size(); }
    };

    // what one KV head keeps, indices into the cell_list
    struct head_choice {
        std::vector<uint32_t> kept; // ascending

        std::vector<std::pair<uint32_t, uint32_t>> merged; // an evicted cell, and the kept one that it is merged into
    };

    // what is known of the pruned part of the sequence: layer_index.kept tells the tokens in cells [0, n_chosen) of the
    // cache, and the tokens from n_base on are in cells of their own
    struct seq_index {
        uint32_t  n_kept     =  0; // of the head that keeps most
        uint32_t  n_chosen   =  0;
        uint32_t  n_base     =  0;
        llama_pos pos_chosen = -1; // of the chosen cells

        bool use_sinks = false;
        bool is_ragged = false; // some heads have padding

        // all tokens of the sequence when it was last pruned
        std::vector<llama_pos> pos;
        std::vector<int8_t>    modality;

        // the queries that scored
        std::vector<llama_pos> window_pos;
        std::vector<int8_t>    window_modality;
    };

    // what a prune is going to do
    struct pruning {
        cell_list cells;

        std::vector<int32_t> rows; // of the ring: the queries that score

        std::vector<std::vector<head_choice>> choices; // [n_layer][n_head_kv]
        std::vector<std::vector<float>>       masses;  // [n_layer][n_head]

        uint32_t n_kept = 0; // of the head that keeps most
        uint32_t n_true = 0; // of them the last that all heads keep

        bool is_evicting = false;
        bool is_ragged   = false;

        int64_t t_score_us  = 0;
        int64_t t_select_us = 0;

        // count what one more head keeps of n_cells
        void add(const head_choice & choice, uint32_t n_cells);
    };

    // throws if the memory of the context can't be pruned
    llama_csp(llama_context & ctx);
    ~llama_csp();

    llama_context  & ctx;
    llama_kv_cache & kv;

    std::vector<layer> layers;

    //
    // csp-observe.cpp
    //

    void observe(uint32_t n_window_new);

    // from now on keep the queries that the ring has
    void hold();

    // write the newest queries of a ubatch to the ring
    void build_observe(const llm_graph_context & graph, layer & l, ggml_tensor * q);

    // remember whose queries they are, dst: the rows of the ring they go to, I64 [n]
    void set_input_rows(ggml_tensor * dst, const llama_ubatch & ubatch);

    // drop the queries from a position on, and those before one
    void take_back  (llama_pos p, const llama_kv_cell_ext & ext);
    void drop_before(llama_pos p);

    // the rows of the ring that hold the newest n queries, the oldest of them first
    std::vector<int32_t> window_rows(uint32_t n) const;

    uint32_t n_window   = 0; // rows of the ring
    uint32_t n_observed = 0; // rows in use
    uint32_t i_row      = 0; // the next row

    bool is_holding = false;

    std::vector<query> window; // [n_window]

    bufs_t bufs_q;

    //
    // csp-probe.cpp
    //

    // decode tokens at positions with gaps between them, keep their queries, take the tokens back
    void probe(const llama_token * tokens, const llama_pos * pos, uint32_t n_tokens);

    void jump(llama_pos pos);
    void decode_run(const llama_token * tokens, const llama_pos * pos, uint32_t n_tokens);

    bool is_probing = false;

    //
    // csp-score.cpp
    //

    // heads: [n_head_kv]
    void score(layer & l, const cell_list & cells, const std::vector<int32_t> & rows, const llama_csp_params & params, std::vector<head_cells> & heads);

    // log-sum-exp of the logits of the cells that are not kept, mean over the window, per query head
    std::vector<float> measure(
            const layer & l,
            const cell_list & cells,
            const std::vector<int32_t> & rows,
            const llama_csp_params & params,
            const std::vector<head_cells> & heads,
            const std::vector<head_choice> & choice);

    //
    // csp-choose.cpp
    //

    // whether the policy is to see the keys of a layer
    static bool needs_keys(const std::vector<head_cells> & heads, const llama_csp_params & params);

    // have the policy choose, returns [n_head_kv]. throws if it answers nonsense
    std::vector<head_choice> choose(uint32_t i_layer, const std::vector<head_cells> & heads, const llama_csp_params & params) const;

    //
    // csp-merge.cpp
    //

    // average evicted cells into kept ones, in K and V (LOOK-M, arXiv 2406.18139, section 3.3, pivotal merging)
    void merge(const layer & l, const cell_list & cells, const std::vector<head_choice> & choice);

    //
    // csp-compact.cpp
    //

    cell_list get_cells() const;

    // move the kept rows of every head to the front of the cache, the last n_true of them to the end of n_kept rows
    void compact(const layer & l, const cell_list & cells, const std::vector<head_choice> & choice, uint32_t n_kept, uint32_t n_true);

    // the first n_kept cells of the cache are in use now, the last n_true of them hold the same token in every head
    void set_cells(const cell_list & cells, uint32_t n_kept, uint32_t n_true);

    //
    // csp-sink.cpp
    //

    ggml_tensor * build_sinks(const llm_graph_context & graph, const layer & l, ggml_tensor * sinks) const;

    // mass: logits [n_head], for LLAMA_CSP_SINK_MASS
    void set_sinks(layer & l, const llama_csp_params & params, const std::vector<float> & mass);

    bufs_t bufs_sink;

    //
    // csp-mask.cpp
    //

    // attention in which no head sees its padding
    ggml_tensor * build_ragged_attn(
            const llm_graph_context & graph,
            const layer & l,
            ggml_tensor * q,
            ggml_tensor * k,
            ggml_tensor * v,
            ggml_tensor * kq_mask,
            ggml_tensor * sinks,
                  float   kq_scale) const;

    // throws if there is no memory for the masks
    void alloc_pad();

    void set_pad(layer & l);

    bufs_t bufs_pad;

    //
    // csp-recall.cpp
    //

    // from now on, copy what is evicted to the host. fd: of a file, -1: to its memory
    void keep_evicted(ggml_type type, int fd);

    // copy the cells that are not chosen, but for the last n_true
    void archive(const cell_list & cells, uint32_t n_true);
    void clear_archive();

    // all tokens of the sequence, as they were before any was evicted
    cell_list get_archived(const cell_list & cells) const;

    void recall(const llama_csp_params & params);

    bool is_archiving = false;

    //
    // csp-resize.cpp
    //

    // give the cache room for n_cells. throws and changes nothing if they don't fit
    void resize(uint32_t n_cells);

    // returns false if there is no memory for it
    bool resize_layer(llama_kv_cache & cache, size_t i, uint32_t n_cells);
    void resize_cache(llama_kv_cache & cache, uint32_t n_cells);
    void resize_swa();

    // plan the graphs of the context again, in buffers as small as they can be. where these don't fit, the next
    // llama_decode() says so
    void reserve();

    static void set_n_ctx(llama_context & ctx, uint32_t n_ctx);

    //
    // csp-snapshot.cpp
    //

    llama_csp_snapshot * take_snapshot();

    // throws if the snapshot does not fit
    void restore(const llama_csp_snapshot & snapshot);

    void set_snapshot(const llama_csp_snapshot & snapshot);

    // all caches of the context: a sliding window has its own
    std::vector<llama_kv_cache *> caches() const;

    //
    // csp-session.cpp
    //

    static void write_snapshot(const llama_csp_snapshot & snapshot, llama_csp_write write, void * user_data);

    // throws if there are no such bytes, or they would not do as a snapshot of this context
    llama_csp_snapshot * read_snapshot(llama_csp_read read, void * user_data, size_t size) const;

    //
    // llama-csp.cpp
    //

    // supplies the sinks to use
    // returns the output of the attention [n_embd_head_v*n_head, n_tokens] if it has to be built another way, or NULL
    ggml_tensor * build_attn(
            const llm_graph_context & graph,
                    ggml_tensor *  q,
                    ggml_tensor *  k,
                    ggml_tensor *  v,
                    ggml_tensor *  kq_mask,
                    ggml_tensor *& sinks,
                          float    kq_scale,
                            int    il);

    // throws if there is nothing to prune by, or the params are off
    void check(const llama_csp_params & params);

    // score and choose
    pruning plan(const cell_list & cells, const llama_csp_params & params);

    void prune(const llama_csp_params & params);

    // what is known once the cache was compacted
    void set_index(const pruning & plan, const llama_csp_params & params);
    void set_stats(const pruning & plan, int64_t t_compact_us);

    // the cells of the pruned part are no longer in the cache: forget it
    bool is_index_gone() const;
    void update_index();

    // clear the sequence, and what is known of it
    void forget();

    // the first position that a token of a true cell can have
    llama_pos pos_true() const;

    // [n_head_kv] without scores
    std::vector<head_cells> get_heads(const layer & l, const cell_list & cells) const;

    void inspect(layer & l, const cell_list & cells, const std::vector<head_cells> & heads);
    void clear_inspection();

    // the graphs that were built with another state of ours must not be reused
    void reset_graphs();

    seq_index index;

    llama_csp_stats stats = {};
};

// the cache and what we know of it, on the host
struct llama_csp_snapshot {
    struct cache {
        llama_kv_cells cells;
        uint32_t       head;

        ggml_type type_k;
        ggml_type type_v;

        std::vector<std::vector<uint8_t>> rows; // of the cells in use, K and V of every layer
    };

    std::vector<cache> caches;

    llama_csp::seq_index index;
    llama_csp_stats      stats;

    std::vector<llama_csp::layer_index> layers;

    std::vector<std::pair<csp_rows, csp_rows>> archives;

    const llama_model * model;

    // the observed queries
    uint32_t n_window;
    uint32_t n_observed;
    uint32_t i_row;
    bool     is_holding;

    std::vector<llama_csp::query>     window;
    std::vector<std::vector<uint8_t>> q;
    std::vector<float>                kq_scales;
};

// the logit of a sink that takes no attention. -inf would turn into NaN where two of them are compared
static constexpr float CSP_SINK_EMPTY = -1e30f;

// llama_kv_cache::get_n_kv() rounds up to 256: in a cache of any multiple of that the graphs are the same
inline uint32_t csp_pad_cells(uint32_t n_cells) {
    return std::max<uint32_t>(GGML_PAD(n_cells, 256), 256);
}

// a graph of ours on the scheduler of the context: build into ctx0 and gf, alloc(), set the inputs, compute(), read the outputs
struct csp_graph {
    csp_graph(llama_context & lctx);

    ggml_tensor * new_input(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2 = 1);

    void alloc();
    void compute();

    llama_context & lctx;

    ggml_context * ctx0;
    ggml_cgraph  * gf;
};

template<typename T>
T * csp_find_input(const llm_graph_context & graph) {
    for (auto & inp : graph.res->inputs) {
        if (auto * res = dynamic_cast<T *>(inp.get())) {
            return res;
        }
    }

    return nullptr;
}

// F32 [ne0(layer), ne1] for every layer, on its device. throws if there is no memory for them
llama_csp::bufs_t csp_alloc(
        std::vector<llama_csp::layer> & layers,
        ggml_tensor * llama_csp::layer::* member,
        int64_t (*ne0)(const llama_csp::layer &),
        int64_t ne1);

inline int8_t csp_modality(const llama_kv_cell_ext & ext) {
    return ext.tok == LLAMA_TOKEN_NULL ? LLAMA_CSP_MODALITY_MEDIA : LLAMA_CSP_MODALITY_TEXT;
}
