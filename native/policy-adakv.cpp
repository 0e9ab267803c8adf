// Ada-KV (arXiv 2407.11550)

#include "policy-util.h"

#include <algorithm>
#include <cmath>
#include <iterator>

bool llama_csp_policy_adakv(const llama_csp_view * view, llama_csp_choice * choice, const void * settings) {
    const auto cfg = csp_settings<llama_csp_settings_adakv>(settings, { { 7, false }, 0.2 });

    if (!csp_is_valid(cfg.score) || !(cfg.safeguard >= 0.0 && cfg.safeguard <= 1.0)) {
        return false;
    }

    const uint32_t n_old = view->n_cells - view->recent;
    const uint32_t n     = view->budget  - view->recent;

    // no head stays empty
    const uint32_t n_least = std::max<uint32_t>(std::floor(n*cfg.safeguard), view->recent == 0);

    std::vector<double>   score; // [n_head_kv][n_old]
    std::vector<uint32_t> rest;  // indices into score

    std::vector<std::vector<uint32_t>> drawn(view->n_head_kv);

    for (uint32_t h = 0; h < view->n_head_kv; ++h) {
        const auto cur = csp_pool(csp_attention(*view, h), cfg.score);

        auto cand = csp_candidates(*view);

        drawn[h] = csp_draw(cand, n_least, cur);

        std::transform(cand.begin(), cand.end(), std::back_inserter(rest), [&](uint32_t i) { return h*n_old + i; });
        score.insert(score.end(), cur.begin(), cur.end());
    }

    for (const auto i : csp_draw(rest, view->n_head_kv*(n - n_least), score)) {
        drawn[i/n_old].push_back(i%n_old);
    }

    for (uint32_t h = 0; h < view->n_head_kv; ++h) {
        csp_keep(*view, choice, h, drawn[h]);
    }

    return true;
}
