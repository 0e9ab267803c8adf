#pragma once

#include "llama-csp-policies.h"

#include <vector>

// what several policies do: on the host, without ggml

// the settings given, or the defaults
template<typename T>
T csp_settings(const void * settings, const T & defaults) {
    return settings ? *static_cast<const T *>(settings) : defaults;
}

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

// the keys of one head
struct csp_keys {
    csp_keys(const llama_csp_view & view, uint32_t h);

    // 0 where a key is
    double cosine(uint32_t i, uint32_t j) const;

    const float * data; // [n_cells][n_embd]

    const uint32_t n_embd;

    std::vector<double> norm; // [n_cells]
};
