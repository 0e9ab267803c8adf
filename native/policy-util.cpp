#include "policy-util.h"

#include <algorithm>
#include <cmath>
#include <numeric>

std::vector<uint32_t> csp_candidates(const llama_csp_view & view) {
    std::vector<uint32_t> res(view.n_cells - view.recent);
    std::iota(res.begin(), res.end(), 0);

    return res;
}

// a NaN would break the strict weak ordering that nth_element needs
static double csp_order(double x) {
    return std::isnan(x) ? -HUGE_VAL : x;
}

std::vector<uint32_t> csp_draw(std::vector<uint32_t> & cand, uint32_t n, const std::vector<double> & score) {
    const auto better = [&score](uint32_t a, uint32_t b) {
        const double sa = csp_order(score[a]);
        const double sb = csp_order(score[b]);

        return sa > sb || (sa == sb && a < b);
    };

    if (n < cand.size()) {
        std::nth_element(cand.begin(), cand.begin() + n, cand.end(), better);
    }

    std::vector<uint32_t> res(cand.begin(), cand.begin() + n);
    cand.erase(cand.begin(), cand.begin() + n);

    return res;
}

void csp_keep(const llama_csp_view & view, llama_csp_choice * choice, uint32_t h, std::vector<uint32_t> drawn) {
    std::sort(drawn.begin(), drawn.end());

    uint32_t * kept = choice->kept + size_t(h)*view.n_cells;

    kept = std::copy(drawn.begin(), drawn.end(), kept);
    std::iota(kept, kept + view.recent, view.n_cells - view.recent);

    choice->n_kept[h] = drawn.size() + view.recent;
}

std::vector<double> csp_attention(const llama_csp_view & view, uint32_t h) {
    const float * self  = view.self  + size_t(h)*view.n_cells;
    const float * cross = view.cross + size_t(h)*view.n_cells;

    std::vector<double> res(view.n_cells - view.recent);

    for (size_t i = 0; i < res.size(); ++i) {
        const double sum = double(self[i]) + double(cross[i]);

        res[i] = std::isnan(sum) ? 0.0 : sum;
    }

    return res;
}

bool csp_is_valid(const llama_csp_settings_snapkv & cfg) {
    return cfg.kernel%2 == 1 && cfg.kernel < 100;
}

std::vector<double> csp_pool(const std::vector<double> & score, const llama_csp_settings_snapkv & cfg) {
    const size_t half = cfg.kernel/2;

    std::vector<double> res(score.size());

    for (size_t i = 0; i < score.size(); ++i) {
        const auto first = score.begin() + (i - std::min(i, half));
        const auto last  = score.begin() + std::min(i + half + 1, score.size());

        res[i] = cfg.average ? std::accumulate(first, last, 0.0)/cfg.kernel : *std::max_element(first, last);
    }

    return res;
}

// in lanes, which the compiler puts into vector registers
static double csp_dot(const float * a, const float * b, uint32_t n) {
    constexpr uint32_t N_LANE = 16;

    float sum[N_LANE] = {};

    uint32_t i = 0;

    for (; i + N_LANE <= n; i += N_LANE) {
        for (uint32_t j = 0; j < N_LANE; ++j) {
            sum[j] += a[i + j]*b[i + j];
        }
    }

    for (; i < n; ++i) {
        sum[0] += a[i]*b[i];
    }

    for (uint32_t m = N_LANE/2; m > 0; m /= 2) {
        for (uint32_t j = 0; j < m; ++j) {
            sum[j] += sum[j + m];
        }
    }

    return double(sum[0]);
}

csp_keys::csp_keys(const llama_csp_view & view, uint32_t h) :
    data(view.k + size_t(h)*view.n_cells*view.n_embd_head_k), n_embd(view.n_embd_head_k), norm(view.n_cells) {
    for (uint32_t i = 0; i < view.n_cells; ++i) {
        const float * k = data + size_t(i)*n_embd;

        norm[i] = std::sqrt(csp_dot(k, k, n_embd));
    }
}

double csp_keys::cosine(uint32_t i, uint32_t j) const {
    const double scale = norm[i]*norm[j];

    return scale > 0.0 ? csp_dot(data + size_t(i)*n_embd, data + size_t(j)*n_embd, n_embd)/scale : 0.0;
}
