// H2O (arXiv 2306.14048)

#include "policy-util.h"

bool llama_csp_policy_h2o(const llama_csp_view * view, llama_csp_choice * choice, const void *) {
    for (uint32_t h = 0; h < view->n_head_kv; ++h) {
        auto cand = csp_candidates(*view);

        csp_keep(*view, choice, h, csp_draw(cand, view->budget - view->recent, csp_attention(*view, h)));
    }

    return true;
}
