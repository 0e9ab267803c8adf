// SnapKV (arXiv 2404.14469)

#include "policy-util.h"

bool llama_csp_policy_snapkv(const llama_csp_view * view, llama_csp_choice * choice, const void * settings) {
    const auto cfg = csp_settings<llama_csp_settings_snapkv>(settings, { 7, false });

    if (!csp_is_valid(cfg)) {
        return false;
    }

    for (uint32_t h = 0; h < view->n_head_kv; ++h) {
        auto cand = csp_candidates(*view);

        csp_keep(*view, choice, h, csp_draw(cand, view->budget - view->recent, csp_pool(csp_attention(*view, h), cfg)));
    }

    return true;
}
