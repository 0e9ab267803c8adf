// StreamingLLM (arXiv 2309.17453)

#include "policy-util.h"

#include <algorithm>

bool llama_csp_policy_streaming(const llama_csp_view * view, llama_csp_choice * choice, const void * settings) {
    const auto cfg = csp_settings<llama_csp_settings_streaming>(settings, { 4 });

    const uint32_t n      = view->budget - view->recent;
    const uint32_t n_sink = std::min(cfg.n_sink, n);

    const auto cand = csp_candidates(*view);

    std::vector<uint32_t> drawn(cand.begin(), cand.begin() + n_sink);
    drawn.insert(drawn.end(), cand.end() - (n - n_sink), cand.end());

    for (uint32_t h = 0; h < view->n_head_kv; ++h) {
        csp_keep(*view, choice, h, drawn);
    }

    return true;
}
