// PyramidKV (arXiv 2406.02069)

#include "policy-util.h"

#include <algorithm>
#include <cmath>

// the cells that a layer draws: k on average, k/beta in the last layer, falling linearly. the sum is exact, as the layers
// from the first on round up what those from the last on round down
static uint32_t csp_layer_budget(int64_t k, int64_t n_max, double beta, int64_t i_layer, int64_t n_layer) {
    if (k == 0 || n_layer == 1) {
        return k;
    }

    const int64_t k_first = std::min(2*k - std::max<int64_t>(k/beta, 1), n_max);
    const int64_t k_last  = 2*k - k_first;

    const int64_t n    = n_layer - 1;
    const int64_t diff = k_first - k_last;

    return 2*i_layer < n ? k_first - diff*i_layer/n : k_last + diff*(n - i_layer)/n;
}

bool llama_csp_policy_pyramid(const llama_csp_view * view, llama_csp_choice * choice, const void * settings) {
    const auto cfg = csp_settings<llama_csp_settings_pyramid>(settings, { { 7, false }, 20.0 });

    if (!csp_is_valid(cfg.score) || !(cfg.beta >= 1.0)) {
        return false;
    }

    const uint32_t n_old = view->n_cells - view->recent;
    const uint32_t n     = csp_layer_budget(view->budget - view->recent, n_old, cfg.beta, view->i_layer, view->n_layer);

    for (uint32_t h = 0; h < view->n_head_kv; ++h) {
        auto cand = csp_candidates(*view);

        csp_keep(*view, choice, h, csp_draw(cand, n, csp_pool(csp_attention(*view, h), cfg.score)));
    }

    return true;
}
