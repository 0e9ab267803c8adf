#pragma once

#include <stdbool.h>
#include <stdint.h>

// A policy: which cells every KV head of a layer keeps. A pure function of what it is shown, called once per layer.
// Where heads hold differently many cells, after an earlier choice, it is called for those with equally many

#ifdef __cplusplus
extern "C" {
#endif

    // one layer as a policy sees it
    struct llama_csp_view {
        uint32_t i_layer; // among the pruned layers
        uint32_t n_layer;
        uint32_t n_head_kv;
        uint32_t n_embd_head_k;
        uint32_t n_cells; // N
        uint32_t budget;  // B, 1 <= B < N
        uint32_t recent;  // R <= B

        uint32_t n_threads; // that a policy may run on

        const uint32_t * token;    // [n_head_kv][n_cells] the token in each cell, ascending
        const int8_t   * modality; // [n_head_kv][n_cells] llama_csp_modality
        const float    * self;     // [n_head_kv][n_cells] attention from window queries of the cell's own modality, summed
        const float    * cross;    // [n_head_kv][n_cells] from those of another
        const float    * k;        // [n_head_kv][n_cells][n_embd_head_k] after RoPE, NULL unless asked for
    };

    // what it answers
    struct llama_csp_choice {
        uint32_t * n_kept; // [n_head_kv] at least 1, at most n_cells
        uint32_t * kept;   // [n_head_kv][n_cells] the first n_kept[h] of each row: kept cells, ascending
        uint32_t * merge;  // [n_head_kv][n_cells] the kept cell that an evicted one is merged into
                           // LLAMA_CSP_NO_MERGE, as it comes in: none, the cell is dropped
    };

#define LLAMA_CSP_NO_MERGE UINT32_MAX

    // settings: of the policy's own kind
    // returns false if there is nothing to choose by
    typedef bool (*llama_csp_policy)(const struct llama_csp_view * view, struct llama_csp_choice * choice, const void * settings);

#ifdef __cplusplus
}
#endif
