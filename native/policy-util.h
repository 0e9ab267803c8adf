#pragma once

#include "llama-csp-policies.h"

#include <functional>
#include <vector>

// what several policies do: on the host, without ggml

// the settings given, or the defaults
template<typename T>
T csp_settings(const void * settings, const T & defaults) {
    return settings ? *static_cast<const T *>(settings) : defaults;
}

// f(h) for every head, on the threads there are
void csp_for_heads(const llama_csp_view & view, const std::function<void(uint32_t)> & f);

// the cells to choose from: all but the recent ones
std::vector<uint32_t> csp_candidates(const llama_csp_view & view);

// take the n best out of the candidates: the highest score, ties to the lower index, NaN last
std::vector<uint32_t> csp_draw(std::vector<uint32_t> & cand, uint32_t n, const std::vector<double> & score);

// head h keeps what was drawn, and the recent cells
void csp_keep(const llama_csp_view & view, llama_csp_choice * choice, uint32_t h, std::vector<uint32_t> drawn);

// window attention of the candidates. NaN counts as none
std::vector<double> csp_attention(const llama_csp_view & view, uint32_t h);

bool csp_is_valid(const llama_csp_settings_snapkv & cfg);

std::vector<double> csp_pool(const std::vector<double> & score, const llama_csp_settings_snapkv & cfg);

// the keys of one head. those added are laid out so that a key is compared with many of them at once
struct csp_keys {
    struct neighbor {
        uint32_t i;
        double   cosine; // 0 where a key is
    };

    csp_keys(const llama_csp_view & view, uint32_t h);

    void add(uint32_t i);

    // of the added keys behind the first n_seen, the nearest to that of cell i among the next few. moves n_seen behind these
    neighbor nearest(uint32_t i, uint32_t & n_seen) const;

    const float * data; // [n_cells][n_embd]

    const uint32_t n_embd;

    std::vector<double> norm; // [n_cells]

    std::vector<uint32_t> added;
    std::vector<float>    blocks; // [added.size()/N_BLOCK, rounded up][n_embd][N_BLOCK]
};
