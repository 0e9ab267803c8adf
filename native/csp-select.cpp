// selection: scores -> kept cells, on the host, without ggml

#include "llama-csp.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

// a NaN would break the strict weak ordering that nth_element needs
static float csp_score(float x) {
    return std::isnan(x) ? -INFINITY : x;
}

// move the n best candidates to the front
static void csp_draw(std::vector<uint32_t> & cand, uint32_t n, const float * score) {
    const auto better = [score](uint32_t a, uint32_t b) {
        const float sa = csp_score(score[a]);
        const float sb = csp_score(score[b]);

        return sa > sb || (sa == sb && a < b);
    };

    if (n < cand.size()) {
        std::nth_element(cand.begin(), cand.begin() + n, cand.end(), better);
    }
}

// the automatic r of one head: the cross share of the scores of the cells to choose from
static double csp_cross_ratio(const float * self, const float * cross, uint32_t n, uint32_t recent) {
    double sum_self  = 0.0;
    double sum_cross = 0.0;

    for (uint32_t i = 0; i + recent < n; ++i) {
        sum_self  += self [i];
        sum_cross += cross[i];
    }

    const double sum = sum_self + sum_cross;

    return std::isfinite(sum) && sum > 0.0 ? std::clamp(sum_cross/sum, 0.0, 1.0) : 0.0;
}

uint32_t llama_csp_select(
            const float * self,
            const float * cross,
               uint32_t   n,
               uint32_t   budget,
               uint32_t   recent,
                 double   cross_ratio,
               uint32_t * kept) {
    budget = std::min(budget, n);
    recent = std::min(recent, budget);

    const uint32_t n_draw = budget - recent;

    if (!(cross_ratio >= 0.0)) {
        cross_ratio = csp_cross_ratio(self, cross, n, recent);
    }

    const uint32_t n_cross = std::floor(n_draw*std::min(cross_ratio, 1.0));

    std::vector<uint32_t> cand(n - recent);
    std::iota(cand.begin(), cand.end(), 0);

    csp_draw(cand, n_cross, cross);

    std::copy(cand.begin(), cand.begin() + n_cross, kept);
    cand.erase(cand.begin(), cand.begin() + n_cross);

    csp_draw(cand, n_draw - n_cross, self);

    std::copy(cand.begin(), cand.begin() + (n_draw - n_cross), kept + n_cross);
    std::iota(kept + n_draw, kept + budget, n - recent);

    std::sort(kept, kept + n_draw);

    return budget;
}
