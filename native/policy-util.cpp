#include "policy-util.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <future>
#include <numeric>

void csp_for_heads(const llama_csp_view & view, const std::function<void(uint32_t)> & f) {
    std::atomic<uint32_t> next = 0;

    const auto work = [&] {
        for (uint32_t h; (h = next++) < view.n_head_kv;) {
            f(h);
        }
    };

    std::vector<std::future<void>> others;

    for (uint32_t i = 1; i < std::min(view.n_threads, view.n_head_kv); ++i) {
        others.push_back(std::async(std::launch::async, work));
    }

    work();

    for (auto & other : others) {
        other.get();
    }
}

std::vector<uint32_t> csp_candidates(const llama_csp_view & view) {
    std::vector<uint32_t> res(view.n_cells - view.recent);
    std::iota(res.begin(), res.end(), 0);

    return res;
}

std::vector<uint32_t> csp_draw(std::vector<uint32_t> & cand, uint32_t n, const std::vector<double> & score) {
    struct entry {
        double   score;
        uint32_t i;

        bool operator<(const entry & other) const {
            return score > other.score || (score == other.score && i < other.i);
        }
    };

    std::vector<uint32_t> res;

    if (n == 0) {
        return res;
    }

    std::vector<entry> entries;
    entries.reserve(cand.size());

    // a NaN would break the strict weak ordering that nth_element needs
    for (const auto i : cand) {
        entries.push_back({ std::isnan(score[i]) ? -HUGE_VAL : score[i], i });
    }

    if (n < entries.size()) {
        std::nth_element(entries.begin(), entries.begin() + n, entries.end());
    }

    cand.clear();

    for (size_t i = 0; i < entries.size(); ++i) {
        (i < n ? res : cand).push_back(entries[i].i);
    }

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

// keys that are compared at once
static constexpr uint32_t N_BLOCK = 32;

// a key of 0 is as far from all others as can be
static double csp_norm(const float * k, uint32_t n_embd) {
    double sum = 0.0;

    for (uint32_t d = 0; d < n_embd; ++d) {
        sum += double(k[d])*double(k[d]);
    }

    return sum > 0.0 ? std::sqrt(sum) : HUGE_VAL;
}

csp_keys::csp_keys(const llama_csp_view & view, uint32_t h) :
    data(view.k + size_t(h)*view.n_cells*view.n_embd_head_k), n_embd(view.n_embd_head_k), norm(view.n_cells) {
    for (uint32_t i = 0; i < view.n_cells; ++i) {
        norm[i] = csp_norm(data + size_t(i)*n_embd, n_embd);
    }
}

void csp_keys::add(uint32_t i) {
    const size_t j = added.size()%N_BLOCK;

    if (j == 0) {
        blocks.resize(blocks.size() + size_t(n_embd)*N_BLOCK);
    }

    float * block = blocks.data() + blocks.size() - size_t(n_embd)*N_BLOCK;

    for (uint32_t d = 0; d < n_embd; ++d) {
        block[size_t(d)*N_BLOCK + j] = data[size_t(i)*n_embd + d];
    }

    added.push_back(i);
}

// the library is built for any x86-64, this loop takes the wider registers of most. no FMA, which rounds otherwise:
// the same keys are drawn on all of them
#if defined(__x86_64__) && defined(__GLIBC__)
__attribute__((target_clones("avx2", "default")))
#endif
static void csp_dot(const float * k, const float * block, uint32_t n_embd, float * dot) {
    float sum[N_BLOCK] = {};

    for (uint32_t d = 0; d < n_embd; ++d) {
        for (uint32_t j = 0; j < N_BLOCK; ++j) {
            sum[j] += k[d]*block[j];
        }

        block += N_BLOCK;
    }

    std::copy(sum, sum + N_BLOCK, dot);
}

csp_keys::neighbor csp_keys::nearest(uint32_t i, uint32_t & n_seen) const {
    const uint32_t first = n_seen/N_BLOCK*N_BLOCK;
    const uint32_t last  = std::min<uint32_t>(first + N_BLOCK, added.size());

    float dot[N_BLOCK];

    csp_dot(data + size_t(i)*n_embd, blocks.data() + size_t(first)*n_embd, n_embd, dot);

    neighbor res = { added[n_seen], -HUGE_VAL };

    for (; n_seen < last; ++n_seen) {
        const uint32_t j = added[n_seen];

        const double cur = dot[n_seen - first]/(norm[i]*norm[j]);

        if (cur > res.cosine) {
            res = { j, cur };
        }
    }

    return res;
}
