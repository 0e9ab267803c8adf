#pragma once

#include "llama.h"
#include "llama-csp-policy.h"

// Cross-Self Pruning (CSP, arXiv 2412.04652) of a context's KV cache
//
// usage:
//
//   llama_csp * csp = llama_csp_init(ctx);     // NULL: llama_csp_last_error() says why this context can't be pruned
//
//   llama_csp_observe(csp, 32);                // from now on keep the queries of the last 32 tokens
//   llama_decode(...);                         // prefill: text as tokens, pictures as embeddings
//
//   llama_csp_params params = llama_csp_default_params();
//   params.budget = 512;
//   llama_csp_prune(csp, params);              // the cache now holds 512 cells
//   llama_decode(...);                         // decoding goes on at the true next position
//
//   llama_csp_free(csp);                       // before llama_free(ctx)
//
// Cells: after pruning, cell i of a layer holds another token in every KV head. All chosen cells carry the position of
// the newest token that could have been evicted, the recent ones and so the last one their own, as long as every head
// keeps them. So a pruned part of a sequence can be kept, or dropped as a whole, but not cut: llama_memory_seq_rm() up
// to the recent cells is fine, and from further below drops every chosen cell. A token decoded there starts a new
// index. Shifting the positions of a pruned sequence is not supported.
//
// Budgets: a policy may keep differently many cells in every layer and head. The cache then has as many cells as the
// largest of them needs. In the others the rest is padding, which attention does not see: that saves no memory.

#ifdef __cplusplus
extern "C" {
#endif

    struct llama_csp;
    struct llama_csp_snapshot;

    // where the bytes of a snapshot go, and where they come from. returning false ends it
    typedef bool (*llama_csp_write)(const void * data, size_t size, void * user_data);
    typedef bool (*llama_csp_read) (      void * data, size_t size, void * user_data);

    enum llama_csp_modality {
        LLAMA_CSP_MODALITY_TEXT  = 0, // came in as a token
        LLAMA_CSP_MODALITY_MEDIA = 1, // came in as an embedding
    };

    // the extra term in the softmax denominator while decoding over a pruned cache (paper, section 3.3)
    enum llama_csp_sink {
        LLAMA_CSP_SINK_NONE  = 0, // plain softmax
        LLAMA_CSP_SINK_FIXED = 1, // n = n_decode
        LLAMA_CSP_SINK_MASS  = 2, // per query head: exp of the window's mean log-sum-exp of the evicted cells' logits
    };

    // the layers whose keys have to be fetched for the policy
    enum llama_csp_keys {
        LLAMA_CSP_KEYS_NONE  = 0,
        LLAMA_CSP_KEYS_MEDIA = 1, // those with cells of pictures
        LLAMA_CSP_KEYS_ALL   = 2,
    };

    struct llama_csp_params {
        uint32_t budget;   // B, cells that every KV head keeps, or on average, recent ones included
        uint32_t recent;   // R, the last cells, which policies always keep [R <= B]
        uint32_t window;   // W, the newest observed queries that score. 0: all
        uint32_t n_answer; // of them, the newest that answer already. 0: every query weighs as much
        float    answer;   // what these weigh together, of all scores, in [0, 1]. where there are others
        float    n_score;  // n of the scoring softmax [n >= 0]
        float    n_decode; // n for LLAMA_CSP_SINK_FIXED [n > 0]

        enum llama_csp_sink sink;
        enum llama_csp_keys keys;

        llama_csp_policy policy;          // see llama-csp-policies.h. NULL: llama_csp_policy_csp()
        const void *     policy_settings; // of the policy's own kind

        bool inspect; // keep queries, keys and scores for llama_csp_get_layer()
    };

    // what the last llama_csp_prune() saw and did. pointers stay valid until the next call that takes the csp
    struct llama_csp_stats {
        uint32_t n_layer;  // pruned layers: those with full attention and a KV cache of their own
        uint32_t n_cells;  // N, cells scored
        uint32_t n_kept;   // cells kept: of the head that keeps most
        uint32_t n_recent; // of them the last, with the same token in every head: what llama_memory_seq_rm() can take
        uint32_t n_tokens; // tokens of the sequence so far, evicted ones included
        uint32_t n_window; // W, queries that scored

        const llama_pos * pos;      // [n_tokens]
        const int8_t    * modality; // [n_tokens] llama_csp_modality

        const llama_pos * window_pos;      // [n_window]
        const int8_t    * window_modality; // [n_window]

        int64_t t_score_us;
        int64_t t_select_us;
        int64_t t_compact_us;
    };

    // one pruned layer. tokens are indices into llama_csp_stats.pos
    struct llama_csp_layer {
        int32_t  il; // layer index in the model
        uint32_t n_head;
        uint32_t n_head_kv;
        uint32_t n_embd_head_k;
        float    kq_scale;

        const uint32_t * n_kept; // [n_head_kv]
        const uint32_t * kept;   // [n_head_kv][stats.n_kept] the token in each cell, ascending: the first n_kept[h] of each row
        const float    * sink;   // [n_head] logits, NULL: none

        // NULL unless llama_csp_params.inspect. q and k as attention sees them: after RoPE, and of a quantized cache
        // after the rotation that spreads outliers. of every head's row the first n_cells[h]
        const uint32_t * n_cells; // [n_head_kv]
        const uint32_t * token;   // [n_head_kv][stats.n_cells] the token in each cell, before
        const float    * q;       // [n_window][n_head][n_embd_head_k]
        const float    * k;       // [n_head_kv][stats.n_cells][n_embd_head_k]
        const float    * self;    // [n_head_kv][stats.n_cells]
        const float    * cross;   // [n_head_kv][stats.n_cells]
    };

    LLAMA_API struct llama_csp_params llama_csp_default_params(void);

    // why the last call on this thread failed
    LLAMA_API const char * llama_csp_last_error(void);

    // a context whose cache begins with room for n_cells, one batch at least, and grows with llama_csp_resize() up to
    // params.n_ctx, which so is no more than a ceiling. for contexts that llama_csp_init() takes
    LLAMA_API struct llama_context * llama_csp_init_context(struct llama_model * model, struct llama_context_params params, uint32_t n_cells);

    // attach to a context of one sequence with flash attention. NULL if its memory can't be pruned:
    // recurrent, hybrid, MLA, ALiBi, or without a KV cache
    LLAMA_API struct llama_csp * llama_csp_init(struct llama_context * ctx);

    LLAMA_API void llama_csp_free(struct llama_csp * csp);

    // keep the queries of the last n_window tokens of what is decoded from now on. forgets those seen so far
    // 0: stop observing, the context computes what it would without a csp
    // returns false if there is no memory for them
    LLAMA_API bool llama_csp_observe(struct llama_csp * csp, uint32_t n_window);

    // ask before the pictures are there: decode the tokens of a question alone, each at the position that it is going to
    // have, and take them back. their queries are what prunes, whatever else is decoded, until llama_csp_observe() is
    // called again. pos: ascending, behind the sequence
    // returns false if they can't be decoded, the cache then is what it was
    LLAMA_API bool llama_csp_probe(struct llama_csp * csp, const llama_token * tokens, const llama_pos * pos, uint32_t n_tokens);

    // give the cache room for n_cells, rounded up to a multiple of 256, and the rest of its memory back. what is in it
    // stays as it is. layers move one by one, so at most one of them takes memory twice
    // returns false and changes nothing if it is less than what is in use, more than n_ctx, or there is no memory for it,
    // returns false and clears the sequence if that is so of the masks of heads with padding
    LLAMA_API bool llama_csp_resize(struct llama_csp * csp, uint32_t n_cells);

    // cells that there is room for
    LLAMA_API uint32_t llama_csp_n_cells(const struct llama_csp * csp);

    // score the cells by the observed queries, have the policy choose, compact. with B >= N nothing changes
    // returns false and changes nothing if params are off, nothing was observed, scoring failed or the choice is invalid,
    // returns false and clears the sequence if compaction failed halfway
    LLAMA_API bool llama_csp_prune(struct llama_csp * csp, struct llama_csp_params params);

    // from now on copy every cell that is evicted to the host, as this type: GGML_TYPE_F16, or any that rows can be
    // quantized to. for llama_csp_recall(). what a policy would merge is not merged, as nothing is lost
    // fd: -1: to its memory, else to this open file, which is ours from its beginning on. it is duplicated. POSIX only
    // returns false if something was evicted already, or the type or the file won't do
    LLAMA_API bool llama_csp_keep_evicted(struct llama_csp * csp, enum ggml_type type, int fd);

    // choose anew among all cells that the sequence ever had, evicted ones included, by the observed queries: those of
    // a new question, from llama_csp_probe()
    // a cache that has no room for them grows. returns false and changes nothing if it can't, else as llama_csp_prune()
    LLAMA_API bool llama_csp_recall(struct llama_csp * csp, struct llama_csp_params params);

    // the cache as it is, with the observed queries and all that is known of its pruned part
    // the caller frees it. NULL if there is no memory for it
    LLAMA_API struct llama_csp_snapshot * llama_csp_take_snapshot(struct llama_csp * csp);

    // bring all of that back. logits are not part of it
    // returns false and changes nothing if the snapshot is of another kind of context,
    // returns false and clears the sequence if there is no memory for it
    LLAMA_API bool llama_csp_restore(struct llama_csp * csp, const struct llama_csp_snapshot * snapshot);

    LLAMA_API void llama_csp_free_snapshot(struct llama_csp_snapshot * snapshot);

    // give the bytes of a snapshot to write, piece by piece
    // returns false if write does
    LLAMA_API bool llama_csp_write_snapshot(const struct llama_csp_snapshot * snapshot, llama_csp_write write, void * user_data);

    // a snapshot from such bytes, size of them, which are not trusted. the model and the types of its cache have to be
    // those it was taken with, the context may be another
    // the caller frees it. NULL if read fails, the bytes make no snapshot of this context, or there is no memory for it
    LLAMA_API struct llama_csp_snapshot * llama_csp_read_snapshot(const struct llama_csp * csp, llama_csp_read read, void * user_data, size_t size);

    LLAMA_API struct llama_csp_stats llama_csp_get_stats(const struct llama_csp * csp);

    // i < n_layer
    LLAMA_API struct llama_csp_layer llama_csp_get_layer(const struct llama_csp * csp, uint32_t i);

#ifdef __cplusplus
}
#endif
