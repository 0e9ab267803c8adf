// uniformly random cells

#include "policy-util.h"

// the i-th output of splitmix64 (Steele, Lea, Flood 2014) from a seed on
static uint64_t csp_splitmix64(uint64_t seed, uint64_t i) {
    uint64_t z = seed + (i + 1)*0x9e3779b97f4a7c15;

    z = (z ^ (z >> 30))*0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27))*0x94d049bb133111eb;

    return z ^ (z >> 31);
}

bool llama_csp_policy_random(const llama_csp_view * view, llama_csp_choice * choice, const void * settings) {
    const auto cfg = csp_settings<llama_csp_settings_random>(settings, { 0 });

    for (uint32_t h = 0; h < view->n_head_kv; ++h) {
        const uint64_t first = (uint64_t(view->i_layer)*view->n_head_kv + h)*view->n_cells;

        auto cand = csp_candidates(*view);

        std::vector<double> score(cand.size());

        for (const auto i : cand) {
            score[i] = csp_splitmix64(cfg.seed, first + i) >> 11; // what a double holds
        }

        csp_keep(*view, choice, h, csp_draw(cand, view->budget - view->recent, score));
    }

    return true;
}
